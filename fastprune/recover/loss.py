"""The training loss from final hidden states, without the logits of a batch.

Logits and their gradient are the largest tensors of a training step (8 windows of 1,024 tokens of a
128,000-word vocabulary: 4 GB each in fp32). Here the output layer is applied to a few tokens at a
time; the gradient of their logits is known at once, takes the logits' own place, and is multiplied
on to the hidden states and to the output layer's weight before the next tokens come; where a model
scales or soft-caps its logits, first by the derivative of that. The backward pass only scales what
the forward pass has found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastprune.errors import InputError
from fastprune.kernels.ops import cross_entropy
from fastprune.kernels.reference import IGNORED
from fastprune.models.forward import Head, scored_chunks

PRODUCT_ELEMENTS = 1 << 20
"""Of the output layer's gradient, computed at a time on the CPU."""

Criterion = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(logits (c, vocabulary), targets (c,), positions (c,), gradient) -> summed loss, fp64 scalar.

`positions` are those of the tokens in the flattened batch. With `gradient` the logits are
overwritten by the gradient of the summed loss.
"""


def next_token_loss(
    hidden: Tensor, head: Head | nn.Linear, labels: Tensor, items: int | Tensor | None = None
) -> Tensor:
    """Mean negative log-likelihood in nats of the next token: a fp32 scalar to call backward on.

    Args:
        hidden: final hidden states (n, s, h), what the output layer reads.
        head: the output layer, or a model's `Head`; its weight gets a gradient where it asks for
            one, tied or not. Under autocast the products run in the autocast dtype.
        labels: token ids (n, s); position t predicts label t+1, and -100 is not scored.
        items: divide by this many instead of by the scored tokens, so that the losses of several
            micro-batches add up to the mean over all of them.

    With nothing scored the loss is 0, and so is its gradient. The result can be differentiated
    once. Raises InputError when the output layer is not a plain linear layer.
    """
    return head_loss(hidden, head, labels, _likelihood, items)


def _likelihood(logits: Tensor, targets: Tensor, positions: Tensor, gradient: bool) -> Tensor:
    losses, _ = cross_entropy(logits, targets, scale=1.0 if gradient else None)
    return losses.double().sum()


def head_loss(
    hidden: Tensor,
    head: Head | nn.Linear,
    labels: Tensor,
    criterion: Criterion,
    items: int | Tensor | None = None,
    chunk_logits: int | None = None,
) -> Tensor:
    """`criterion` summed over the scored tokens, divided by their number or by `items`.

    Arguments and result as of `next_token_loss`; `chunk_logits` is the number of logits computed at
    a time.
    """
    head = Head.of(head)
    if not isinstance(head.linear, nn.Linear):
        raise InputError(
            f"the output layer is a {type(head.linear).__name__}; the loss needs a plain linear "
            "layer, so leave it out of the adapted modules"
        )
    if items is None:
        items = max(1, scored_tokens(labels))
    scoring = _Scoring(head, labels, criterion, chunk_logits, torch.is_grad_enabled())
    return _HeadLoss.apply(hidden, head.weight, head.bias, scoring) / items


def scored_tokens(labels: Tensor) -> int:
    """How many tokens of `labels` (n, s) are predicted: all but -100 and the first column."""
    return int((labels[:, 1:] != IGNORED).sum())


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer with `weight` computes here and now."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


@dataclass(frozen=True)
class _Scoring:
    """What `head_loss` was asked for, beside the tensors that may get gradients."""

    head: Head
    labels: Tensor
    criterion: Criterion
    chunk_logits: int | None
    gradient: bool


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scoring: _Scoring,
    ) -> Tensor:
        dtype = product_dtype(weight)
        # Sums over chunks stay in fp32 whatever the weights are.
        grads = [
            t.new_zeros(t.shape, dtype=torch.float32) if scoring.gradient and needed else None
            for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad)
        ]
        gradient = any(g is not None for g in grads)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            cast_weight = weight.to(dtype)
            cast_bias = None if bias is None else bias.to(dtype)
            chunks = scored_chunks(hidden, scoring.head, scoring.labels, scoring.chunk_logits)
            for states, targets, positions in chunks:
                states = states.to(dtype)
                logits = scoring.head.logits(F.linear(states, cast_weight, cast_bias))
                slope = scoring.head.slope(logits) if gradient else None
                total += scoring.criterion(logits, targets, positions, gradient)
                if slope is not None:
                    logits.mul_(slope)
                _accumulate(grads, logits, states, cast_weight, positions)
        ctx.grads = grads
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the loss can be differentiated once only")
        grads, ctx.grads = ctx.grads, None
        scaled = [
            None if g is None else g.mul_(grad_output).to(dtype)
            for g, dtype in zip(grads, ctx.dtypes)
        ]
        return (*scaled, None)


def _accumulate(
    grads: list[Tensor | None],
    logit_grads: Tensor,
    states: Tensor,
    weight: Tensor,
    positions: Tensor,
) -> None:
    """Add a chunk's part to the gradients of hidden states, weight and bias (None: not wanted)."""
    hidden, head, bias = grads
    if hidden is not None:
        hidden.view(-1, hidden.shape[-1])[positions] = (logit_grads @ weight).float()
    if head is not None and states.dtype == torch.float32:
        head.addmm_(logit_grads.t(), states)
    elif head is not None:
        # The product of a chunk is rounded to half precision; a sum over hundreds of tokens could
        # leave the range of fp16, their mean cannot. A power of two costs no rounding.
        tokens = 2.0 ** len(states).bit_length()
        means = states / tokens
        # Row blocks on the CPU: fresh memory for a product of the weight's size takes longer to get
        # than to fill.
        rows = max(1, PRODUCT_ELEMENTS // head.shape[1]) if head.is_cpu else len(head)
        for part, columns in zip(head.split(rows), logit_grads.split(rows, dim=1)):
            part.add_(columns.t() @ means, alpha=tokens)
    if bias is not None:
        bias.add_(logit_grads.sum(0, dtype=torch.float32))
