"""The kernels as eager functions; attention.py has the one that can be differentiated.

They check their arguments (ValueError names the culprit), allocate results and
workspaces, and call the compiled module as declarations.py says, or reference.py where that does
not serve the device. None is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastprune.kernels import reference
from fastprune.kernels.backend import compiled
from fastprune.kernels.checks import (
    FLOATS,
    check_apart,
    check_tensor,
    check_written,
    dense,
    inner_contiguous,
)
from fastprune.kernels.declarations import (
    CROSS_ENTROPY,
    GATHER,
    SCAN,
    TAYLOR,
    AdamWBuffers,
    AdamWRule,
)
from fastprune.kernels.reference import KINDS, SCAN_FIELDS, SIGMAS

MASTERS = ("fp32", "stochastic", "none")
_READS_G = ("first", "mix", "vector")
_READS_H = ("second", "mix")
_NARROW = 4e-4
"""Where the variance is a smaller part of the second moment, rounding of the latter, 4e-6 at the
worst, would make up more than a hundredth of the variance."""
_SLICE = 2**20
"""Values that are copied in float64 at a time."""


class ScanResult(NamedTuple):
    """Health of a tensor. Extremes and moments are over its finite values, NaN if there are none;
    outliers lie further than 6 standard deviations from the mean."""

    nan: int
    inf: int
    zeros: int
    outliers: int
    min: float
    max: float
    absmax: float
    mean: float
    second_moment: float
    numel: int


# ---------------------------------------------------------------------------- taylor


def taylor(
    w: Tensor,
    g: Tensor | None = None,
    h: Tensor | None = None,
    *,
    x: Tensor | None = None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Scores of the rows and columns of a weight in one pass over it.

    Args:
        w: weight (out, in), or (n,) which counts as (n, 1); float32, bfloat16 or float16.
        g: gradient, like w.
        h: diagonal Fisher estimate, like w (float32 also allowed); None means g * g.
        x: norms of the input columns (in,), float32; kind "activation" only.
        kind: per weight, first |w g|, second |w^2 h|, mix |w g - w^2 h / 2|, vector w g (signed),
            l1 |w|, l2 w^2, activation |w| x.

    Returns:
        rows (out,) and cols (in,), float32: sums over columns and over rows, accumulated in
        float32 in an order that depends on the shape only.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or no memory.
    """
    _check_taylor(w, g, h, x, kind)
    module = compiled(w.device)
    if module is None:
        return reference.taylor(w, g, h, x=x, kind=kind)
    out, columns = w.shape[0], w.shape[1] if w.ndim == 2 else 1
    # A vector is faster as one long row; its two results change places.
    as_row = columns == 1 and kind != "activation"
    shape = (1, out) if as_row else (out, columns)
    w, g, h = (None if t is None else inner_contiguous(t, shape) for t in (w, g, h))
    x = None if x is None else dense(x)
    rows = torch.empty(shape[0], dtype=torch.float32, device=w.device)
    cols = torch.empty(shape[1], dtype=torch.float32, device=w.device)
    TAYLOR.run(module, w.device, w=w, g=g, h=h, x=x, kind=kind, rows=rows, cols=cols)
    return (cols, rows) if as_row else (rows, cols)


def _check_taylor(
    w: Tensor, g: Tensor | None, h: Tensor | None, x: Tensor | None, kind: str
) -> None:
    if kind not in KINDS:
        raise ValueError(f"taylor: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    _check_float("taylor", "w", w)
    if w.ndim not in (1, 2):
        raise ValueError(f"taylor: w must have 1 or 2 dimensions, not shape {tuple(w.shape)}")
    needs_g = kind in _READS_G or (kind == "second" and h is None)
    _check_presence("taylor", kind, "g", g, needs_g)
    if h is not None or kind not in _READS_H:
        _check_presence("taylor", kind, "h", h, kind in _READS_H)
    _check_presence("taylor", kind, "x", x, kind == "activation")
    for name, t, dtypes in (("g", g, (w.dtype,)), ("h", h, (w.dtype, torch.float32))):
        if t is not None:
            check_tensor("taylor", name, t, dtypes, w.device, tuple(w.shape))
    if x is not None:
        columns = w.shape[1] if w.ndim == 2 else 1
        check_tensor("taylor", "x", x, (torch.float32,), w.device, (columns,))


# ---------------------------------------------------------------------------- gather


def gather(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Kept rows or columns of many tensors in one parallel loop or launch.

    Args:
        tensors: 1-D or 2-D, all on one device; floats of 16 to 64 bits, signed integers, bytes or
            booleans.
        indices: per tensor, the kept positions: int64 on the CPU, strictly ascending.
        dims: per tensor, 0 (rows) or 1 (columns).
        out: results to fill instead of new tensors: contiguous, of the right shapes, apart from
            `tensors`, `indices` and each other in memory.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or no memory.
    """
    if not len(tensors) == len(indices) == len(dims):
        raise ValueError(
            f"gather: {len(tensors)} tensors, {len(indices)} indices and {len(dims)} dims differ"
        )
    if out is not None and len(out) != len(tensors):
        raise ValueError(f"gather: {len(tensors)} tensors, but {len(out)} results to fill")
    for number, (t, index, dim) in enumerate(zip(tensors, indices, dims)):
        _check_gather(number, t, index, dim, tensors[0].device)
    if not tensors:
        return []
    device = tensors[0].device
    for number, filled in enumerate(out or []):
        check_tensor("gather", f"result {number}", filled, None, device, None)
        check_written("gather", f"result {number}", filled)
    module = compiled(device)
    if module is None:
        _check_kept(tensors, indices, dims, out or [])
        results = reference.gather(tensors, indices, dims)
        if out is None:
            return results
        for number, (result, filled) in enumerate(zip(results, out)):
            shape = tuple(result.shape)
            check_tensor("gather", f"result {number}", filled, (result.dtype,), device, shape)
        for result, filled in zip(results, out):
            filled.copy_(result)
        return list(out)
    fresh = out is None
    if out is None:
        out = [_gathered(t, index, dim) for t, index, dim in zip(tensors, indices, dims)]
    tensors = [inner_contiguous(t, tuple(t.shape)) for t in tensors]
    indices, dims, out = [dense(i) for i in indices], list(dims), list(out)
    GATHER.run(module, device, tensors=tensors, indices=indices, dims=dims, fresh=fresh, out=out)
    torch.autograd.graph.increment_version(out)
    return out


def _check_gather(number: int, t: Tensor, index: Tensor, dim: int, device: torch.device) -> None:
    check_tensor("gather", f"tensor {number}", t, None, device, None)
    check_tensor("gather", f"index {number}", index, (torch.int64,), torch.device("cpu"), None)
    if t.dtype.is_complex or t.is_quantized:
        raise ValueError(f"gather: tensor {number} must be real, not {t.dtype}")
    if t.ndim not in (1, 2) or not 0 <= dim < t.ndim:
        raise ValueError(f"gather: dim is {dim} for tensor {number} of shape {tuple(t.shape)}")
    if index.ndim != 1:
        raise ValueError(f"gather: index {number} must have 1 dimension, not {tuple(index.shape)}")


def _check_kept(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    out: Sequence[Tensor],
) -> None:
    """What the compiled kernels check by themselves."""
    for number, (t, index, dim) in enumerate(zip(tensors, indices, dims)):
        if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= t.shape[dim]):
            raise ValueError(
                f"gather: index {number} reaches beyond dimension {dim} of shape {tuple(t.shape)}"
            )
        if not bool((index[1:] > index[:-1]).all()):
            raise ValueError(f"gather: index {number} must be ascending")
    read = {f"tensor {number}": t for number, t in enumerate(tensors)}
    read |= {f"index {number}": t for number, t in enumerate(indices)}
    check_apart("gather", {f"result {number}": t for number, t in enumerate(out)}, read)


def _gathered(t: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = index.shape[0]
    return torch.empty(shape, dtype=t.dtype, device=t.device)


# ---------------------------------------------------------------------------- scan


def scan(x: Tensor) -> ScanResult:
    """Health of one tensor in one pass. Waits for the device."""
    return scan_all([x])[0]


def scan_all(tensors: Sequence[Tensor]) -> list[ScanResult]:
    """Health of tensors of one device in one go: one wait for the device.

    Raises:
        ValueError: a tensor is not float32, bfloat16 or float16, or is on another device.
    """
    if not tensors:
        return []
    return [_scan_result(x, row) for x, row in zip(tensors, scan_table(tensors).tolist())]


def scan_table(tensors: Sequence[Tensor]) -> Tensor:
    """scan_all without the wait: (tensors, 10) float64, a row per tensor as in ScanResult.

    Outliers are told by the difference of two moments, which is not to be relied on where values
    differ little from each other; scan_all looks at such a tensor again.
    """
    for number, t in enumerate(tensors):
        _check_float("scan", f"tensor {number}", t)
        check_tensor("scan", f"tensor {number}", t, None, tensors[0].device, None)
    device = tensors[0].device
    module = compiled(device)
    if module is None:
        return reference.scan(tensors)
    tensors = [dense(t) for t in tensors]
    out = torch.empty(len(tensors), SCAN_FIELDS, dtype=torch.float64, device=device)
    SCAN.run(module, device, tensors=tensors, out=out)
    return out


def _scan_result(x: Tensor, row: list[float]) -> ScanResult:
    found = ScanResult._make([*map(int, row[:4]), *row[4:9], int(row[9])])
    if found.min == found.max:
        return found._replace(outliers=0)
    variance = found.second_moment - found.mean**2
    return _looked_at_again(x, found) if variance < _NARROW * found.second_moment else found


def _looked_at_again(x: Tensor, found: ScanResult) -> ScanResult:
    """``found`` with moments and outliers in float64, by distances from the smallest value."""
    low, count = found.min, found.numel - found.nan - found.inf
    moments = torch.zeros(2, dtype=torch.float64, device=x.device)
    for distance in _distances(x, low):
        moments += torch.stack([distance.sum(), distance.square().sum()])
    mean, second = (moments / count).tolist()
    variance = max(0.0, second - mean**2)
    limit = SIGMAS * math.sqrt(variance)
    outliers = 0
    if max(mean, found.max - low - mean) > limit:
        outliers = sum(int(((d - mean).abs() > limit).sum()) for d in _distances(x, low))
    mean += low
    return found._replace(outliers=outliers, mean=mean, second_moment=variance + mean**2)


def _distances(x: Tensor, origin: float) -> Iterator[Tensor]:
    """The finite values of ``x`` as seen from ``origin``, float64, a slice at a time."""
    for values in x.detach().flatten().split(_SLICE):
        yield values[values.isfinite()].double() - origin


# ---------------------------------------------------------------------------- adamw


def adamw_states(device: torch.device) -> reference.AdamWStates:
    """What adamw_step wants as `states`. Call its sync() with one dict per parameter before each
    step: "exp_avg" and "exp_avg_sq", float32, laid out like the weight (None until the parameter
    has a gradient), and "master", float32, where `master` is "fp32" and the weight is not."""
    module = compiled(device)
    return reference.AdamWStates() if module is None else module.AdamWStates()


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor | None],
    states: reference.AdamWStates,
    group_of: list[int],
    groups: list[list[float]],
    buffers: AdamWBuffers,
    rule: AdamWRule,
) -> reference.AdamWStep:
    """One optimizer step over tensors of one device, as an object with two passes.

    Call norms(), then (after adding other processes' or devices' totals into `buffers.total`)
    update(). All tensors are changed in place; no pass waits for the device. The object is meant
    for one step: a parameter that is moved meanwhile would not be noticed.

    Args:
        params: n weights; float32, bfloat16 or float16; each fills one block of memory.
        grads: n gradients laid out like the weights; None leaves a parameter out of this step.
        states: of adamw_states(), in sync.
        group_of: n indices into `groups`, which holds [lr, beta1, beta2, eps, weight_decay].
        buffers: counters and results, and the workspace of these parameters.
        rule: what is the same for all groups.
    """
    module = compiled(buffers.total.device)
    step = reference.AdamWStep if module is None else module.AdamWStep
    return step(params, grads, states, group_of, groups, buffers, rule)


def adamw_workspace(params: list[Tensor]) -> Tensor:
    """A workspace for adamw_step over these parameters or any part of them."""
    device = params[0].device
    module = compiled(device)
    size = 0 if module is None else module.adamw_workspace(params)
    return torch.empty(size, dtype=torch.uint8, device=device)


# ---------------------------------------------------------------------------- cross_entropy


def cross_entropy(
    logits: Tensor, targets: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row of logits in one pass, and in a second one its gradient in place.

    Args:
        logits: (rows, vocabulary), float32, bfloat16 or float16.
        targets: (rows,) int64, words of the vocabulary; -100 is not scored.
        scale: the logits are overwritten by scale * (softmax(logits) - onehot(targets)), the
            gradient of scale * loss.sum(), in their own dtype. None leaves them as they are.

    Returns:
        loss (rows,) and log-normalisers log(sum(exp(logits))) (rows,), float32, computed in
        float32. A row that is not scored has loss and gradient 0. NaN or +inf in a row makes all of
        it NaN.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or no memory; a target is out of
            range, on the CPU (on CUDA that would mean to wait: the row becomes NaN instead); logits
            to be overwritten do not have inner stride 1, or overlap.
    """
    _check_cross_entropy(logits, targets, scale)
    module = compiled(logits.device)
    if module is None:
        _check_targets(targets, logits.shape[1])
        if scale is not None:
            check_apart("cross_entropy", {"logits": logits}, {"targets": targets})
        return reference.cross_entropy(logits, targets, scale=scale)
    rows = logits.shape[0]
    if scale is None:
        logits = inner_contiguous(logits, tuple(logits.shape))
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    log_normaliser = torch.empty_like(loss)
    CROSS_ENTROPY.run(
        module, logits.device, logits=logits, targets=dense(targets), scale=scale, loss=loss,
        log_normaliser=log_normaliser,
    )  # fmt: skip
    if scale is not None:
        torch.autograd.graph.increment_version(logits)
    return loss, log_normaliser


def _check_cross_entropy(logits: Tensor, targets: Tensor, scale: float | None) -> None:
    _check_float("cross_entropy", "logits", logits)
    if logits.ndim != 2:
        raise ValueError(
            f"cross_entropy: logits must have 2 dimensions, not shape {tuple(logits.shape)}"
        )
    rows, vocabulary = logits.shape
    check_tensor("cross_entropy", "targets", targets, (torch.int64,), logits.device, (rows,))
    strided = vocabulary > 1 and logits.stride(1) != 1
    overlapping = rows > 1 and logits.stride(0) < vocabulary
    if scale is not None and (strided or overlapping or logits.is_neg()):
        raise ValueError(
            "cross_entropy: logits can be overwritten only where each row is contiguous and "
            f"overlaps no other, not with strides {logits.stride()}"
        )


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    """What the compiled kernels check by themselves."""
    known = (targets >= 0) & (targets < vocabulary) | (targets == reference.IGNORED)
    if not bool(known.all()):
        row = int((~known).nonzero()[0])
        raise ValueError(
            f"cross_entropy: the target of row {row} is {int(targets[row])}, neither a word of a "
            f"vocabulary of {vocabulary} nor {reference.IGNORED}"
        )


# ---------------------------------------------------------------------------- checks


def _check_float(op: str, name: str, t: Tensor) -> None:
    check_tensor(op, name, t, FLOATS, None, None)


def _check_presence(op: str, kind: str, name: str, t: Tensor | None, needed: bool) -> None:
    if (t is not None) != needed:
        raise ValueError(f"{op}: kind {kind!r} {'needs' if needed else 'does not use'} {name}")
