"""Room on disks: looked at before the work, and told in one line where it runs out during it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastprune.errors import FastpruneError, InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What a disk answers that takes no more bytes."""
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust (safetensors, tokenizers) end the text of an operating system's
error."""
SPARE = 1 << 20
"""Bytes that must be free besides, for logs and records."""


def check_space(where: Path, needed: float, what: str) -> None:
    """Raise InputError where less than `needed` bytes are free on the disk of `where`.

    `where` need not exist yet. `what` is what takes the space, for people: "the pruned model".
    """
    folder = next(f for f in (where.absolute(), *where.absolute().parents) if f.is_dir())
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise InputError(
            f"{where}: {what} takes about {_amount(needed + SPARE)}, and {_amount(free)} are free "
            f"on the disk of {folder}; make room there, or choose a folder on another disk"
        )


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Raise InputError, which names `where`, for an error in the block that says the disk is full.

    Other errors pass.
    """
    try:
        yield
    except Exception as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise InputError(f"{where}: cannot be written: {reason}") from error


def disk_trouble(error: BaseException) -> str | None:
    """What `error`, or what led to it, says of a disk that takes no more bytes; None for others.

    An error that this program raised on purpose has its own words and is left alone.
    """
    if isinstance(error, FastpruneError):
        return None
    found: BaseException | None = error
    while found is not None:
        code = found.errno if isinstance(found, OSError) else _rust_code(str(found))
        if code in FULL:
            return f"{os.strerror(code)}; make room and run the same command again"
        found = found.__cause__ or found.__context__
    return None


def _rust_code(text: str) -> int | None:
    match = RUST_ERROR.search(text)
    return int(match[1]) if match else None


def _amount(n_bytes: float) -> str:
    """For people: 1234567890 → 1.23 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes / 1e3:.0f} kB"
