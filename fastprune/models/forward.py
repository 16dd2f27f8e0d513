"""The parts of a forward pass beside the layers: batches, the head in chunks, and the loss.

Logits of a long window are large (1024 tokens of a 128,000-word vocabulary: 0.5 GB in fp32), so the
head is applied to a few tokens at a time and the logits of a window never stand whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.kernels.ops import cross_entropy
from fastprune.kernels.reference import IGNORED
from fastprune.models.families import declared_for

CHUNK_LOGITS = 2**24
"""Logits computed at a time: 64 MB in fp32, large enough to keep a device busy."""
BATCH_TOKENS = 2048
"""Tokens in one forward pass where no batch size is given."""
LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
)
"""Config fields of model types whose logits are not simply the head's output."""


@dataclass(frozen=True)
class Head:
    """The output layer of a causal language model, and what the model makes of its output.

    The logits are scale · output, or cap · tanh(scale · output / cap) where they are soft-capped.
    They are computed in the output's dtype, step by step as the model itself does.
    """

    linear: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, head: Head | nn.Module) -> Head:
        """`head` itself, or the output layer `head` of a model whose logits are its output."""
        return head if isinstance(head, cls) else cls(head)

    @property
    def weight(self) -> Tensor:
        """The output layer's weight (vocabulary, h)."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The output layer's bias (vocabulary,)."""
        return self.linear.bias

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., h), without a gradient."""
        return self.logits(self.linear(states))

    def logits(self, output: Tensor) -> Tensor:
        """The logits for the `output` of the linear layer, which they overwrite."""
        if self.scale != 1:
            output.mul_(self.scale)
        return output if self.cap is None else output.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """The derivative of `logits` with respect to the output; None where they are the same.

        A number, or where logits are soft-capped a tensor in fp32 of their shape.
        """
        if self.cap is None:
            return None if self.scale == 1 else self.scale
        tanh = logits.float() / self.cap
        return tanh.square_().neg_().add_(1).mul_(self.scale)


def batches(windows: Tensor, batch_size: int | None = None) -> Sequence[Tensor]:
    """`windows` (n, s) in batches of so many, by default of about BATCH_TOKENS tokens."""
    return windows.split(batch_size or max(1, BATCH_TOKENS // windows.shape[1]))


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, Head]:
    """The part of a causal language model up to the final norm, and its head.

    Works through a PEFT wrapper. Raises InputError for a model type that is not known here and
    whose logits need more than its output layer.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = declared_for(inner.config)
    steps = family.logits if family else {}
    settings = {name: getattr(inner.config, name, None) for name in {*LOGIT_SETTINGS, *steps}}
    scale, cap = 1.0, None
    for name, value in settings.items():
        if value is None:
            continue
        if name not in steps:
            raise InputError(
                f"models of type '{inner.config.model_type}' change their logits ({name}) in a way "
                "that is not known here; their loss cannot be computed"
            )
        if steps[name] == "cap":
            cap = float(value)
        else:
            scale = scale * value if steps[name] == "multiply" else scale / value
    return inner.base_model, Head(inner.get_output_embeddings(), scale, cap)


def chunked_loss(hidden: Tensor, head: Head | nn.Module, labels: Tensor) -> tuple[Tensor, int]:
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
def loss_and_hidden_grad(
    hidden: Tensor, head: Head | nn.Linear, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean loss, fp32 scalar, and its gradient with respect to `hidden` (n, s, h), same dtype.

    Labels as in `chunked_loss`. The gradient of a chunk is (softmax - one hot) @ W, times the
    derivative of logits that are scaled or soft-capped, taken while the chunk's logits are at hand,
    so nothing of vocabulary size outlives its chunk. The head's own gradient is not computed. With
    no scored token the loss is 0 and so is the gradient.
    """
    head = Head.of(head)
    grad = torch.zeros_like(hidden)
    flat = grad.view(-1, hidden.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    count = max(1, int((labels[:, 1:] != IGNORED).sum()))
    for states, targets, rows in scored_chunks(hidden, head, labels):
        logits = head(states)
        slope = head.slope(logits)
        losses, _ = cross_entropy(logits, targets, scale=1 / count)
        total += losses.double().sum()
        if slope is not None:  # the logits are their own gradient now
            logits.mul_(slope)
        flat[rows] = logits @ head.weight
    return (total / count).float(), grad


def scored_chunks(
    hidden: Tensor, head: Head | nn.Module, labels: Tensor, chunk_logits: int | None = None
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
