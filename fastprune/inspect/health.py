"""What is wrong inside weights: values that are not finite, zeros, outliers, tensor by tensor.

One pass of the `scan` kernel per tensor, the same for weights in files, which are read piece by
piece and never build a model, and for those of a model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import NumericalError
from fastprune.kernels.ops import FLOATS, ScanResult, scan, scan_all, taylor
from fastprune.kernels.reference import SIGMAS
from fastprune.messages import Message
from fastprune.models.shards import DTYPES, ShardReader
from fastprune.progress import track

PIECE_BYTES = 64 * 2**20
"""Of a tensor in a file, so much is in memory at a time."""
SLICE = 2**20
"""Values of a piece looked at in one go where temporary copies are made of them."""
NAMED = 3
"""Tensors that a message names before it says "and more"."""


@dataclass(frozen=True)
class Weight:
    """A tensor to be scanned. ``pieces`` yields it in runs of rows, anew at every call; None when
    its dtype (integers of a quantised model, say) is not one that is scanned."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: Callable[[], Iterable[Tensor]] | None


@dataclass(frozen=True)
class TensorHealth:
    """What the scan found in one tensor; ``scan`` is None where the dtype is not scanned.

    ``zero_rows`` (rows,) and ``zero_columns`` (columns,) say which are zero throughout, where that
    was asked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scan: ScanResult | None
    zero_rows: Tensor | None = None
    zero_columns: Tensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def finite(self) -> bool:
        return self.scan is None or not (self.scan.nan or self.scan.inf)

    @property
    def std(self) -> float:
        """Standard deviation of the finite values; NaN if there are none."""
        if self.scan is None:
            return math.nan
        return math.sqrt(max(0.0, self.scan.second_moment - self.scan.mean**2))

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON-ready data; NaN where there is no finite value."""
        facts = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}
        if self.scan is None:
            return facts
        found = self.scan._asdict()
        del found["numel"], found["second_moment"]
        return {**facts, **found, "std": self.std}


def check_weights(model: nn.Module) -> None:
    """Raise NumericalError, naming the first tensors, when a weight of ``model`` is NaN or Inf.

    Parameters and buffers of every device, tied ones once, in one pass and one wait per device. Of
    a sharded parameter this process's part is looked at.
    """
    bad = [health for health in scan_model(model) if not health.finite]
    if bad:
        raise NumericalError(
            Message(
                "the weights are broken: {what}; nothing can be computed with them, go back to the "
                "last good checkpoint",
                what=describe_broken(bad),
            )
        )


def unsound(model: nn.Module, what: str, autocast: torch.dtype | None = None) -> NumericalError:
    """The error to raise when ``what``, computed by ``model``, is NaN or Inf."""
    return NumericalError(why_unsound(model, what, autocast))


def why_unsound(model: nn.Module, what: str, autocast: torch.dtype | None = None) -> Message:
    """Why ``what``, computed by ``model``, is NaN or Inf, and what to do.

    Weights that are NaN or Inf are to blame where there are any, else the range of the dtype that
    was computed in: that of ``autocast`` where one was in force, else the weights'.
    """
    parameters = list(model.parameters())
    bad = [health for health in scan_model(model) if not health.finite]
    half = torch.float16 in (autocast, *(p.dtype for p in parameters))
    dtype = "float16" if half else _name(parameters[0].dtype)
    remedy = Message("use --dtype bfloat16 or float32")
    if autocast == torch.float16:
        remedy = Message("use --precision bf16 or fp32")
    if bad and not (half and all(h.scan is not None and not h.scan.nan for h in bad)):
        why = Message(
            "the weights hold {what}; go back to the last good checkpoint",
            what=describe_broken(bad),
        )
    elif bad:
        why = Message(
            "the weights overflow in float16; {remedy} ({what})",
            remedy=remedy,
            what=describe_broken(bad),
        )
    elif any(p.is_meta for p in parameters):
        why = Message(
            "the weights are broken, or the model overflows in {dtype}; {remedy}",
            dtype=dtype,
            remedy=remedy if half else Message("fastprune diagnose MODEL tells which"),
        )
    elif half:
        why = Message(
            "the model overflows in float16; {remedy} (every weight is finite, but some "
            "activations exceed 65504)",
            remedy=remedy,
        )
    else:
        why = Message(
            "the model overflows in {dtype}, though every weight is finite; fastprune diagnose "
            "MODEL names the layer",
            dtype=dtype,
        )
    return Message("{what} came out as NaN or Inf: {why}", what=what, why=why)


def describe_broken(tensors: Sequence[TensorHealth]) -> Message:
    """The ``tensors``, which hold NaN or Inf, in one line: how much of it, and where."""
    scans = [health.scan for health in tensors if health.scan is not None]
    nan, inf = (sum(getattr(s, kind) for s in scans) for kind in ("nan", "inf"))
    what = f"{nan:,} NaN" if nan else f"{inf:,} Inf"
    if nan and inf:
        what = Message("{nan:,} NaN and {inf:,} Inf", nan=nan, inf=inf)
    names = named([health.name for health in tensors])
    return Message("{what} in {names}", what=what, names=names)


def named(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    few = ", ".join(names[:NAMED])
    if len(names) <= NAMED:
        return few
    return Message("{few} and {more} more", few=few, more=len(names) - NAMED)


def scan_model(model: nn.Module) -> list[TensorHealth]:
    """Health of the parameters and buffers of ``model``; those without values are left out."""
    tensors = {
        name: local
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if (local := _local(tensor)).is_floating_point() and not local.is_meta
    }
    found = []
    for device in dict.fromkeys(tensor.device for tensor in tensors.values()):
        here = {name: t for name, t in tensors.items() if t.device == device}
        for (name, t), result in zip(
            here.items(), scan_all([_scannable(t) for t in here.values()])
        ):
            found.append(TensorHealth(name, tuple(t.shape), _name(t.dtype), result))
    return found


def scan_weights(
    weights: Sequence[Weight], lines: Callable[[str], bool] = lambda name: False
) -> list[TensorHealth]:
    """Health of every tensor in ``weights``; with zero rows and columns where ``lines(name)``."""
    found = []
    for weight in track(weights, "scanning"):
        facts = (weight.name, weight.shape, weight.dtype)
        if weight.pieces is None:
            found.append(TensorHealth(*facts, None))
        else:
            found.append(TensorHealth(*facts, *_scan_pieces(weight.pieces, lines(weight.name))))
    return found


def stored_weights(reader: ShardReader, piece_bytes: int = PIECE_BYTES) -> list[Weight]:
    """The tensors of a folder, one piece at a time in memory."""
    return [
        Weight(
            name,
            entry.shape,
            _name(DTYPES[entry.dtype]) if entry.dtype in DTYPES else entry.dtype.lower(),
            partial(reader.pieces, name, piece_bytes) if entry.dtype in DTYPES else None,
        )
        for name, entry in reader.entries.items()
    ]


def model_weights(model: nn.Module) -> list[Weight]:
    """The parameters of ``model``, tied ones once."""
    return [
        Weight(name, tuple(p.shape), _name(p.dtype), partial(_whole, p) if _floats(p) else None)
        for name, p in model.named_parameters()
    ]


def _whole(parameter: Tensor) -> Iterator[Tensor]:
    yield parameter.detach()


def _floats(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS or tensor.dtype == torch.float64


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _scannable(tensor: Tensor) -> Tensor:
    """In a dtype that the kernel reads: what overflows float32 is as good as infinite here."""
    return tensor if tensor.dtype in FLOATS else tensor.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scan_pieces(
    pieces: Callable[[], Iterable[Tensor]], lines: bool
) -> tuple[ScanResult, Tensor | None, Tensor | None]:
    parts: list[ScanResult] = []
    rows: list[Tensor] = []
    columns: Tensor | None = None
    for piece in pieces():
        piece = _scannable(piece)
        parts.append(scan(piece))
        if lines and piece.ndim in (1, 2) and piece.numel():
            # The sum of |w| is zero exactly where all of them are: it has no cancellation.
            row_sums, column_sums = taylor(piece, kind="l1")
            rows.append(row_sums == 0)
            zero = column_sums == 0
            columns = zero if columns is None else columns & zero
    if len(parts) == 1:
        whole = parts[0]
    else:
        whole = _combined(parts)
        whole = whole._replace(outliers=_outliers(pieces, parts, whole))
    return whole, torch.cat(rows) if rows else None, columns


def _combined(parts: Sequence[ScanResult]) -> ScanResult:
    """The scan of a tensor out of those of its pieces, but for the outliers."""
    counts: dict[str, Any] = {
        name: sum(getattr(p, name) for p in parts) for name in ("nan", "inf", "zeros", "numel")
    }
    finite = [(p, p.numel - p.nan - p.inf) for p in parts if p.numel > p.nan + p.inf]
    total = sum(n for _, n in finite)
    if not total:
        nothing: dict[str, Any] = dict.fromkeys(
            ("min", "max", "absmax", "mean", "second_moment"), math.nan
        )
        return ScanResult(outliers=0, **counts, **nothing)
    return ScanResult(
        outliers=0,
        min=min(p.min for p, _ in finite),
        max=max(p.max for p, _ in finite),
        absmax=max(p.absmax for p, _ in finite),
        mean=math.fsum(p.mean * (n / total) for p, n in finite),
        second_moment=math.fsum(p.second_moment * (n / total) for p, n in finite),
        **counts,
    )


def _outliers(
    pieces: Callable[[], Iterable[Tensor]], parts: Sequence[ScanResult], whole: ScanResult
) -> int:
    """Values beyond 6 sigma of the whole tensor, in a second reading of the pieces that reach so
    far."""
    if whole.min == whole.max:
        return 0
    limit = SIGMAS * math.sqrt(max(0.0, whole.second_moment - whole.mean**2))
    far = [p.max - whole.mean > limit or whole.mean - p.min > limit for p in parts]
    if not any(far):
        return 0
    count = 0
    for piece, reaches in zip(pieces(), far):
        if reaches:
            for values in _scannable(piece).flatten().split(SLICE):
                distance = (values.double() - whole.mean).abs()
                count += int(((distance > limit) & distance.isfinite()).sum())
    return count
