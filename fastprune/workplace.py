"""The hidden folder beside an output in which one run works at a time.

While a run writes to OUT, the folder `.OUT.fastprune` beside it holds

    lock       locked by the run as long as it lives; the number of its process
    new        what becomes OUT
    old        what OUT was, for a moment, where the file system cannot exchange two folders
    removed    the same, once OUT is there again

A run that was killed leaves the folder behind, unlocked. The next run with the same OUT puts OUT
right and removes it. Where the file system has no locks every run has a folder of another name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastprune.errors import InputError
from fastprune.files import is_still
from fastprune.progress import log as progress_log
from fastprune.space import disk_errors

LOCK, NEW, OLD, REMOVED = "lock", "new", "old", "removed"
SUFFIX = ".fastprune"
OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def place(out: Path) -> Path:
    """The absolute path of `out`, free of links above its last part. InputError for a root."""
    path = Path(out).absolute()
    found = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    if not found.name:
        raise InputError(f"{out}: the root of the files cannot be replaced; choose another --out")
    return found


def work_folder(out: Path) -> Path:
    """Where the run that writes to `out`, a path from `place`, works."""
    return out.with_name(f".{out.name}{SUFFIX}")


@contextmanager
def claimed(out: Path, wait: bool = False) -> Iterator[Path]:
    """The folder to prepare `out` in; until the block ends no other run can have it.

    At the end it is removed, with all that lies in it and the folders above that were made for it.
    Raises InputError when another run has it, unless the caller would rather `wait`, when it cannot
    be made, and when the disk is full while the block runs.
    """
    out = place(out)
    created = [folder for folder in out.parents if not folder.exists()]  # innermost first
    try:
        with disk_errors(out):
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                work, lock = _begin(out, wait)
            except OSError as error:
                raise InputError(f"{out}: cannot be created: {error.strerror}") from error
            try:
                _settle(work, out)
                yield work
            finally:
                _leave(work, lock, out)
    finally:
        with suppress(OSError):  # not empty: the result lies there
            for folder in created:
                folder.rmdir()


def check_unclaimed(out: Path) -> None:
    """Raise InputError where another run has claimed `out`: before anything else is said of it,
    for what lies there is that run's."""
    if remove_leftovers(out):
        raise _claimed_by_another(place(out))


def remove_leftovers(out: Path) -> bool:
    """Put `out` right after a killed run, and remove what that left beside it.

    Folders that another program made, or that a living run works in, are not touched. Whether a
    living run works there.
    """
    out = place(out)
    work = work_folder(out)
    with suppress(OSError, _NoLocks):  # another user's, or a name too long for one: it stays
        if not work.is_dir() or work.is_symlink():
            return False
        if not {path.name for path in work.iterdir()} <= {LOCK, NEW, OLD, REMOVED}:
            return False
        lock = _lock(work, wait=False)
        if lock is None:
            return True
        _leave(work, lock, out)
    return False


def remove_all_leftovers(folder: Path) -> None:
    """`remove_leftovers` of every output in `folder`, which is a place of ours alone."""
    for work in folder.glob(f".*{SUFFIX}"):
        remove_leftovers(work.with_name(work.name[1 : -len(SUFFIX)]))


# ---------------------------------------------------------------------------------------- locks


class _NoLocks(Exception):
    """The file system has no locks."""


def _begin(out: Path, wait: bool) -> tuple[Path, int | None]:
    """The folder to work in, and the lock on it where there can be one. InputError, OSError."""
    work = work_folder(out)
    with suppress(FileNotFoundError):
        found = work.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise InputError(f"{work}: is in the way; remove it, or choose another --out")
    try:
        lock = _lock(work, wait=False)
        if lock is None:
            if not wait:
                raise _claimed_by_another(out)
            process = _process(work)
            progress_log.info("waiting for another fastprune (%s) that makes %s", process, out)
            lock = _lock(work, wait=True)
    except _NoLocks:
        return Path(tempfile.mkdtemp(prefix=f"{work.name}-", dir=out.parent)), None
    return work, lock


def _lock(work: Path, wait: bool) -> int | None:
    """Make the folder `work` and lock it until the file returned is closed, or this process ends.

    None where another has the lock and this one shall not `wait`. Raises OSError and _NoLocks.
    """
    while True:
        with suppress(FileExistsError):
            work.mkdir(mode=0o700)
        try:
            lock = os.open(work / LOCK, OPEN | os.O_CREAT, 0o600)
        except FileNotFoundError:  # the run that had the folder has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if is_still(work / LOCK, lock):
                with suppress(OSError):  # a full disk: the number is for people alone
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, str(os.getpid()).encode(), 0)
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as error:
            os.close(lock)
            _remove(work)
            raise _NoLocks from error
        except BaseException:  # Ctrl-C while it waits
            os.close(lock)
            raise
        os.close(lock)


def _claimed_by_another(out: Path) -> InputError:
    return InputError(
        f"{out}: another fastprune ({_process(work_folder(out))}) is writing to it; wait until it "
        "has ended, or choose another --out"
    )


def _process(work: Path) -> str:
    """Which process works in `work`, for people."""
    try:
        return f"process {int((work / LOCK).read_text())}"
    except (OSError, ValueError):
        return "a process elsewhere"


def _leave(work: Path, lock: int | None, out: Path) -> None:
    """Put `out` right, and remove the folder `work` and the lock on it."""
    try:
        _settle(work, out)
        _remove(work)
    finally:
        if lock is not None:
            os.close(lock)


def _settle(work: Path, out: Path) -> None:
    """Give back to `out` what was taken away and not replaced, and remove what lies in `work`.

    Killed anywhere, the next call does the rest.
    """
    old, new, removed = work / OLD, work / NEW, work / REMOVED
    if old.exists():
        os.rename(old, removed if out.exists() else out)  # a folder half removed is never put back
    for path in (new, removed):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _remove(work: Path) -> None:
    """Remove `work`, which may hold a lock and is empty otherwise."""
    with suppress(OSError):
        (work / LOCK).unlink(missing_ok=True)
        work.rmdir()
