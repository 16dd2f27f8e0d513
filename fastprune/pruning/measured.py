"""Figures that take long to measure, kept in the user's cache as soon as they are known.

A run that was cut off goes on with them, and so does another ratio of the same model. A file's name
holds a digest of all that its figures depend on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.models.foreign import cache_directory
from fastprune.models.streamed import StreamedModel
from fastprune.precision import bf16_is_fast
from fastprune.report.run import write_json

log = logging.getLogger("fastprune")

T = TypeVar("T", bound=Sequence[Any])


def remembered(
    name: str,
    model: nn.Module,
    windows: Tensor,
    compute: Callable[[], T],
    source: StreamedModel | None = None,
) -> T:
    """What ``compute`` measures of ``model`` on token ``windows`` (n, s), or has measured before.

    A list, of numbers or of lists, of which only one called ``name`` follows from these. ``source``
    has the weights where ``model`` has sizes only.
    """
    path = cache_directory() / "measured" / f"{name}-{fingerprint(model, windows, source)}.json"
    found = distributed.from_first(read(path, list))
    if found is not None:
        return found
    measured = compute()
    keep(path, measured)
    return measured


def read(path: Path, kind: type[T] | type[dict[str, float]]) -> Any:
    """What `keep` wrote to ``path``; None where nothing of that ``kind`` lies there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, kind):
        log.warning("%s does not hold measured figures; measuring anew", path)
        return None
    log.info("measured figures read from %s", path)
    return found


def keep(path: Path, figures: Any) -> None:
    """Write ``figures`` to ``path``, in the first process."""
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, figures)


def fingerprint(
    model: nn.Module, windows: Tensor, source: StreamedModel | None = None, more: Sequence[Any] = ()
) -> str:
    """A digest of the weights in their order, of where and how they compute, and of the tokens.

    ``more`` is what else counts. Of weights in files their names, sizes and times count.
    """
    device = next(model.parameters()).device if source is None else source.device
    digest = hashlib.sha256(windows.cpu().numpy().tobytes())
    digest.update(repr([device.type, bf16_is_fast(device), *more]).encode())
    if source is not None:
        for file in sorted({entry.file for entry in source.shards.entries.values()}):
            status = file.stat()
            digest.update(repr([str(file), status.st_size, status.st_mtime_ns]).encode())
        digest.update(str(source.dtype).encode())
        return digest.hexdigest()
    for name, parameter in model.named_parameters():
        digest.update(repr([name, tuple(parameter.shape), str(parameter.dtype)]).encode())
        values = parameter.detach()
        # of a matrix the sums of its rows and of its columns: they change when two are exchanged
        sums = [values.sum(d, dtype=torch.float64) for d in range(values.dim())]
        for part in sums if values.dim() > 1 else [values]:
            digest.update(part.double().cpu().numpy().tobytes())
    return digest.hexdigest()
