"""What a long step shows while it runs: a bar on a terminal, a log line now and then elsewhere.

Nothing appears before DELAY seconds, so quick steps stay silent. Bars go to stderr through the
console below, which the log handler shares, so that the two never overwrite each other;
`console.quiet = True` silences them.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastprune.printing import Console

T = TypeVar("T")

DELAY = 2.0  # seconds before anything is shown
INTERVAL = 20.0  # seconds between the lines of a step that has no bar
console = Console(stderr=True)
log = logging.getLogger("fastprune.progress")


def track(
    iterable: Iterable[T], description: str | None, total: int | None = None, done: int = 0
) -> Iterator[T]:
    """Yield the items of `iterable`, showing how far the loop has come, without `description` not.

    `total` is the number of items where `iterable` has no length, `done` how many of them came
    before it (of a run that is continued). On a terminal a bar appears after DELAY seconds;
    elsewhere a log line does, and another every INTERVAL, with the time that the remaining items
    will take if they are like those before.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if console.quiet or description is None:
        yield from iterable
    elif console.is_terminal:
        yield from _bar(iterable, description, total, done)
    else:
        yield from _announced(iterable, description, total, done)


def _bar(iterable: Iterable[T], description: str, total: int | None, done: int) -> Iterator[T]:
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = progress.add_task(description, total=total, completed=done)
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


def _announced(
    iterable: Iterable[T], description: str, total: int | None, done: int
) -> Iterator[T]:
    first, start = done, time.monotonic()

    def so_far() -> str:
        if total is None:
            return f"{description}: {done} so far"
        line = f"{description}: {done} of {total} so far"
        if done == first:
            return line
        left = (time.monotonic() - start) / (done - first) * (total - done)
        return f"{line}, about {_minutes(left)} left"

    with _lines(so_far):
        for item in iterable:
            yield item
            done += 1


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Show `description` while the body, one long step without a count, runs.

    On a terminal a spinner appears after DELAY seconds; elsewhere plain log lines do.
    """
    if console.quiet:
        yield
    elif console.is_terminal:
        with _spinner(description):
            yield
    else:
        with phase(description):
            yield


@contextmanager
def phase(description: str) -> Iterator[None]:
    """Where there is no terminal, say `description` now and then while the body runs.

    The steps inside speak for it while they run.
    """
    if console.quiet or console.is_terminal:
        yield
        return
    start = time.monotonic()
    with _lines(lambda: f"{description} …, {_minutes(time.monotonic() - start)} so far"):
        yield


@contextmanager
def _spinner(description: str) -> Iterator[None]:
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    progress.add_task(description, total=None)
    timer = threading.Timer(DELAY, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


@dataclass
class _Voices:
    """The steps that run, one in another, where there is no terminal."""

    running: list[threading.Event] = field(default_factory=list)
    """the end of each, the innermost step last"""
    last: float = 0.0
    """when one of them was heard, as time.monotonic has it"""


_voices = _Voices()


@contextmanager
def _lines(say: Callable[[], str]) -> Iterator[None]:
    """Log what `say` returns after DELAY seconds and then every INTERVAL, while the body runs.

    A thread does, so that a step is heard of however long one item of it takes. A step with others
    inside is heard only when these are too short to be.
    """
    ended = threading.Event()

    def speak() -> None:
        pause = DELAY
        while not ended.wait(pause):
            now = time.monotonic()
            silent = pause == INTERVAL and now - _voices.last >= INTERVAL
            if silent or _voices.running[-1:] == [ended]:
                _voices.last = now
                log.info("%s", say())
            pause = INTERVAL

    thread = threading.Thread(target=speak, daemon=True)
    _voices.running.append(ended)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        _voices.running.remove(ended)
        thread.join()


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
