"""What a long step shows while it runs: a bar on a terminal, a log line a minute elsewhere.

Nothing appears before DELAY seconds, so quick steps stay silent. Bars go to stderr through the
console below, which the log handler shares, so that the two never overwrite each other;
`console.quiet = True` silences them.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

DELAY = 2.0  # seconds before anything is shown
INTERVAL = 60.0  # seconds between the lines of a step that has no bar
console = Console(stderr=True)
log = logging.getLogger("fastprune.progress")


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items of `iterable`, showing how far the loop has come.

    `total` is the number of items where `iterable` has no length. On a terminal a bar appears after
    DELAY seconds; elsewhere a log line does, and another every INTERVAL, with the time that the
    remaining items will take if they are like those before.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if console.quiet:
        yield from iterable
    elif console.is_terminal:
        yield from _bar(iterable, description, total)
    else:
        yield from _announced(iterable, description, total)


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = progress.add_task(description, total=total)
    start = time.monotonic()
    running = False
    try:
        for item in iterable:
            if not running and time.monotonic() - start > DELAY:
                progress.start()
                running = True
            yield item
            progress.advance(task)
    finally:
        if running:
            progress.stop()


def _announced(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = time.monotonic()
    due = start + DELAY
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now <= due:
            continue
        due = now + INTERVAL
        if total is None:
            log.info("%s: %d so far", description, done)
        elif done < total:
            left = round((now - start) / done * (total - done))
            log.info(
                "%s: %d of %d so far, about %d:%02d left",
                description,
                done,
                total,
                *divmod(left, 60),
            )


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Show `description` while the body, one long step without a count, runs.

    On a terminal a spinner appears after DELAY seconds; elsewhere one plain log line does.
    """
    if console.quiet:
        yield
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    progress.add_task(description, total=None)
    on_terminal = console.is_terminal

    timer = threading.Timer(
        DELAY, progress.start if on_terminal else lambda: log.info("%s …", description)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if on_terminal:  # elsewhere nothing was started, and stopping would print an empty line
            progress.stop()
