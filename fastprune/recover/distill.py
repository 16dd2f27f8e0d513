"""Distillation: the student learns the teacher's next-token distribution beside the labels.

    loss = (1 − weight) · CE(labels) + weight · T² · KL(teacher ‖ student) + hidden_weight · H

KL is between softmax(logits / T), T² keeps its gradient of one size at any temperature T (Hinton et
al., arXiv 1503.02531). H is the mean over layers and tokens of ‖s − t‖² / ‖t‖² between the hidden
states of student and teacher. Logits of both are made a few tokens at a time and never stand whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastprune.errors import InputError
from fastprune.kernels.ops import cross_entropy
from fastprune.models import forward
from fastprune.models.forward import Head, decoder_and_head
from fastprune.models.load import STATE_SUFFIXES, load_model
from fastprune.models.vocabulary import take_tokens
from fastprune.recover.align import align_layers
from fastprune.recover.loss import head_loss, product_dtype, scored_tokens
from fastprune.sharding import inside, spread, whole

TINY = 1e-12  # below the square of any hidden state that is not zero

log = logging.getLogger("fastprune")


def load_teacher(
    source: str,
    tokenizer: Any,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    words: str | None = None,
    shard: bool = False,
) -> nn.Module:
    """The teacher that `source` names, in eval mode and without gradients.

    Weights alone in a file take the tokenizer that `words` names. With `shard` it is spread over
    all processes, which must all call this. A teacher that has all tokens of the student's
    `tokenizer`, and more, is cut to these. Raises InputError when it cannot be loaded or lacks one.
    """
    place = "cpu" if shard else device
    teacher, own = load_model(
        source,
        dtype=dtype,
        device=place,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        tokenizer=words if Path(source).suffix in STATE_SUFFIXES else None,
    )
    if tokenizer is not None and not take_tokens(teacher, own, tokenizer):
        raise InputError(
            f"--teacher {source}: its vocabulary is not the student's ({len(own.get_vocab())} and "
            f"{len(tokenizer.get_vocab())} tokens); choose a teacher with the same tokenizer"
        )
    teacher.requires_grad_(False)
    if shard:
        spread(teacher, torch.device(device))
    return teacher


class Distiller:
    """A teacher, and the loss of a student that learns from it.

    Args:
        teacher: a causal language model of the student's vocabulary; set to eval mode and frozen.
        weight: share of the divergence, 0 (labels only) to 1 (teacher only).
        temperature: both distributions are softened by it.
        hidden_weight: weight of the hidden states' term; 0 leaves it out.
        student: checked against the teacher at once where it is given. Needed for the hidden
            states' term of a student that lost whole layers.

    Raises InputError for weights out of range, and for a student of another vocabulary, or of
    another hidden size where hidden states are compared.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        weight: float = 0.5,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        student: nn.Module | None = None,
    ) -> None:
        if not 0 <= weight <= 1:
            raise InputError(f"the weight of the teacher must be from 0 to 1, got {weight:g}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise InputError(f"the temperature must be above 0, got {temperature:g}")
        if hidden_weight < 0:
            raise InputError(f"the hidden weight must not be negative, got {hidden_weight:g}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature
        self.hidden_weight = hidden_weight
        self.decoder, self.head = decoder_and_head(teacher)
        self.layers: list[int] | None = None
        self.parts: dict[str, Tensor] = {}
        """Terms of the last loss, unweighted: `labels`, `divergence` and, where used, `hidden`."""
        if student is not None:
            self.check(student)

    @property
    def wants_hidden_states(self) -> bool:
        """Whether `loss` must be given the student's hidden states of all layers."""
        return self.hidden_weight > 0

    def check(self, student: nn.Module) -> None:
        """Raise InputError unless `student` can learn from this teacher; align its layers."""
        decoder, head = decoder_and_head(student)
        self._check_vocabulary(head)
        if self.wants_hidden_states:
            self.layers = align_layers(decoder, self.decoder)

    def loss(
        self,
        hidden: Tensor,
        head: Head | nn.Linear,
        inputs: Mapping[str, Any],
        *,
        hidden_states: Sequence[Tensor] | None = None,
        items: int | Tensor | None = None,
    ) -> Tensor:
        """The student's loss on a batch: a fp32 scalar to call backward on, once.

        Args:
            hidden: the student's final hidden states (n, s, h).
            head: its head.
            inputs: `input_ids` and `labels` (n, s), optionally `attention_mask`; labels as in
                `next_token_loss`. The divergence is taken where they are scored.
            hidden_states: those of all layers, as transformers gives them with
                output_hidden_states; needed where `wants_hidden_states`.
            items: as in `next_token_loss`.
        """
        self._check_vocabulary(head)
        states, every = self._teacher_states(inputs)
        labels = inputs["labels"]
        criterion = _Divergence(states, self.head, self.weight, self.temperature)
        loss = head_loss(
            hidden, head, labels, criterion, items, chunk_logits=forward.CHUNK_LOGITS // 2
        )
        count = max(1, scored_tokens(labels))
        self.parts = {
            "labels": (criterion.labels / count).float(),
            "divergence": (criterion.divergence / count).float(),
        }
        if self.wants_hidden_states:
            if hidden_states is None or every is None:
                raise ValueError("the hidden states' term needs hidden_states")
            term = self._hidden_term(hidden_states, every, inputs.get("attention_mask"))
            self.parts["hidden"] = term.detach()
            share = 1.0 if items is None else count / items
            loss = loss + self.hidden_weight * share * term
        return loss

    @torch.no_grad()
    def _teacher_states(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Sequence[Tensor] | None]:
        device = self.head.weight.device
        mask = inputs.get("attention_mask")
        call = partial(
            self.decoder,
            input_ids=inputs["input_ids"].to(device),
            attention_mask=None if mask is None else mask.to(device),
            use_cache=False,
            output_hidden_states=self.wants_hidden_states,
        )
        output = inside(self.teacher, call)
        return output.last_hidden_state, output.hidden_states

    def _check_vocabulary(self, head: Head | nn.Module) -> None:
        own, other = head.weight.shape[0], self.head.weight.shape[0]
        if own != other:
            raise InputError(
                f"the teacher's vocabulary has {other} tokens, the student's {own}; choose a "
                "teacher with the same tokenizer"
            )

    def _hidden_term(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None
    ) -> Tensor:
        if self.layers is None:
            if len(student) != len(teacher):
                raise InputError(
                    f"the student has {len(student) - 1} layers, the teacher {len(teacher) - 1}; "
                    "give the distiller the student, so that it can align them"
                )
            self.layers = list(range(len(student) - 1))
        # The output of a student's layer is compared with what the next layer it kept reads in the
        # teacher; the last one with the teacher's last. Entry i+1 is the output of layer i.
        pairs = [*zip(range(1, len(self.layers)), self.layers[1:]), (-1, -1)]
        terms = [_relative_error(student[i], teacher[j], mask) for i, j in pairs]
        return torch.stack(terms).mean()


def _relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of ‖s − t‖² / ‖t‖²: a few tokens with huge states do not rule the mean."""
    exact = teacher.to(student.device).float()
    error = (student.float() - exact).square().sum(-1)
    relative = error / exact.square().sum(-1).clamp_min(TINY)
    if mask is None:
        return relative.mean()
    attended = mask.to(relative.device, relative.dtype)
    return (relative * attended).sum() / attended.sum().clamp_min(1)


class _Divergence:
    """Criterion of `head_loss`: labels and KL mixed, their gradient in place of the logits."""

    def __init__(self, states: Tensor, head: Head, weight: float, temperature: float) -> None:
        self.states = states.reshape(-1, states.shape[-1])
        self.head, self.weight, self.temperature = head, weight, temperature
        dtype = product_dtype(head.weight)  # read here: inside the loss autocast is off
        self.matrix = whole(head.weight).to(dtype)
        self.bias = None if head.bias is None else whole(head.bias).to(dtype)
        self.labels = torch.zeros((), dtype=torch.float64, device=states.device)
        self.divergence = torch.zeros_like(self.labels)

    def __call__(
        self, logits: Tensor, targets: Tensor, positions: Tensor, gradient: bool
    ) -> Tensor:
        states = self.states[positions.to(self.states.device)].to(self.matrix.dtype)
        others = self.head.logits(F.linear(states, self.matrix, self.bias))
        teacher = self._log_probabilities(others).to(logits.device)
        student = self._log_probabilities(logits)
        # d/dz of T² KL is T (softmax(z / T) − softmax(z_teacher / T))
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        divergence = divergence.double().sum() * self.temperature**2
        scale = 1 - self.weight if gradient else None
        losses, _ = cross_entropy(logits, targets, scale=scale)
        if gradient:
            difference = student.exp_().sub_(teacher.exp_())
            logits.add_(difference, alpha=self.weight * self.temperature)
        labels = losses.double().sum()
        self.labels += labels.to(self.labels.device)
        self.divergence += divergence.to(self.divergence.device)
        return (1 - self.weight) * labels + self.weight * divergence

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float() / self.temperature, -1)
