"""How much a layer matters, by its removal or by what it does: the guide of the allocation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.errors import InputError
from fastprune.inspect.health import unsound
from fastprune.inspect.perplexity import chunked_loss, decoder_and_head
from fastprune.models.blocks import Blocks
from fastprune.progress import track

FORMAT = "fastprune-layer-importance/1"


@torch.no_grad()
def removal(model: nn.Module, windows: Tensor) -> tuple[list[float], float]:
    """Perplexity increase on ``windows`` (n, s) when each layer in turn is skipped.

    The hidden states before a layer are the same whether it is skipped or not, so they are
    computed once: layer l costs a run of the layers after it only. Returns the increases, one
    per layer, and the dense perplexity. Raises NumericalError when a loss is not finite.
    """
    blocks = Blocks(model)
    _, head = decoder_and_head(model)
    device = next(model.parameters()).device
    totals = [0.0] * (len(blocks) + 1)
    for window in track(distributed.share(windows), "layer sensitivity"):
        ids = window[None].to(device)

        def loss(hidden: Tensor, ids: Tensor = ids) -> float:
            return chunked_loss(blocks.norm(hidden), head, ids)[0].item()

        hidden = blocks.embed(ids)
        for skipped in range(len(blocks)):
            rest = hidden
            for index in range(skipped + 1, len(blocks)):
                rest = blocks.run(index, rest)
            totals[skipped] += loss(rest)
            hidden = blocks.run(skipped, hidden)
        totals[-1] += loss(hidden)
    return increases(totals, windows, model)


@torch.no_grad()
def activation(model: nn.Module, windows: Tensor) -> list[float]:
    """How much each layer changes its input: mean over tokens of ‖f(x) − x‖ / ‖x‖.

    ``windows`` are token ids (n, s). One forward pass where `removal` needs one for every layer.
    Raises NumericalError when a state is not finite.
    """
    blocks = Blocks(model)
    device = next(model.parameters()).device
    totals = [0.0] * len(blocks)
    for window in track(distributed.share(windows), "layer sensitivity"):
        hidden = blocks.embed(window[None].to(device))
        for index in range(len(blocks)):
            after = blocks.run(index, hidden)
            totals[index] += change(hidden, after)
            hidden = after
    return mean_changes(totals, windows, model)


def change(before: Tensor, after: Tensor) -> float:
    """Sum over tokens of ‖after − before‖ / ‖before‖; hidden states (n, s, h)."""
    x, y = before.float(), after.float()
    norms = x.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((y - x).norm(dim=-1) / norms).double().sum().item()


def mean_changes(totals: Sequence[float], windows: Tensor, model: nn.Module) -> list[float]:
    """Sums of `change` in ``model`` over ``windows`` (n, s) per token, added up over the processes.

    Raises NumericalError when one is not finite.
    """
    totals = distributed.sums(totals)
    if not all(map(math.isfinite, totals)):
        raise unsound(model, "the hidden states")
    return [total / windows.numel() for total in totals]


def increases(
    totals: Sequence[float], windows: Tensor, model: nn.Module
) -> tuple[list[float], float]:
    """Summed losses of ``model`` on ``windows`` (n, s) as perplexities: each minus the last, and
    the last.

    The losses are added up over the processes. Raises NumericalError when one is not finite.
    """
    totals = distributed.sums(totals)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    if not all(map(math.isfinite, totals)):
        raise unsound(model, "the loss with a layer skipped")
    perplexities = [math.exp(min(total / tokens, 100.0)) for total in totals]
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
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the layer importance {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} does not hold JSON") from error
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
