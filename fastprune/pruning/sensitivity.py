"""How much a layer matters, by its removal or by what it does: the guide of the allocation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.inspect.health import unsound
from fastprune.messages import Message
from fastprune.models.forward import Head, chunked_loss
from fastprune.models.layers import Branches
from fastprune.pruning.calibration import Calibration
from fastprune.readers import read_json

FORMAT = "fastprune-layer-importance/1"
MEASURED = ("removal", "activation")
"""Sensitivities that are measured; others are read from a file."""


@torch.no_grad()
def removal(calibration: Calibration) -> tuple[list[float], float]:
    """Perplexity increase on the calibration windows when each layer in turn is skipped.

    The hidden states before a layer are the same whether it is skipped or not, so they are
    computed once: layer l costs a run of the layers after it only. Where layers are fetched the
    host keeps (layers + 1)·n·s hidden states. Returns the increases, one per layer, and the dense
    perplexity. Raises NumericalError when a loss is not finite.
    """
    layers = calibration.layers
    totals = [0.0] * (len(layers) + 1)
    for group, description in layers.groups(calibration.single(), "layer sensitivity"):
        branches = Branches(layers, partial(summed_loss, group))
        states = layers.embed(group)
        for index, _ in layers.walk(description):
            branches.pass_through(index)
            branches.leave(index, index, states)  # the branch that skips this layer
            states = layers.through(index, states)
        branches.leave(len(layers), len(layers), states)
        for number, loss in enumerate(branches.finish().values()):
            totals[number] += loss
    return _increases(totals, calibration)


@torch.no_grad()
def activation(calibration: Calibration) -> list[float]:
    """How much each layer changes its input: mean over tokens of ‖f(x) − x‖ / ‖x‖.

    One forward pass of the calibration windows where `removal` needs one for every layer. Raises
    NumericalError when a state is not finite.
    """
    layers = calibration.layers
    totals = [0.0] * len(layers)
    for group, description in layers.groups(calibration.single(), "layer sensitivity"):
        states = layers.embed(group)
        for index, _ in layers.walk(description):
            after = layers.through(index, states)
            for changed in map(_change, states, after):
                totals[index] += changed
            states = after
    totals = calibration.processes.sums(totals)
    if not all(map(math.isfinite, totals)):
        raise unsound(layers.model, Message("the hidden states"))
    return [total / calibration.windows.numel() for total in totals]


def summed_loss(ids: Iterable[Tensor], finals: Iterable[Tensor], head: Head) -> float:
    """Negative log-likelihood of token ``ids`` (n, s) each, summed, given what the head reads."""
    losses = (chunked_loss(final, head, own)[0].item() for final, own in zip(finals, ids))
    return sum(losses, 0.0)


def _change(before: Tensor, after: Tensor) -> float:
    """Sum over tokens of ‖after − before‖ / ‖before‖; hidden states (n, s, h)."""
    x, y = before.float(), after.float()
    norms = x.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((y - x).norm(dim=-1) / norms).double().sum().item()


def _increases(totals: Sequence[float], calibration: Calibration) -> tuple[list[float], float]:
    """Losses summed over the windows as perplexities: each minus the last, and the last.

    The losses are added up over the processes. Raises NumericalError when one is not finite.
    """
    totals = calibration.processes.sums(totals)
    n, length = calibration.windows.shape
    if not all(map(math.isfinite, totals)):
        raise unsound(calibration.layers.model, Message("the loss with a layer skipped"))
    perplexities = [math.exp(min(total / (n * (length - 1)), 100.0)) for total in totals]
    return [p - perplexities[-1] for p in perplexities[:-1]], perplexities[-1]


def save_layer_importance(path: Path, method: str, importance: Sequence[float]) -> None:
    """Write sensitivities as layer_importance.json."""
    layers = {str(i): value for i, value in enumerate(importance)}
    data = {"format": FORMAT, "method": method, "layer_importance": layers}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def load_layer_importance(path: Path, layers: int) -> list[float]:
    """Read sensitivities of ``layers`` layers; InputError when the file does not hold them.

    Accepts what `save_layer_importance` writes, a bare ``{"0": value, …}``, and a list.
    """
    try:
        data = read_json(path)
    except InputError as error:
        raise InputError(f"layer importance {error}") from error
    if isinstance(data, dict):
        data = data.get("layer_importance", data)
    try:
        values = data if isinstance(data, list) else [data[str(i)] for i in range(len(data))]
        importance = [float(value) for value in values]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not hold one number per layer") from error
    if len(importance) != layers or not all(map(math.isfinite, importance)):
        raise InputError(
            f"{path} holds {len(importance)} layers' importance, the model has {layers}"
            if len(importance) != layers
            else f"{path} holds a value that is not finite"
        )
    return importance
