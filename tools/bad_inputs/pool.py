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
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from case import Case

SECONDS = 30.0
"""Time of one case."""
BYTES = 3 * 2**29
"""Memory of one case, beyond what a worker has before it."""
LINES = 6
"""Lines on stderr at most, warnings included."""
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
    context = multiprocessing.get_context("fork")  # torch is loaded once, and cases need no copies
    import peft  # noqa: F401

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
    folder = work / str(place)
    stderr = os.open(work / f"{place}.stderr", os.O_RDWR | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stderr, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    while True:
        number = pipe.recv()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        os.ftruncate(stderr, 0)
        os.lseek(stderr, 0, os.SEEK_SET)
        pipe.send(run(cases[number], folder, lambda: _text(stderr)))
        gc.collect()


def _text(descriptor: int) -> str:
    sys.stderr.flush()
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode("utf-8", "backslashreplace")


def run(case: Case, folder: Path, said) -> Found:
    """Run `case` in the empty `folder`; `said` returns what stands on stderr."""
    from fastprune import cli

    args = case.build(folder)
    before = _listed(folder)
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
    text = said()
    problem = problem_of(case, status, text, _listed(folder) - before)
    return Found(case.name, status, seconds, text, problem)


def problem_of(case: Case, status: int, text: str, new: set[str]) -> str:
    """What is wrong with how `case` ended; empty where nothing is."""
    lines = text.splitlines()
    errors = [line for line in lines if line.startswith("fastprune: error: ")]
    if status == 1 or status not in (*case.expected, *(case.expected and (2,))):
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
    if status == 2 and new:
        return f"left behind: {sorted(new)[0]}"
    if threading.active_count() > 64:
        return "threads"
    return ""


def _listed(folder: Path) -> set[str]:
    """The paths of all that lies in `folder`."""
    return {
        os.path.relpath(os.path.join(root, name), folder)
        for root, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def told(found: Found) -> str:
    """What is wrong with a case, in one line of ASCII."""
    return ascii(f"{found.problem}: {found.name}: {found.said[-300:]}")[1:-1]
