"""Causal attention of whole sequences on a CPU, forward and backward.

For bf16 on processors that multiply it (AVX512-BF16), where torch's own is far from their limit;
reference.py for everything else. GPUs have attention in torch. `attention_op`, which is
`torch.ops.fastprune.attention`, can be differentiated once, checkpointed and traced; it calls the
eager functions.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastprune.kernels import reference
from fastprune.kernels.backend import compiled
from fastprune.kernels.checks import FLOATS, check_tensor, dense, inner_contiguous
from fastprune.kernels.declarations import ATTENTION, ATTENTION_BACKWARD

HEAD_DIMS = range(16, 257, 16)


def attention_serves(device: torch.device, head_dim: int | None = None) -> bool:
    """Whether the compiled kernel computes bf16 attention here, with heads of `head_dim` values or
    (None) of any size."""
    module = compiled(device)
    return (
        device.type == "cpu"
        and (head_dim is None or head_dim in HEAD_DIMS)
        and module is not None
        and module.attention_serves()
    )


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, where position i attends to positions 0 to i.

    Args:
        q: (batch, heads, n, d) float32, bfloat16 or float16.
        k, v: (batch, kv heads, n, d), like q; query head i attends to head i // (heads / kv heads).
        scale: of the products; positive.

    Returns:
        out (batch, heads, n, d), like q, laid out as (batch, n, heads, d) in memory; and log_sums
        (batch, heads, n), float32: the logarithm of each position's sum of exponentials, in nats.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or no memory.
    """
    _check(q, k, v, scale)
    batch, heads, n, d = q.shape
    module = _serving(q)
    if module is None:
        out, log_sums = reference.attention(q, k, v, scale=scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), log_sums
    q, k, v = (inner_contiguous(t, tuple(t.shape)) for t in (q, k, v))
    out = torch.empty(batch, n, heads, d, dtype=q.dtype).transpose(1, 2)
    log_sums = torch.empty(batch, heads, n, dtype=torch.float32)
    ATTENTION.run(module, q.device, q=q, k=k, v=v, scale=scale, out=out, log_sums=log_sums)
    return out, log_sums


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each like its tensor, given that of `out`.

    `out` and `log_sums` are what `attention` returned for the same q, k, v and scale. Raises
    ValueError as it does.
    """
    _check(q, k, v, scale)
    for name, t in (("grad_out", grad_out), ("out", out)):
        check_tensor("attention", name, t, (q.dtype,), q.device, tuple(q.shape))
    check_tensor("attention", "log_sums", log_sums, (torch.float32,), q.device, tuple(q.shape[:3]))
    module = _serving(q)
    if module is None:
        return reference.attention_backward(grad_out, q, k, v, out, log_sums, scale=scale)
    grad_out, q, k, v, out = (inner_contiguous(t, tuple(t.shape)) for t in (grad_out, q, k, v, out))
    grad_q, grad_k, grad_v = (torch.empty_like(t) for t in (q, k, v))
    ATTENTION_BACKWARD.run(
        module, q.device, grad_out=grad_out, q=q, k=k, v=v, out=out, log_sums=dense(log_sums),
        scale=scale, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, at_once=torch.get_num_threads(),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def _serving(q: Tensor) -> ModuleType | None:
    """The compiled module where it computes attention of `q`."""
    serves = q.dtype == torch.bfloat16 and q.numel() and attention_serves(q.device, q.shape[-1])
    return compiled(q.device) if serves else None


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    check_tensor("attention", "q", q, FLOATS, None, None)
    if q.ndim != 4:
        raise ValueError(f"attention: q must have 4 dimensions, not shape {tuple(q.shape)}")
    check_tensor("attention", "k", k, (q.dtype,), q.device, None)
    batch, heads, n, d = q.shape
    kv_heads = k.shape[1] if k.ndim == 4 else 0
    if tuple(k.shape) != (batch, kv_heads, n, d) or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"attention: k of shape {tuple(k.shape)} does not go with q of shape {tuple(q.shape)}"
        )
    check_tensor("attention", "v", v, (q.dtype,), q.device, tuple(k.shape))
    if not scale > 0:
        raise ValueError(f"attention: scale must be positive, not {scale}")


# ---------------------------------------------------------------------------- the op

attention_op = torch.library.custom_op("fastprune::attention", attention, mutates_args=())
_backward_op = torch.library.custom_op(
    "fastprune::attention_backward", attention_backward, mutates_args=()
)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, n, d = q.shape
    out = q.new_empty(batch, n, heads, d).transpose(1, 2)
    return out, q.new_empty(batch, heads, n, dtype=torch.float32)


@_backward_op.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad_out, *ctx.saved_tensors, ctx.scale), None


attention_op.register_autograd(_backward, setup_context=_save)
