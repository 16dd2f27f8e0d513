"""Single files: written whole or not at all, and never over a file that is not ours.

A path given on the command line may be anything. Devices, pipes and open descriptors are written
into; a regular file is replaced only where this program wrote it. A folder can be sealed with the
sizes and digests of its files, so that a copy that was cut short is recognised.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.readers import read_json

MARK = "fastprune"
"""First key of every JSON result: the version that wrote it."""
MARKED = re.compile(rb'\s*\{\s*"fastprune"\s*:\s*"')
DESCRIPTOR = re.compile(r"/dev/(stdout|stderr)|(?:/dev/fd|/proc/self/fd)/(\d{1,9})")
STANDARD = {"stdout": 1, "stderr": 2}
SEAL = "sealed.json"
UNFINISHED = ".fastprune-"
"""In the names of files that are being written."""


# ----------------------------------------------------------------- files that the user has named


def check_file(flag: str, path: Path, ours: Callable[[Path], bool], what: str) -> None:
    """Raise InputError now if `write_file` could not write to `path` later, or must not.

    `flag` is the option that names the file. `ours` says of a regular file that is not empty
    whether this program wrote it; `what` is what the error calls such a file.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder; name a file")
    if _descriptor(path) is not None or (path.exists() and not path.is_file()):
        if not os.access(path, os.W_OK):
            raise InputError(f"{flag} {path}: cannot be written")
        return
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: its folder does not exist or cannot be written")
    try:
        foreign = path.exists() and path.stat().st_size > 0 and not ours(path)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    if foreign:
        raise InputError(
            f"{flag} {path}: exists and is not {what}, so it is not replaced; choose another name"
        )


def write_file(flag: str, path: Path, text: str) -> None:
    """Write `text` to `path`, into it or in its place, as `check_file` has allowed.

    A symbolic link stays, what it leads to is written. Raises InputError where that fails, and
    BrokenPipeError where no one reads a descriptor of this process any more.
    """
    path, descriptor = Path(path), _descriptor(path)
    try:
        if descriptor is not None:  # not opened anew: it goes on where the last one stopped
            with open(os.dup(descriptor), "w", encoding="utf-8") as file:
                file.write(text)
        elif path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8") as file:
                file.write(text)
        else:
            write_whole(path.resolve(), text)
    except OSError as error:
        if descriptor is not None and isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"{flag} {path}: cannot be written: {error.strerror}") from error


def is_result(path: Path) -> bool:
    """Whether `path` holds a JSON result that this program wrote: `MARK` is its first key."""
    with path.open("rb") as file:
        return MARKED.match(file.read(64)) is not None


def _descriptor(path: Path) -> int | None:
    """The number of the open file of this process that `path` stands for."""
    found = DESCRIPTOR.fullmatch(str(path))
    if found is None:
        return None
    return STANDARD[found[1]] if found[1] else int(found[2])


def write_whole(path: Path, text: str) -> None:
    """Write `text` to the file `path`, whole or not at all, and to the disk. Raises OSError.

    What a killed run was writing for `path` is removed.
    """
    prefix = f".{path.name}{UNFINISHED}"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
        _remove_unlocked(leftover)
    handle, name = _locked_file(path.parent, prefix)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(handle, path.stat().st_mode & 0o777 if path.exists() else _usual_mode())
            os.fsync(handle)
            os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):  # it has just been moved to its place
            os.unlink(name)
        raise
    with suppress(OSError):  # what is done is done
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, of folders
            raise
    finally:
        os.close(handle)


def is_still(path: Path, handle: int) -> bool:
    """Whether `path` is the file that is open as `handle`, and not removed since."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def _locked_file(folder: Path, prefix: str) -> tuple[int, str]:
    """A new file for this user alone, open and locked where there are locks, and its path."""
    while True:
        handle, name = tempfile.mkstemp(dir=folder, prefix=prefix)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if is_still(Path(name), handle):  # or it was taken for a leftover before it was locked
            return handle, name
        os.close(handle)


def _remove_unlocked(file: Path) -> None:
    """Remove `file` unless a living process has locked it."""
    with suppress(OSError):
        handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        finally:
            os.close(handle)


def _usual_mode() -> int:
    """The permissions that the user's umask gives a new file."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


# ------------------------------------------------------------------------------- sealed folders


def seal(folder: Path) -> None:
    """Note the sizes and digests of the files in `folder`, in a file of its own there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    content = {str(f.relative_to(folder)): [f.stat().st_size, _digest(f)] for f in files}
    write_whole(folder / SEAL, json.dumps(content, indent=1) + "\n")


def is_sealed(folder: Path, digests: bool = True) -> bool:
    """Whether the files in `folder` are what they were when it was sealed.

    Their sizes are compared, and with `digests` their content, which is read for it.
    """
    try:
        content: dict[str, Any] = read_json(folder / SEAL)
        return all(
            (folder / name).stat().st_size == size
            and (not digests or _digest(folder / name) == digest)
            for name, (size, digest) in content.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
