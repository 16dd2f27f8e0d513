"""Right calls of every binding, with random tensors, and what they must give."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastprune.kernels import reference
from fastprune.kernels.declarations import AdamWBuffers, AdamWRule

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COPIED = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool)
DTYPES = (*COPIED, torch.uint8, torch.uint16, torch.float8_e4m3fn, torch.complex64)
SIZES = (0, 1, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 100, 257)
LARGE = (400, 515, 1000)
"""Sizes at which the work of an op is split over threads."""
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
Found = tuple[Tensor, Tensor, float]
"""What a call gave, what it should have given, and the tolerance, absolute and relative."""


class Draw:
    """The random choices of one example. Tensors lie inside larger blocks of memory."""

    def __init__(self, seed: int, large: float) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = LARGE if self.random.random() < large else SIZES
        self.blocks: list[Tensor] = []

    def choice(self, values: Any) -> Any:
        return self.random.choice(values)

    def size(self) -> int:
        return self.choice(self.sizes)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, gaps: bool = False) -> Tensor:
        """Random values; with `gaps`, there may be some between the rows."""
        strides, step = [], 1
        for place, length in enumerate(reversed(shape)):
            strides.insert(0, step)
            step = step * max(1, length) + (self.choice((0, 0, 1, 5)) if gaps and not place else 0)
        offset = self.choice((0, 1, 3, 16))
        values = 3 * torch.randn(offset + step + 16, generator=self.generator)
        self.blocks.append(values > 0 if dtype == torch.bool else values.to(dtype))
        return self.blocks[-1].as_strided(shape, strides, offset)

    def positive(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return self.tensor(shape, dtype).abs_()

    def workspace(self, size: int) -> Tensor:
        """A workspace begins where torch begins new memory."""
        self.blocks.append(torch.zeros(size + 64, dtype=torch.uint8))
        return self.blocks[-1][:size]

    def kept(self, length: int) -> Tensor:
        """Ascending positions below `length`."""
        chosen = sorted(self.random.sample(range(length), self.random.randint(0, length)))
        index = self.tensor((len(chosen),), torch.int64)
        return index.copy_(torch.tensor(chosen, dtype=torch.int64))


@dataclass
class Call:
    """A call of the function `run` with `arguments`, of which those named in `written` change.

    `compare` takes the arguments after the call and a copy of them from before it.
    """

    name: str
    run: Callable[..., Any]
    arguments: dict[str, Any]
    written: tuple[str, ...]
    compare: Callable[[dict[str, Any], dict[str, Any]], Iterator[Found]]
    overlaps: bool = True
    """whether memory that arguments share is refused where it is written"""
    spoiled: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------- calls of each op


def taylor(module: Any, draw: Draw) -> Call:
    shape = (draw.size(), draw.size()) if draw.random.random() < 0.8 else (draw.size(),)
    rows, columns = shape[0], shape[1] if len(shape) == 2 else 1
    dtype, kind = draw.choice(FLOATS), draw.choice(reference.KINDS)
    with_h = kind in ("second", "mix") and draw.choice((True, False))
    with_g = kind in ("first", "mix", "vector") or (kind == "second" and not with_h)
    arguments = {
        "w": draw.tensor(shape, dtype, gaps=True),
        "g": draw.tensor(shape, dtype, gaps=True) if with_g else None,
        "h": draw.tensor(shape, draw.choice((dtype, torch.float32)), gaps=True) if with_h else None,
        "x": draw.positive((columns,)) if kind == "activation" else None,
        "kind": kind,
        "rows": draw.tensor((rows,), torch.float32),
        "cols": draw.tensor((columns,), torch.float32),
    }
    arguments["workspace"] = draw.workspace(module.taylor_workspace(arguments["w"]))

    def compare(now: dict[str, Any], before: dict[str, Any]) -> Iterator[Found]:
        inputs = {name: before[name] for name in ("w", "g", "h", "x", "kind")}
        if inputs["x"] is not None:
            inputs["x"] = inputs["x"].flatten()
        true = reference.taylor(**inputs, compute=torch.float64)
        # fp32 sums of at most 1000 terms, each of which is below 3000 (values are below 15)
        for name, sums in zip(("rows", "cols"), true):
            yield now[name].flatten()[: len(sums)], sums, 1e-2 if kind in SIGNED else 1e-5

    return Call("taylor", module.taylor, arguments, ("rows", "cols", "workspace"), compare)


SIGNED = ("vector",)
"""Scores whose terms cancel: the error is that of the terms, not of their sum."""


def gather(module: Any, draw: Draw) -> Call:
    tensors, indices, dims, out = [], [], [], []
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        shape = draw.choice(((draw.size(),), (draw.size(), draw.size())))
        dtype, dim = draw.choice(COPIED), draw.choice(range(len(shape)))
        index = draw.kept(shape[dim])
        result = tuple(len(index) if d == dim else n for d, n in enumerate(shape))
        tensors.append(draw.tensor(shape, dtype, gaps=True))
        indices.append(index)
        dims.append(dim)
        out.append(draw.tensor(result, dtype))
    arguments = {
        "tensors": tensors,
        "indices": indices,
        "dims": dims,
        "fresh": draw.choice((True, False)),
        "out": out,
        "workspace": draw.choice((None, draw.workspace(64))),
    }

    def compare(now: dict[str, Any], before: dict[str, Any]) -> Iterator[Found]:
        inputs = (before["tensors"], before["indices"], before["dims"])
        for result, true in zip(now["out"], reference.gather(*inputs), strict=True):
            yield result, true, 0.0

    return Call("gather", module.gather, arguments, ("out", "workspace"), compare)


def scan(module: Any, draw: Draw) -> Call:
    tensors = []
    for _ in range(draw.choice((0, 1, 1, 3))):
        shape = tuple(draw.size() for _ in range(draw.choice((0, 1, 2))))
        tensors.append(draw.tensor(shape, draw.choice(FLOATS)))
        if draw.random.random() < 0.2:
            tensors[-1].flatten()[:: draw.choice((1, 3))] = draw.choice((0, math.nan, math.inf))
    arguments = {
        "tensors": tensors,
        "out": draw.tensor((len(tensors), reference.SCAN_FIELDS), torch.float64),
        "workspace": draw.workspace(module.scan_workspace(tensors)),
    }

    def compare(now: dict[str, Any], before: dict[str, Any]) -> Iterator[Found]:
        rows = now["out"].flatten()[: len(tensors) * 10].view(-1, 10)
        for row, tensor in zip(rows, before["tensors"], strict=True):
            true = reference.scan([tensor])[0]
            counts = [0, 1, 2, 4, 5, 6, 9] + [3] * bool(true[4] < true[5])
            yield row[counts], true[counts], 0.0
            # fp32 sums of 64 values a lane
            yield row[[7, 8]], true[[7, 8]], 1e-5 * (1 + float(true[8].nan_to_num()))

    return Call("scan", module.scan, arguments, ("out", "workspace"), compare)


def cross_entropy(module: Any, draw: Draw) -> Call:
    rows, vocabulary, dtype = draw.size(), draw.size(), draw.choice(FLOATS)
    words = torch.randint(-1, max(1, vocabulary), (rows,), generator=draw.generator)
    targets = torch.where((words < 0) | (vocabulary == 0), reference.IGNORED, words)
    arguments = {
        "logits": draw.tensor((rows, vocabulary), dtype, gaps=True),
        "targets": draw.tensor((rows,), torch.int64).copy_(targets),
        "scale": draw.choice((None, 1.0, 0.37)),
        "loss": draw.tensor((rows,), torch.float32),
        "log_normaliser": draw.tensor((rows,), torch.float32),
    }

    def compare(now: dict[str, Any], before: dict[str, Any]) -> Iterator[Found]:
        if before["logits"].shape[1] == 0:  # a sum of nothing, of which torch has no largest value
            return
        logits, scale = before["logits"].double(), before["scale"]
        targets = before["targets"].flatten()[: len(logits)]
        true = reference.cross_entropy(logits, targets, scale=scale, compute=torch.float64)
        for name, values in zip(("loss", "log_normaliser"), true):
            yield now[name].flatten()[: len(values)], values, 1e-5
        rounding = 0.0 if scale is None else 1e-5 + ULP[now["logits"].dtype] * abs(scale)
        yield now["logits"], logits, rounding

    written = ("logits", "loss", "log_normaliser")
    return Call("cross_entropy", module.cross_entropy, arguments, written, compare)


def adamw(module: Any, draw: Draw) -> Call:
    master = draw.choice(("fp32", "stochastic", "none"))
    params, grads, states = [], [], []
    for _ in range(draw.choice((1, 1, 2, 5))):
        shape, dtype = (draw.size(), draw.size()), draw.choice(FLOATS)
        params.append(draw.tensor(shape, dtype))
        grads.append(draw.choice((draw.tensor(shape, draw.choice(FLOATS)), None)))
        moments = {"exp_avg": draw.tensor(shape, torch.float32), "exp_avg_sq": draw.positive(shape)}
        if master == "fp32" and dtype != torch.float32:
            moments["master"] = draw.tensor(shape, torch.float32)
        states.append(moments)
    n = len(params)
    buffers = AdamWBuffers(
        steps=draw.tensor((n,), torch.int64).random_(0, 1000, generator=draw.generator),
        stats=draw.tensor((n, 2), torch.float64),
        total=draw.tensor((2,), torch.float64),
        control=draw.tensor((3,), torch.float64).copy_(torch.tensor([8.0, 0.0, 0.0])),
        workspace=draw.workspace(module.adamw_workspace(params)),
    )
    rule = AdamWRule(draw.choice((0.0, 1.0)), master, draw.choice((0, 2**40 + 1)), 2.0, 0.5, 2)
    arguments = {
        "params": params,
        "grads": grads,
        "states": states,
        "group_of": [draw.choice((0, 1)) for _ in range(n)],
        "groups": [[1e-3, 0.9, 0.99, 1e-8, 0.1], [1e-2, 0.8, 0.9, 1e-6, 0.0]],
        "buffers": buffers,
        "rule": rule,
    }

    def run(states: Any, **others: Any) -> None:
        held = module.AdamWStates()
        held.sync(states)
        step = module.AdamWStep(states=held, **others)
        step.misfits()
        step.norms()
        step.update()

    written = ("params", "states", "buffers")
    return Call("adamw", run, arguments, written, _compare_adamw, overlaps=False)


def _compare_adamw(now: dict[str, Any], before: dict[str, Any]) -> Iterator[Found]:
    old = before["buffers"]
    slots = old.steps.numel()
    flat = {name: getattr(old, name).flatten() for name in old._fields}
    flat["stats"] = flat["stats"][: 2 * slots].view(-1, 2)
    buffers = AdamWBuffers(**flat | {"total": flat["total"][:2], "control": flat["control"][:3]})
    held = reference.AdamWStates()
    held.sync(before["states"])
    step = reference.AdamWStep(**before | {"states": held, "buffers": buffers})
    step.norms()
    step.update()
    for p, true in zip(now["params"], before["params"]):
        yield p, true, 1e-4 + ULP[true.dtype]
    for ours, true in zip(now["states"], before["states"]):
        yield from ((ours[key], true[key], 1e-4) for key in true)
    for name in ("steps", "stats", "total", "control"):
        true = getattr(buffers, name).flatten()
        yield getattr(now["buffers"], name).flatten()[: len(true)], true, 1e-5


def attention(module: Any, draw: Draw) -> Call:
    arguments, _ = _heads(draw)
    arguments["workspace"] = draw.workspace(
        module.attention_workspace(arguments["q"], arguments["k"])
    )

    def compare(now: dict[str, Any], before: dict[str, Any]) -> Iterator[Found]:
        inputs = {name: before[name] for name in ("q", "k", "v", "scale")}
        out, log_sums = reference.attention(**inputs)
        yield now["out"], out, 0.1  # a few roundings to bf16 of values of up to 15
        yield now["log_sums"].flatten()[: log_sums.numel()], log_sums.flatten(), 1e-3

    return Call("attention", module.attention, arguments, ("out", "log_sums", "workspace"), compare)


def attention_backward(module: Any, draw: Draw) -> Call:
    arguments, grad_out = _heads(draw)
    q, k, v = (arguments[name] for name in "qkv")
    out, log_sums = reference.attention(q, k, v, scale=arguments["scale"])
    arguments["out"].copy_(out)
    arguments["log_sums"].copy_(log_sums)
    arguments |= {"grad_out": grad_out}
    arguments |= {f"grad_{name}": draw.tensor(arguments[name].shape, q.dtype) for name in "qkv"}
    size = module.attention_backward_workspace(q, draw.choice((1, 2, 3)))
    arguments["workspace"] = draw.workspace(size)

    def compare(now: dict[str, Any], before: dict[str, Any]) -> Iterator[Found]:
        names = ("grad_out", "q", "k", "v", "out", "log_sums", "scale")
        inputs = {name: before[name] for name in names}
        inputs["log_sums"] = inputs["log_sums"].flatten()[: log_sums.numel()].view_as(log_sums)
        for name, true in zip("qkv", reference.attention_backward(**inputs)):
            yield now[f"grad_{name}"], true, 0.05 * (1 + float(true.float().abs().max()))

    written = ("grad_q", "grad_k", "grad_v", "workspace")
    return Call("attention_backward", module.attention_backward, arguments, written, compare)


def _heads(draw: Draw) -> tuple[dict[str, Any], Tensor]:
    """The arguments of attention but for the workspace, and a gradient of its result."""
    kv_heads, shared, n = draw.choice((1, 2)), draw.choice((1, 3)), draw.choice((1, 5, 63, 64, 130))
    batch, d = draw.choice((1, 2)), draw.choice((16, 32, 80, 256))
    q_shape, k_shape = (batch, kv_heads * shared, n, d), (batch, kv_heads, n, d)
    bf16 = torch.bfloat16
    arguments = {
        "q": draw.tensor(q_shape, bf16, gaps=True),
        "k": draw.tensor(k_shape, bf16, gaps=True),
        "v": draw.tensor(k_shape, bf16, gaps=True),
        "scale": draw.choice((0.02, d**-0.5 / 3)),
        "out": draw.tensor(q_shape, bf16),
        "log_sums": draw.tensor(q_shape[:3], torch.float32),
    }
    return arguments, draw.tensor(q_shape, bf16, gaps=True)


CALLS = (taylor, gather, scan, cross_entropy, adamw, attention, attention_backward)

# ---------------------------------------------------------------------------- arguments

MOST_COPIED = 2**22


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an argument, however deep."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (dict, list, tuple)):
        return []
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in tensors_in(part)]


def copied(value: Any) -> Any:
    """A copy of an argument and its tensors, but for those that are too large for one."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.numel() < MOST_COPIED else value
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, (AdamWBuffers, AdamWRule)):
        return type(value)(*map(copied, value))
    return [copied(part) for part in value] if isinstance(value, list) else value
