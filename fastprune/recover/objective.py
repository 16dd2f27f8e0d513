"""The loss of a batch, taken between the decoder and the head.

The logits of a batch never stand whole (recover/loss.py). FSDP gathers weights when the model is
called, so of a sharded model the loss is computed inside such a call; DDP, which averages
gradients, wraps a module whose call is the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastprune.distributed import ALONE, Processes
from fastprune.errors import InputError
from fastprune.models.forward import decoder_and_head
from fastprune.models.seq2seq import is_seq2seq, response_states
from fastprune.precision import bf16_is_fast, lacks_units
from fastprune.recover.loss import next_token_loss
from fastprune.sharding import inside, is_sharded

log = logging.getLogger("fastprune")

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under `--precision`; None for fp32 throughout."""
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(device) else "fp32"
    return DTYPES[precision]


def warn_of_slow(dtypes: Collection[torch.dtype | None], device: torch.device) -> None:
    """Say so where `device` has no units for products in one of `dtypes` (None is fp32)."""
    for name, dtype in DTYPES.items():
        if dtype is not None and dtype in dtypes and lacks_units(device, dtype):
            log.warning(
                "--precision %s: this processor has no units for %s products; fp32 is faster here",
                name,
                name,
            )


class Objective:
    """Computes the training loss of `model`.

    Args:
        model: a causal language model or a T5, with or without LoRA matrices.
        dtype: of the matrix products, by autocast; None leaves them in the weights' dtype.
        distiller: a `recover.distill.Distiller`, where a teacher takes part.
        processes: those that train together, each on batches of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        distiller: Any = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.dtype, self.distiller = model, dtype, distiller
        self.processes = processes
        self.decoder, self.head = decoder_and_head(model)
        self.seq2seq = is_seq2seq(model)
        if self.seq2seq and distiller is not None:
            raise InputError("--teacher: encoder-decoder models cannot be distilled")

    def __call__(self, inputs: Mapping[str, Any], items: int | Tensor | None = None) -> Tensor:
        """fp32 scalar: the summed loss of the batch over `items`, or over its scored tokens.

        `inputs` holds input_ids and labels (n, s), -100 where not scored, and attention_mask where
        there is padding. For an encoder-decoder model labels (n, t) are the responses.
        """
        return inside(self.model, lambda: self.within(inputs, items))

    def within(self, inputs: Mapping[str, Any], items: int | Tensor | None = None) -> Tensor:
        """The same, from within a call of the model."""
        labels = inputs["labels"]
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        device = labels.device.type
        with torch.autocast(device, dtype=self.dtype) if self.dtype else nullcontext():
            if self.seq2seq:
                hidden, labels = response_states(self.model, labels=labels, **rest)
                return next_token_loss(hidden, self.head, labels, items)
            if self.distiller is None:
                hidden = self.decoder(**rest, use_cache=False).last_hidden_state
                return next_token_loss(hidden, self.head, labels, items)
            output = self.decoder(
                **rest, use_cache=False, output_hidden_states=self.distiller.wants_hidden_states
            )
            return self.distiller.loss(
                output.last_hidden_state,
                self.head,
                inputs,
                hidden_states=output.hidden_states,
                items=items,
            )

    def plain(self, inputs: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The summed loss against the labels alone, and the tokens it sums over; no gradient."""
        labels = inputs["labels"]
        count = int((labels[:, 0 if self.seq2seq else 1 :] != -100).sum())
        distiller, self.distiller = self.distiller, None
        try:
            with torch.no_grad():
                return self(inputs, 1), count
        finally:
            self.distiller = distiller


class _LossModule(nn.Module):
    """The loss of `objective` as a module, whose parameters are those of its model."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = objective.model, objective

    def forward(self, inputs: Mapping[str, Any], items: int | Tensor | None = None) -> Tensor:
        return self.objective(inputs, items)


def synchronised(objective: Objective, device: torch.device) -> Callable[..., Tensor]:
    """The loss whose backward pass averages gradients over processes that have all the weights.

    That of one process, and of a sharded model, which does so itself, is `objective`.
    """
    if not objective.processes.several or is_sharded(objective.model):
        return objective
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(_LossModule(objective), device_ids=devices)


def unsynchronised(loss: Callable[..., Tensor]) -> AbstractContextManager[None]:
    """A context in which a `synchronised` loss adds up gradients without averaging them."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()
