"""The parts of a forward pass beside the layers: batches, the head in chunks, and the loss.

Logits of a long window are large (1024 tokens of a 128,000-word vocabulary: 0.5 GB in fp32), so the
head is applied to a few tokens at a time and the logits of a window never stand whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.kernels.ops import cross_entropy
from fastprune.kernels.reference import IGNORED

CHUNK_LOGITS = 2**24
"""Logits computed at a time: 64 MB in fp32, large enough to keep a device busy."""
BATCH_TOKENS = 2048
"""Tokens in one forward pass where no batch size is given."""
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields of families whose logits are not simply the head's output."""


def batches(windows: Tensor, batch_size: int | None = None) -> Sequence[Tensor]:
    """`windows` (n, s) in batches of so many, by default of about BATCH_TOKENS tokens."""
    return windows.split(batch_size or max(1, BATCH_TOKENS // windows.shape[1]))


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The part of a causal language model up to the final norm, and its output layer.

    Works through a PEFT wrapper. Raises InputError for models whose logits need more than that.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in SCALED_LOGITS:
        if getattr(inner.config, name, None) is not None:
            raise InputError(
                f"models of type '{inner.config.model_type}' scale their logits ({name}), "
                "which this measurement does not support"
            )
    return inner.base_model, inner.get_output_embeddings()


def chunked_loss(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, int]:
    """Summed negative log-likelihood, float64 scalar, and the number of tokens it sums over.

    `hidden` (n, s, h) are final hidden states, `labels` (n, s) the token ids themselves: position t
    predicts label t+1. Labels of -100 are not scored.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    count = 0
    for states, targets, _ in scored_chunks(hidden, head, labels):
        losses, _ = cross_entropy(head(states), targets)
        total += losses.double().sum()
        count += len(targets)
    return total, count


@torch.no_grad()
def loss_and_hidden_grad(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss, fp32 scalar, and its gradient with respect to `hidden` (n, s, h), same dtype.

    Labels as in `chunked_loss`. The gradient of a chunk is (softmax - one hot) @ W, taken while the
    chunk's logits are at hand, so nothing of vocabulary size outlives its chunk. The head's own
    gradient is not computed. With no scored token the loss is 0 and so is the gradient.
    """
    grad = torch.zeros_like(hidden)
    flat = grad.view(-1, hidden.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    count = max(1, int((labels[:, 1:] != IGNORED).sum()))
    for states, targets, rows in scored_chunks(hidden, head, labels):
        logits = head(states)
        losses, _ = cross_entropy(logits, targets, scale=1 / count)
        total += losses.double().sum()
        flat[rows] = logits @ head.weight  # the logits are their own gradient now
    return (total / count).float(), grad


def scored_chunks(
    hidden: Tensor, head: nn.Module, labels: Tensor, chunk_logits: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Scored positions, some at a time: hidden states (c, h), targets (c,), flat positions (c,).

    `hidden` and `labels` as in `chunked_loss`. So many positions come at a time that `head` makes
    about `chunk_logits` (default CHUNK_LOGITS) logits of them.
    """
    seq_len = hidden.shape[1]
    scored = (labels[:, 1:] != IGNORED).to(hidden.device)
    row, column = scored.nonzero(as_tuple=True)
    states = hidden.reshape(-1, hidden.shape[-1])
    targets = labels.to(hidden.device)[row, column + 1]
    size = max(1, (chunk_logits or CHUNK_LOGITS) // head.weight.shape[0])
    positions = row * seq_len + column
    for rows, chosen in zip(positions.split(size), targets.split(size), strict=True):
        yield states[rows], chosen, rows
