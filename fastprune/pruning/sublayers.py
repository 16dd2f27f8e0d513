"""What the model loses with each whole sublayer, measured."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from fastprune.inspect.health import unsound
from fastprune.messages import Message
from fastprune.models.families import KINDS, sublayers
from fastprune.models.layers import Branches, replaced
from fastprune.models.modeling import RemovedAttention, RemovedMLP
from fastprune.models.units import Sublayer
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.sensitivity import summed_loss


def without(layer: nn.Module, sublayer: Sublayer) -> AbstractContextManager[None]:
    """``layer`` runs without its ``sublayer``, and the norms around it, inside the block."""
    module = layer.get_submodule(sublayer.module)
    attends = sublayer.kind == "attention"
    stand_in = RemovedAttention(module.layer_idx) if attends else RemovedMLP()
    norms = {name: nn.Identity() for name in sublayer.norms}
    return replaced(layer, **{sublayer.module: stand_in}, **norms)


@torch.no_grad()
def sublayer_losses(calibration: Calibration) -> list[dict[str, float]]:
    """Loss increase in nats a token without each sublayer, by its kind, of each layer.

    As in `sensitivity.removal` the hidden states before a layer are computed once; where layers are
    fetched the host keeps (sublayers + 1)·n·s of them. A sublayer that is gone already loses
    nothing. Raises NumericalError when a loss is not finite.
    """
    layers, windows = calibration.layers, calibration.windows
    keys = [(index, kind) for index in range(len(layers)) for kind in KINDS]
    totals = dict.fromkeys([*keys, None], 0.0)
    for group, description in layers.groups(calibration.single(), "sublayer sensitivity"):
        branches = Branches(layers, partial(summed_loss, group))
        states = layers.embed(group)
        for index, layer in layers.walk(description):
            branches.pass_through(index)
            for sublayer in sublayers(layer):
                with without(layer, sublayer):
                    behind = layers.through(index, states)
                branches.leave((index, sublayer.kind), index, behind)
            states = layers.through(index, states)
        branches.leave(None, len(layers), states)
        losses = branches.finish()
        for key in totals:
            totals[key] += losses.get(key, losses[None])
    dense, *values = calibration.processes.sums([totals[key] for key in (None, *keys)])
    if not all(map(math.isfinite, [dense, *values])):
        raise unsound(layers.model, Message("the loss with a sublayer skipped"))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    found: list[dict[str, float]] = [{} for _ in layers.modules]
    for (index, kind), value in zip(keys, values, strict=True):
        found[index][kind] = (value - dense) / tokens
    return found


@torch.no_grad()
def mean_loss(calibration: Calibration) -> float:
    """Loss in nats a token on the calibration windows, as `sublayer_losses` measures it."""
    layers, rows = calibration.layers, calibration.single()
    total = summed_loss(rows, layers.final(rows, "loss"), layers.head)
    n, length = calibration.windows.shape
    return calibration.processes.sums([total])[0] / (n * (length - 1))
