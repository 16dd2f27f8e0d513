"""What is put in the place of a right argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from calls import COPIED, Call, Draw, tensors_in
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprune.kernels.declarations import AdamWBuffers, AdamWRule

DTYPES = (*COPIED, torch.uint8, torch.uint16, torch.float8_e4m3fn, torch.complex64)


def another_value(draw: Draw, value: Any, others: list[Tensor]) -> Any:
    """Something to put in the place of an argument or an element of one."""
    if isinstance(value, Tensor) and draw.random.random() < 0.8:
        return another_tensor(draw, value, others)
    wrong = [None, -1, 2**31, 2**63, 0, 1.5, math.nan, "x", b"", [], {}, object(), torch.float32]
    return draw.choice([*wrong, *others[:2]])


def another_tensor(draw: Draw, t: Tensor, others: list[Tensor]) -> Any:
    """Like `t` but for its dtype, device, shape, layout or memory; not always a wrong one."""
    with FakeTensorMode():
        fake = torch.empty(t.shape, dtype=t.dtype)
    one = torch.ones((), dtype=torch.uint8).to(t.dtype)
    rows = t.shape[0] if t.ndim else 0
    return draw.choice(
        [
            lambda: t.clone().to(draw.choice(DTYPES)),
            lambda: t.to("meta"),
            lambda: fake if t.numel() else t,
            lambda: t.clone().to_sparse(),
            lambda: t[: rows // 2] if rows else t[None],
            lambda: torch.cat([t.clone(), t.clone()]) if rows else t,
            lambda: t.flatten(),
            lambda: t[None],
            lambda: t.clone().mT if t.ndim > 1 else t[:, None],
            lambda: one.expand(t.shape),
            lambda: one.expand(2**24, 2**24),
            lambda: one.expand(2**31, 2**31),
            lambda: torch.empty(0, 2**62, dtype=t.dtype),
            lambda: torch.empty(2**40, 0, dtype=t.dtype),
            lambda: torch.empty(0, dtype=t.dtype),
            lambda: torch.stack([t.clone(), t.clone()], -1)[..., 0],
            lambda: _odd(t),
            lambda: draw.choice(others),
            lambda: draw.choice(others).flatten()[: t.numel()].view(t.shape),
            lambda: t.clone().random_(-200, 200) if t.dtype == torch.int64 else t,
            lambda: torch.nn.Parameter(t.clone()),
        ]
    )()


def _odd(t: Tensor) -> Tensor:
    """A tensor as `t` at an address that is no multiple of its elements' size."""
    memory = bytearray(t.numel() * t.element_size() + 1)
    return torch.frombuffer(memory, dtype=t.dtype, offset=1)[: t.numel()].view(t.shape)


def spoil(draw: Draw, call: Call) -> None:
    """Replace an argument, or an element of one that is a list, dict or named tuple."""
    name = draw.choice(list(call.arguments))
    value = call.arguments[name]
    others = tensors_in(call.arguments) if call.overlaps else [torch.ones(3)]
    call.spoiled.append(name)
    try:
        call.arguments[name] = replaced(draw, value, others)
    except (RuntimeError, ValueError, NotImplementedError, IndexError):
        return  # torch itself has no such tensor


def replaced(draw: Draw, value: Any, others: list[Tensor]) -> Any:
    if not isinstance(value, (list, dict, AdamWBuffers, AdamWRule)) or not value:
        return another_value(draw, value, others)
    if draw.random.random() < 0.1:
        return draw.choice((None, tuple(value), 3))
    if isinstance(value, list) and draw.random.random() < 0.2:
        return draw.choice((value[1:], [*value, value[0]], [*value, None]))
    if isinstance(value, (AdamWBuffers, AdamWRule)):
        key = draw.choice(value._fields)
        return value._replace(**{key: replaced(draw, getattr(value, key), others)})
    copy = value.copy()
    key = draw.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    copy[key] = replaced(draw, copy[key], others)
    return copy
