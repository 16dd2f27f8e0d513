"""What the ops ask of their arguments, and the layouts they bring them into."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    op: str,
    name: str,
    t: Tensor,
    dtypes: tuple[torch.dtype, ...] | None,
    device: torch.device | None,
    shape: tuple[int, ...] | None,
) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, not {type(t).__name__}")
    if isinstance(t, FakeTensor) or t.is_meta:
        raise ValueError(f"{op}: {name} has no memory (a FakeTensor or meta tensor)")
    if t.layout is not torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, not {t.layout}")
    if dtypes is not None and t.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} must be {expected}, not {t.dtype}")
    if device is not None and t.device != device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {device}")
    if shape is not None and tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape}")


def inner_contiguous(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """t in `shape`, with inner stride 1, at an address for its elements; a copy only where t is
    otherwise, or lazily negated."""
    if t.is_neg():
        t = t.detach().resolve_neg()
    if tuple(t.shape) != shape:
        t = t.detach().reshape(shape).contiguous()
    elif t.shape[-1] > 1 and t.stride(-1) != 1:
        t = t.detach().contiguous()
    return t if is_aligned(t) else t.detach().clone()


def dense(t: Tensor) -> Tensor:
    """t where its elements fill one block of memory, none in the place of another, at an address
    for them; else a copy."""
    t = t.detach().resolve_neg()
    if not fills_block(t):
        return t.contiguous()
    return t if is_aligned(t) else t.clone()


def is_aligned(t: Tensor) -> bool:
    """Whether t begins at a multiple of its elements' size, as memory from a file need not."""
    return t.data_ptr() % t.element_size() == 0


def fills_block(t: Tensor) -> bool:
    filled = 1
    for stride, length in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n > 1):
        if stride != filled:
            return t.numel() == 0
        filled *= length
    return True


def check_written(op: str, name: str, t: Tensor) -> None:
    """ValueError unless what a kernel writes where t lies is what t then holds, and no more."""
    if t.is_neg():
        raise ValueError(f"{op}: {name} is a lazily negated view, which cannot be written")
    if not fills_block(t):
        raise ValueError(
            f"{op}: {name} must fill one block of memory to be written, unlike a view of shape "
            f"{tuple(t.shape)} with strides {t.stride()}"
        )


def check_apart(op: str, written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """ValueError where a tensor to be written shares memory with another one, written or read."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size(), name, name in written)
        for name, t in (written | read).items()
        if t.numel()
    )
    last = {False: (0, ""), True: (0, "")}  # per kind, the furthest end so far and whose it is
    for start, stop, name, changes in spans:
        for kind, (end, other) in last.items():
            if start < end and (changes or kind):
                raise ValueError(f"{op}: {name} and {other} share memory, and one is written")
        last[changes] = max(last[changes], (stop, name))


def _extent(t: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
