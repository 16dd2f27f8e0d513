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
    """t in `shape`, with inner stride 1; a copy only where t's strides or lazy sign ask for it."""
    if t.is_neg():
        t = t.detach().resolve_neg()
    if tuple(t.shape) != shape:
        return t.detach().reshape(shape).contiguous()
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.detach().contiguous()


def dense(t: Tensor) -> Tensor:
    t = t.detach().resolve_neg()
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return t if t.numel() == 0 or extent == t.numel() else t.contiguous()


def workspace_of(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
