"""Cases run in worker processes, and what is found of each."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import re
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from case import Base, Case

from fastprune import cli

SECONDS = 30.0
"""Time of one case."""
BYTES = 3 * 2**29
"""Memory of one case, beyond what a worker has before it."""
STREAMS = ("stdout", "stderr")
THREADS = 64
"""Threads of Python in a worker after a case."""
LINES = 6
"""Lines on stderr at most, warnings included."""
TALKING = ("generate", "chat")
"""Commands that write on stdout what a model answers, as it is."""
CONTROL = re.compile(r"[^\n\t -~\u00a1-\u2027\u202f-\ud7ff\ue000-\U0010ffff]")


@dataclass(frozen=True)
class Found:
    """What was found of one case."""

    name: str
    status: int
    """its exit status; -1 where it had none"""
    seconds: float
    said: str
    """on stderr"""
    problem: str
    """what is wrong with that, in a word or two; empty where nothing is"""


def run_all(cases: list[Case], work: Path, workers: int, seconds: float) -> list[Found]:
    """Run `cases` in so many `workers`, each in a folder of its own in `work`.

    After so many `seconds` no further case is begun, and what was found so far is returned.
    """
    work.mkdir()
    gc.collect()
    gc.freeze()  # a collection after each case looks at what the case made, not at all of torch
    context = multiprocessing.get_context("fork")  # all is imported once, and cases need no copies
    found: dict[int, Found] = {}
    numbers, end = iter(range(len(cases))), time.monotonic() + seconds
    crew = [_Worker(context, cases, work, place) for place in range(workers)]
    idle = list(crew)
    while len(found) < len(cases):
        while idle and time.monotonic() < end and (number := next(numbers, None)) is not None:
            idle.pop().begin(number)
        if len(idle) == len(crew):
            break
        busy = [worker for worker in crew if worker.number is not None]
        ready = wait([worker.pipe for worker in busy], timeout=1.0)
        for worker in busy:
            number = worker.number
            result = worker.result(worker.pipe in ready)
            if result is not None and number is not None:
                found[number] = result
                if result.problem:  # said at once
                    print(told(result), flush=True)
                idle.append(worker)
    for worker in crew:
        worker.process.kill()
    return [found[number] for number in sorted(found)]


def run_sound(base: Base, place: Path) -> None:
    """Run each command on the sound inputs in the folder `place`, to be made.

    What the commands import is there afterwards, for workers to be forked with. RuntimeError where
    a command does not end with 0: then nothing that is made of these inputs shows anything.
    """
    import pyarrow.parquet  # noqa: F401

    place.mkdir()
    for number, (command, line) in enumerate(base.sound_lines().items()):
        with (place / "stdout").open("w") as stdout, redirect_stdout(stdout):
            status = cli.main([*line(place / str(number)), "--quiet"])
        if status:
            raise RuntimeError(f"{command} with sound inputs ends with exit status {status}")


class _Worker:
    """A process that runs one case after the other; one that does not answer is replaced."""

    def __init__(self, context, cases: list[Case], work: Path, place: int) -> None:
        self.context, self.cases, self.work, self.place = context, cases, work, place
        self.number: int | None = None
        self.start = 0.0
        self._spawn()

    def _spawn(self) -> None:
        self.pipe, other = self.context.Pipe()
        self.process = self.context.Process(
            target=_serve, args=(other, self.cases, self.work, self.place), daemon=True
        )
        self.process.start()
        other.close()

    def begin(self, number: int) -> None:
        """Let the process run the case `number`."""
        self.number, self.start = number, time.monotonic()
        self.pipe.send(number)

    def result(self, ready: bool) -> Found | None:
        """What was found of the case, None while it runs."""
        case, seconds = self.cases[self.number or 0], time.monotonic() - self.start
        if ready:
            with suppress(EOFError):
                self.number = None
                return self.pipe.recv()
            self._again()
            return Found(case.name, -1, seconds, "", "crash")
        if seconds < SECONDS:
            return None
        self._again()
        return Found(case.name, -1, seconds, "", "hang")

    def _again(self) -> None:
        self.number = None
        self.process.kill()
        self.process.join()
        self._spawn()


def _serve(pipe: Connection, cases: list[Case], work: Path, place: int) -> None:
    """Run the cases whose numbers come through `pipe`."""
    import torch

    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    folder, cache = work / str(place), work / f"{place}.cache"
    os.environ["XDG_CACHE_HOME"] = str(cache)
    streams = [os.open(work / f"{place}.{name}", os.O_RDWR | os.O_CREAT) for name in STREAMS]
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    while True:
        number = pipe.recv()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        for stream in streams:
            os.ftruncate(stream, 0)
            os.lseek(stream, 0, os.SEEK_SET)
        pipe.send(run(cases[number], folder, cache, lambda: [_text(one) for one in streams]))
        gc.collect()


def _text(descriptor: int) -> str:
    sys.stdout.flush()
    sys.stderr.flush()
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode("utf-8", "backslashreplace")


def run(case: Case, folder: Path, cache: Path, printed: Callable[[], list[str]]) -> Found:
    """Run `case` in the empty `folder`; `printed` returns what stands on stdout and on stderr."""
    args = case.build(folder)
    before, cached = listed(folder), listed(cache)
    stdin, sys.stdin = sys.stdin, io.StringIO(case.stdin)
    start = time.monotonic()
    try:
        status = cli.main(args)
    except BaseException as error:  # nothing may leave main but an exit status
        print(f"{type(error).__name__} left main: {error!r:.200}", file=sys.stderr)
        status = -1
    finally:
        sys.stdin = stdin
    seconds = time.monotonic() - start
    stdout, stderr = printed()
    problem = problem_of(case, status, stderr)
    if not problem and args[0] not in TALKING and CONTROL.search(stdout):
        problem = "control characters on stdout"
    problem = problem or change_of(before, listed(folder), whole=status == 2)
    problem = problem or change_of(cached, listed(cache), whole=False)
    return Found(case.name, status, seconds, stderr, problem)


def problem_of(case: Case, status: int, text: str) -> str:
    """What is wrong with how `case` ended and with its `text` on stderr; empty if nothing is."""
    lines = text.splitlines()
    errors = [line for line in lines if line.startswith("fastprune: error: ")]
    if status == 1 or status not in case.expected:
        return f"exit {status}"
    if CONTROL.search(text):
        return "control characters"
    if "Traceback" in text:
        return "traceback"
    if status and (len(errors) != 1 or lines[-1] != errors[0]):
        return "not one line of an error"
    if status == 2 and len(lines) > LINES:
        return "many lines"
    if "out of memory" in text or ("too large for" in text and "memory" in text):
        return "memory"
    if threading.active_count() > THREADS:
        return "threads"
    return ""


def listed(folder: Path) -> dict[str, tuple[int, int]]:
    """All that lies in `folder`, by its path there: size and time of change of what is no folder,
    zeros of a folder."""
    found = {}
    for root, folders, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(root, name), folder): (0, 0) for name in folders}
        for name in files:
            path = os.path.join(root, name)
            about = os.lstat(path)
            found[os.path.relpath(path, folder)] = about.st_size, about.st_mtime_ns
    return found


def change_of(
    before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], *, whole: bool
) -> str:
    """What a command may not have done to the files of a folder; empty where it did nothing so.

    What lay there must lie there still, as it was. What is new may not be hidden, as what is
    prepared is; with `whole` nothing may be new.
    """
    for path, about in before.items():
        if after.get(path) != about:
            return f"changed: {path}"
    for path in sorted(after.keys() - before.keys()):
        if whole or Path(path).name.startswith("."):
            return f"left behind: {path}"
    return ""


def told(found: Found) -> str:
    """What is wrong with a case, in one line of ASCII."""
    return ascii(f"{found.problem}: {found.name}: {found.said[-300:]}")[1:-1]
