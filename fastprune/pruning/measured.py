"""Figures that take long to measure, kept in the user's cache as soon as they are known.

A run that was cut off goes on with them, and so does another ratio of the same model. A file's name
holds a digest of all that its figures depend on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastprune.cache import cache_directory
from fastprune.distributed import Processes
from fastprune.errors import InputError
from fastprune.precision import bf16_is_fast
from fastprune.pruning.calibration import Calibration
from fastprune.readers import read_json
from fastprune.report.run import write_json

log = logging.getLogger("fastprune")

T = TypeVar("T", bound=Sequence[Any])


def remembered(name: str, calibration: Calibration, compute: Callable[[Calibration], T]) -> T:
    """What ``compute`` measures of ``calibration``, or has measured before.

    A list of what JSON knows, of which only one called ``name`` follows from the calibration.
    """
    path = cache_directory() / "measured" / f"{name}-{fingerprint(calibration)}.json"
    found = calibration.processes.from_first(read(path, list))
    if found is not None:
        return found
    measured = compute(calibration)
    keep(path, measured, calibration.processes)
    return measured


def read(path: Path, kind: type[T] | type[dict[str, float]]) -> Any:
    """What `keep` wrote to ``path``; None where nothing of that ``kind`` lies there."""
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except InputError:
        found = None
    if not isinstance(found, kind):
        log.warning("%s does not hold measured figures; measuring anew", path)
        return None
    log.info("measured figures read from %s", path)
    return found


def keep(path: Path, figures: Any, processes: Processes) -> None:
    """Write ``figures`` to ``path``, the first of ``processes``; a warning where that cannot be."""
    if not processes.first:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, figures)
    except OSError as error:  # a full disk, or one that is only read: the figures are at hand
        log.warning(
            "%s cannot be written (%s): another run measures its figures anew", path, error.strerror
        )


def fingerprint(calibration: Calibration, more: Sequence[Any] = ()) -> str:
    """A digest of the weights in their order, of where and how they compute, and of the tokens.

    ``more`` is what else counts. Of weights in files their names, sizes and times count.
    """
    layers, windows = calibration.layers, calibration.windows
    digest = hashlib.sha256(windows.cpu().numpy().tobytes())
    digest.update(repr([layers.device.type, bf16_is_fast(layers.device), *more]).encode())
    for name, what in layers.identity():
        if isinstance(what, str):
            digest.update(repr([name, what]).encode())
            continue
        digest.update(repr([name, tuple(what.shape), str(what.dtype)]).encode())
        values = what.detach()
        # of a matrix the sums of its rows and of its columns: they change when two are exchanged
        sums = [values.sum(d, dtype=torch.float64) for d in range(values.dim())]
        for part in sums if values.dim() > 1 else [values]:
            digest.update(part.double().cpu().numpy().tobytes())
    return digest.hexdigest()
