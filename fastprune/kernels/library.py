"""torch.ops.fastprune.*: the kernels with the shapes that torch.compile and torch.export need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprune.kernels import attention as attend
from fastprune.kernels import ops


@torch.library.custom_op("fastprune::taylor", mutates_args=())
def taylor(
    w: Tensor, g: Tensor | None, h: Tensor | None, x: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    return ops.taylor(w, g, h, x=x, kind=kind)


@taylor.register_fake
def _(
    w: Tensor, g: Tensor | None, h: Tensor | None, x: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    columns = w.shape[1] if w.ndim == 2 else 1
    rows = w.new_empty(w.shape[0], dtype=torch.float32)
    return rows, w.new_empty(columns, dtype=torch.float32)


@torch.library.custom_op("fastprune::gather", mutates_args=())
def gather(tensors: list[Tensor], indices: list[Tensor], dims: list[int]) -> list[Tensor]:
    return ops.gather(tensors, indices, dims)


@gather.register_fake
def _(tensors: list[Tensor], indices: list[Tensor], dims: list[int]) -> list[Tensor]:
    results = []
    for t, index, dim in zip(tensors, indices, dims):
        shape = list(t.shape)
        shape[dim] = index.shape[0]
        results.append(t.new_empty(shape))
    return results


@torch.library.custom_op("fastprune::scan", mutates_args=())
def scan(tensors: list[Tensor]) -> Tensor:
    """(tensors, 10) float64, a row per tensor in the order of ops.ScanResult."""
    return ops.scan_table(tensors)


@scan.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((len(tensors), ops.SCAN_FIELDS), dtype=torch.float64)


@torch.library.custom_op(
    "fastprune::adamw",
    mutates_args=(
        "params", "exp_avgs", "exp_avg_sqs", "masters", "steps", "stats", "total", "control",
    ),
)  # fmt: skip
def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: Tensor,
    stats: Tensor,
    total: Tensor,
    control: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    master: str,
    seed: int,
) -> None:
    ops.adamw(
        params, grads, exp_avgs, exp_avg_sqs, masters, steps, stats, total, control, lr=lr,
        beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, max_norm=max_norm,
        master=master, seed=seed,
    )  # fmt: skip


@adamw.register_fake
def _(*_args: object, **_kwargs: object) -> None:
    return None


@torch.library.custom_op("fastprune::cross_entropy", mutates_args=("logits",))
def cross_entropy(
    logits: Tensor, targets: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """ops.cross_entropy; the logits change only with a scale."""
    return ops.cross_entropy(logits, targets, scale=scale)


@cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    loss, log_normaliser = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in "ab")
    return loss, log_normaliser


@torch.library.custom_op("fastprune::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """kernels.attention.attention; `out` can be differentiated once, `log_sums` not."""
    return attend.attention(q, k, v, scale=scale)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, n, d = q.shape
    out = q.new_empty(batch, n, heads, d).transpose(1, 2)
    return out, q.new_empty(batch, heads, n, dtype=torch.float32)


@torch.library.custom_op("fastprune::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return attend.attention_backward(grad_out, q, k, v, out, log_sums, scale=scale)


@attention_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.fastprune.attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return *grads, None


attention.register_autograd(_backward, setup_context=_save)
