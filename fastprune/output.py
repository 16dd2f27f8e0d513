"""Output folders: checked before the work, filled beside their place, put there in one step.

`workplace` says where they are filled, and keeps other runs away meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.files import sync
from fastprune.readers import read_json
from fastprune.workplace import (
    NEW,
    OLD,
    SUFFIX,
    claimed,
    place,
    remove_leftovers,
    work_folder,
)

RECORDS = "fastprune"
"""Folder inside a checkpoint where a run keeps its plan, metrics and report."""
RUN_LOG = "run.log"
"""File in there with all that a run has said."""
WRITTEN_INTO = (
    RECORDS,
    f"{RECORDS}/state",
    f"{RECORDS}/{RUN_LOG}",
    f"{RECORDS}/state/{RUN_LOG}",
    f"{RECORDS}/train_log.jsonl",
)
"""What a run writes where it lies, before the result is exchanged."""
MOUNTS = Path("/proc/self/mountinfo")
CURRENT_FOLDER, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


# -------------------------------------------------------------------------------- before the work


def check_out(out: Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Raise InputError now if a run cannot leave its result in the folder `out` later.

    `out` may not exist yet or be an empty folder. With `overwrite` it may hold the result of an
    earlier run, but nothing else: a mistyped path must not cost the user a folder of other things.
    `inputs` are what the run reads; those on the disk must lie apart from `out`. What a killed run
    left beside `out` is put right first.
    """
    remove_leftovers(out)
    check_place(out)
    check_apart(out, inputs)
    out = place(out)
    if not _is_filled(out) or _holds_no_result(out):
        return
    if not overwrite:
        raise InputError(f"{out}: exists already; choose another --out, or pass --overwrite")
    if not is_ours(out):
        raise InputError(
            f"{out}: not a checkpoint that fastprune wrote ({RECORDS}/metrics.json is missing or "
            "another program's), so --overwrite does not replace it; choose another --out"
        )
    if (out / ".git").exists():
        raise InputError(
            f"{out}: holds a git repository, so --overwrite does not replace it; choose another "
            "--out"
        )


def check_out_file(
    out: Path,
    ours: Callable[[Path], bool],
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
) -> None:
    """As `check_out`, where the result is the single file `out`.

    `ours` says of a regular file that is not empty whether this program wrote it; only such a one
    is replaced, and only with `overwrite`.
    """
    remove_leftovers(out)
    check_apart(out, inputs)
    named, out = Path(out), place(out)
    if out.is_dir():
        raise InputError(f"{named}: is a folder; --out names a file, such as {named / 'model'}")
    if named.is_symlink() or (out.exists() and not out.is_file()):
        raise InputError(f"{named}: is not a regular file; choose another --out")
    parent = next((folder for folder in out.parents if os.path.lexists(folder)), out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{named}: cannot be created, {parent} is not writable; choose another --out"
        )
    try:
        if not out.exists() or out.stat().st_size == 0:
            return
        if not overwrite:
            raise InputError(f"{named}: exists already; choose another --out, or pass --overwrite")
        if not ours(out):
            raise InputError(
                f"{named}: not a file that fastprune wrote, so --overwrite does not replace it; "
                "choose another --out"
            )
    except OSError as error:
        raise InputError(f"{named}: cannot be created: {error.strerror}") from error


def check_place(out: Path) -> None:
    """Raise InputError if no folder can be put in the place of `out`, whatever it holds."""
    named, out = Path(out), place(out)
    try:
        there = out.exists()
        os.stat(f"{work_folder(out)}-12345678")  # the longest name that will be needed
    except (FileNotFoundError, NotADirectoryError):  # as it should be
        pass
    except OSError as error:
        raise InputError(f"{named}: cannot be created: {error.strerror}") from error
    if named.is_symlink():
        raise InputError(
            f"{named}: is a symbolic link; name the folder it leads to, {out.resolve()}"
        )
    if there and not out.is_dir():
        raise InputError(f"{named}: is a file; --out names a folder")
    parent = next((folder for folder in out.parents if os.path.lexists(folder)), out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{named}: cannot be created, {parent} is not writable; choose another --out"
        )
    if not there:
        return
    for name in WRITTEN_INTO:
        if (out / name).is_symlink():
            raise InputError(
                f"{named / name}: is a symbolic link, which the run would write through; remove it"
            )
    if _is_mount_point(out):
        raise InputError(
            f"{named}: is a mount point, which cannot be replaced as a whole; name a folder in it, "
            f"such as {out / 'model'}"
        )
    if _holds_current_folder(out):
        raise InputError(
            f"{named}: holds the current folder, which the run would replace; choose another "
            "--out, or run from elsewhere"
        )
    if not os.access(out, os.R_OK | os.W_OK | os.X_OK) or _is_anothers(out):
        raise InputError(
            f"{named}: cannot be replaced, its permissions forbid it; choose another --out"
        )


def check_apart(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raise InputError if one of `inputs` lies in `out`, is `out`, or has it inside.

    Inputs that are not on the disk (names of data sets, hub ids) are passed over.
    """
    named, outs = out, _ways(Path(out))
    for source in inputs:
        path = Path(os.path.expanduser(source))
        if not str(source).strip() or not os.path.exists(path):
            continue
        files = path.iterdir() if path.is_dir() and os.access(path, os.R_OK) else ()
        ways = {*_ways(path), *(file.resolve() for file in files if file.is_symlink())}
        if outs & ways:
            raise InputError(f"{named}: is what the run reads ({source}); choose another --out")
        if any(a in b.parents for a in outs for b in ways):
            raise InputError(f"{named}: holds {source}, which the run reads; choose another --out")
        if any(a in b.parents for a in ways for b in outs):
            raise InputError(
                f"{named}: lies in {source}, which the run reads; choose another --out"
            )


def is_ours(folder: Path) -> bool:
    """Whether `folder` holds what a run of this program left: a result, or a state to go on from.

    A `fastprune` folder alone says nothing: a checkout of this project has one too. A state that
    was damaged is known by the log beside it.
    """
    versions = _read_json(folder / RECORDS / "metrics.json").get("versions")
    state = folder / RECORDS / "state"
    run = _read_json(state / "run.json")
    finished = isinstance(versions, dict) and "fastprune" in versions
    logs = [folder / RECORDS / RUN_LOG, state / RUN_LOG]
    damaged = (state / "run.json").is_file() and any(log.is_file() for log in logs)
    return finished or damaged or {"settings", "stage"} <= run.keys()


def _ways(path: Path) -> set[Path]:
    """The absolute paths of `path`: as it is named, and with its last part's links followed."""
    return {place(path), path.resolve()}


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _holds_no_result(folder: Path) -> bool:
    """Whether `folder` is what a run left that ended before its first step: its log, folders, and
    hidden files that it was writing."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") and SUFFIX in part for part in parts)
        made = path.is_dir() or parts == (RECORDS, RUN_LOG) or hidden
        if parts[0] != RECORDS or path.is_symlink() or not made:
            return False
    return True


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; an empty one where there is none."""
    try:
        content = read_json(file)
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_mount_point(folder: Path) -> bool:
    """A folder of the same file system can be mounted too: only the kernel's list knows."""
    mounted: set[str] = set()
    with suppress(OSError):
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        mounted = {
            re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4])
            for line in lines
        }
    return os.path.ismount(folder) or str(folder) in mounted


def _holds_current_folder(folder: Path) -> bool:
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it has been removed
        return False
    return folder == here or folder in here.parents


def _is_anothers(folder: Path) -> bool:
    """Whether `folder` is another user's in a folder where only owners may rename, as in /tmp."""
    above = folder.parent.stat()
    owners = (0, folder.stat().st_uid, above.st_uid)
    return bool(above.st_mode & stat.S_ISVTX) and os.geteuid() not in owners


# --------------------------------------------------------------------------------- after the work


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `out` to write into; it becomes `out` when the block ends well.

    On any exception, an interrupt included, it is removed and `out` is what it was. Raises
    InputError as `check_out` does, when another run writes to `out`, and when the disk is full;
    where `out` cannot be replaced after the block, what was written stays under a name that the
    error tells.
    """
    check_out(out, overwrite)
    with replacing(out, partial(check_out, overwrite=overwrite)) as fresh:
        yield fresh


@contextmanager
def replacing(
    out: Path, check: Callable[[Path], None] = lambda _: None, claim: Path | None = None
) -> Iterator[Path]:
    """As `staged`, whatever `out` holds: the caller has looked, and takes over what shall stay.

    `check` is asked again when the block has ended. `claim` is what `claimed` gave where the caller
    has `out` already.
    """
    out = place(out)
    with nullcontext(claim) if claim is not None else claimed(out) as work:
        fresh = work / NEW
        fresh.mkdir()  # unlike `work`, with the permissions the user's umask gives
        yield fresh
        try:
            sync_folder(fresh)
        except OSError as error:
            raise InputError(f"{out}: cannot be written: {error.strerror}") from error
        try:
            check(out)
            exchange(fresh, out)
        except (OSError, InputError) as error:
            raise _kept(fresh, out, error) from error


@contextmanager
def staged_file(out: Path, ours: Callable[[Path], bool], overwrite: bool = False) -> Iterator[Path]:
    """The name of a new file to write; it becomes `out` when the block ends well.

    On any exception, an interrupt included, it is removed and `out` is what it was. Raises
    InputError as `check_out_file` does, when another run writes to `out`, and where the file cannot
    be written.
    """
    check_out_file(out, ours, overwrite)
    out = place(out)
    with claimed(out) as work:
        fresh = work / NEW
        yield fresh
        try:
            _sync(fresh)
            check_out_file(out, ours, overwrite)
            os.replace(fresh, out)
        except OSError as error:
            raise InputError(f"{out}: cannot be written: {error.strerror}") from error
        with suppress(OSError):  # what is done is done
            _sync(out.parent)


def _kept(fresh: Path, out: Path, error: OSError | InputError) -> InputError:
    """The work is done and must not be lost: `fresh` gets a name of its own, which this tells."""
    kept = Path(tempfile.mkdtemp(prefix=f"{out.name}-", dir=out.parent))
    os.rename(fresh, kept)
    reason = error.strerror if isinstance(error, OSError) else error
    return InputError(f"{out}: cannot be replaced ({reason}); the finished result is in {kept}")


def exchange(fresh: Path, out: Path) -> None:
    """Put the folder `fresh` in the place of `out`, in one step where the file system can.

    What `out` was lies where `fresh` was, or else (NFS, some FUSE) in a folder `old` beside that,
    and then `out` is missing for an instant: `workplace` knows. Raises OSError.
    """
    if not _is_filled(out):
        os.rename(fresh, out)
    elif not _exchange_paths(fresh, out):
        os.rename(out, fresh.with_name(OLD))
        os.rename(fresh, out)
    with suppress(OSError):  # what is done is done
        _sync(out.parent)


def _exchange_paths(one: Path, other: Path) -> bool:
    """Exchange two paths by renameat2(2); False where there is no such thing. Raises OSError."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    paths = (CURRENT_FOLDER, os.fsencode(one), CURRENT_FOLDER, os.fsencode(other))
    if call(*paths, EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync_folder(folder: Path) -> None:
    """Wait until everything in `folder` is on the disk: a name must not outlive its content.

    Raises OSError where the disk is full or broken.
    """
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    if not path.is_symlink() and (path.is_file() or path.is_dir()):
        sync(path)
