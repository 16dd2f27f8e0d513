"""Child processes that run one command line, forked from a process that has everything imported."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from fastprune import cli

CUT, BAD_INPUT, INTERRUPTED = 86, 2, 130


def start(arguments: list[str], root: Path, before: Callable[[], None] = lambda: None) -> int:
    """A child process that runs one command line after `before`; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        before()
        status = cli.main(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the command had begun, or when it had ended
        status = INTERRUPTED
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """The exit status of `child`, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: list[str], root: Path, before: Callable[[], None] = lambda: None) -> int:
    return wait(start(arguments, root, before))


class Changes:
    """Counts what a process changes on the disk below `root`; before number `at` it acts.

    An action that returns is called again for each later change.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")

    def __init__(self, root: Path, at: int, act: Callable[[str], None]) -> None:
        self.root, self.at, self.act, self.count = str(root), at, act, 0

    def __call__(self) -> None:
        real = os.fsync

        def fsync(handle: int) -> None:
            self.changes("fsync")
            real(handle)

        os.fsync = fsync
        sys.addaudithook(self.audit)

    def audit(self, event: str, values: tuple) -> None:
        if event not in self.EVENTS:
            return
        if event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = os.fsdecode(values[0]) if isinstance(values[0], (str, bytes, Path)) else ""
        inside = path.startswith(self.root) or not os.path.isabs(path)  # shutil's are relative
        if inside and not path.endswith("/log"):
            self.changes(event)

    def changes(self, event: str) -> None:
        self.count += 1
        if self.count >= self.at:
            self.act(event)


def cut(event: str) -> None:
    """End as a machine does that loses its power."""
    os._exit(CUT)


def refuse(event: str) -> None:
    """As a full disk does."""
    if event in ("open", "os.mkdir", "os.link", "os.truncate", "fsync"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Stop:
    """Signal `number` once, as if the user or the system had sent it."""

    def __init__(self, number: int) -> None:
        self.number, self.sent = number, False

    def __call__(self, event: str) -> None:
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


def limited(limit: int) -> None:
    """No file of this process grows beyond `limit` bytes; what it says goes nowhere."""
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
