"""What the model loses with each whole attention and each whole MLP, measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.inspect.health import unsound
from fastprune.inspect.perplexity import chunked_loss, decoder_and_head
from fastprune.models.blocks import Blocks
from fastprune.models.modeling import RemovedAttention, RemovedMLP
from fastprune.progress import track

MODULES = {"attention": "self_attn", "mlp": "mlp"}


@contextmanager
def without(layer: nn.Module, kind: str) -> Iterator[None]:
    """``layer`` runs without its attention or its mlp (``kind``) while the block runs."""
    name = MODULES[kind]
    module = getattr(layer, name)
    setattr(layer, name, RemovedMLP() if kind == "mlp" else RemovedAttention(module.layer_idx))
    try:
        yield
    finally:
        setattr(layer, name, module)


@torch.no_grad()
def sublayer_losses(model: nn.Module, windows: Tensor) -> list[tuple[float, float]]:
    """Loss increase in nats a token without the attention, and without the MLP, of each layer.

    ``windows`` are token ids (n, s). As in `sensitivity.removal` the hidden states before a layer
    are computed once. Raises NumericalError when a loss is not finite.
    """
    blocks, head = Blocks(model), decoder_and_head(model)[1]
    device = next(model.parameters()).device
    totals = [[0.0, 0.0] for _ in range(len(blocks))]
    dense = 0.0
    for window in track(distributed.share(windows), "sublayer sensitivity"):
        ids = window[None].to(device)
        hidden = blocks.embed(ids)
        for index in range(len(blocks)):
            for place, kind in enumerate(MODULES):
                with without(blocks.layers[index], kind):
                    rest = blocks.run(index, hidden)
                for later in range(index + 1, len(blocks)):
                    rest = blocks.run(later, rest)
                totals[index][place] += chunked_loss(blocks.norm(rest), head, ids)[0].item()
            hidden = blocks.run(index, hidden)
        dense += chunked_loss(blocks.norm(hidden), head, ids)[0].item()
    return loss_increases(totals, dense, windows, model)


def loss_increases(
    totals: Sequence[Sequence[float]], dense: float, windows: Tensor, model: nn.Module
) -> list[tuple[float, float]]:
    """Summed losses of ``model`` on ``windows`` (n, s) as increases over ``dense``.

    They are in nats a token, the losses added up over the processes. Raises NumericalError when one
    is not finite.
    """
    flat = distributed.sums([dense, *(value for pair in totals for value in pair)])
    if not all(map(math.isfinite, flat)):
        raise unsound(model, "the loss with a sublayer skipped")
    dense, totals = flat[0], list(zip(flat[1::2], flat[2::2], strict=True))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return [((a - dense) / tokens, (b - dense) / tokens) for a, b in totals]


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor) -> float:
    """Loss in nats a token on ``windows`` (n, s), as `sublayer_losses` measures it."""
    decoder, head = decoder_and_head(model)
    device = next(model.parameters()).device
    total = 0.0
    for window in track(distributed.share(windows), "loss"):
        ids = window[None].to(device)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        total += chunked_loss(hidden, head, ids)[0].item()
    return distributed.sums([total])[0] / (windows.shape[0] * (windows.shape[1] - 1))
