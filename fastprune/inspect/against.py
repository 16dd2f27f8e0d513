"""A pruned model against the dense one it came from: where it lost what.

Layer by layer, three views of the same loss. How far the hidden states are from the dense ones
behind the layer (everything before it included); how far the layer alone is, given what the dense
layer is given; and what that costs at the end: the KL divergence of the dense model's next-token
distribution when this layer alone is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fastprune.errors import InputError
from fastprune.models.families import block_parameters, geometries
from fastprune.models.forward import CHUNK_LOGITS
from fastprune.models.layers import Layers
from fastprune.progress import track
from fastprune.readers import read_json

WINDOWS, TOKENS = 4, 128
"""Hidden states are compared on so many windows of so many tokens. The divergences cost half as
many forward passes over them as the model has layers."""


@dataclass(frozen=True)
class LayerLoss:
    """What one layer lost; ``layer`` is its number in the dense model.

    ``cosine`` is the mean over tokens between the hidden states of both models behind the layer;
    ``error`` the norm of the difference that the layer alone makes, relative to what the dense
    layer adds; ``kl`` the divergence in nats a token when this layer alone is exchanged.
    """

    layer: int
    cosine: float
    error: float
    kl: float


@dataclass(frozen=True)
class Comparison:
    """A model against the dense one. ``kl`` is in nats a token, ``removed`` a share of the dense
    model's block parameters. ``layers`` is empty where it is not known which layers correspond."""

    dense: str
    tokens: int
    kl: float
    removed: float
    perplexity: float
    dense_perplexity: float
    layers: tuple[LayerLoss, ...]
    queries_per_kv: int

    @property
    def factor(self) -> float:
        """How many times the dense perplexity the model's is."""
        return self.perplexity / self.dense_perplexity

    def worst(self, count: int = 3) -> list[LayerLoss]:
        """The layers that cost most, the costliest first; those that cost nothing left out."""
        ranked = sorted(self.layers, key=lambda layer: -layer.kl)
        return [layer for layer in ranked[:count] if layer.kl > 0]

    def to_dict(self) -> dict[str, Any]:
        """The fields, the factor and the costliest layers as JSON-ready data."""
        worst = [layer.layer for layer in self.worst()]
        layers = [asdict(layer) for layer in self.layers]
        return {**asdict(self), "layers": layers, "factor": self.factor, "worst": worst}


def check_comparable(model: nn.Module, dense: nn.Module) -> None:
    """InputError unless the two models can be compared: same families, vocabulary and width."""
    geometries(model), geometries(dense)
    for name in ("vocab_size", "hidden_size"):
        ours, theirs = (getattr(m.config, name) for m in (model, dense))
        if ours != theirs:
            raise InputError(
                f"--dense: it has {name} {theirs}, the model {ours}; name the model it was made of"
            )


def compare(
    model: nn.Module,
    dense: nn.Module,
    windows: Tensor,
    *,
    name: str,
    perplexities: tuple[float, float],
    kept: Sequence[int] | None = None,
) -> Comparison:
    """Compare ``model`` with ``dense`` on the token ids ``windows`` (n, s).

    ``perplexities`` are the model's and the dense model's, measured by the caller; ``kept`` says
    which dense layers the model's layers are, where their numbers differ. Raises InputError for
    models that cannot be compared.
    """
    check_comparable(model, dense)
    ids = windows[:WINDOWS, :TOKENS].to(next(model.parameters()).device)
    ours, theirs = Layers(model), Layers(dense)
    if len(ours) == len(theirs):
        kept = range(len(theirs))
    elif kept is not None and len(kept) != len(ours):
        kept = None  # of another model, or of one that was cut again
    layers: list[LayerLoss] = []
    with torch.no_grad():
        if kept is None:
            (kl,) = _divergences(theirs, _final(theirs, ids), [(ours, _final(ours, ids))])
        else:
            layers, kl = _walk(ours, theirs, ids, {old: new for new, old in enumerate(kept)})
    return Comparison(
        dense=name,
        tokens=ids.numel(),
        kl=kl,
        removed=1 - block_parameters(model) / block_parameters(dense),
        perplexity=perplexities[0],
        dense_perplexity=perplexities[1],
        layers=tuple(layers),
        queries_per_kv=max(size.queries_per_kv for size in geometries(dense)),
    )


def kept_layers(folder: Path) -> list[int] | None:
    """The dense layers of which the checkpoint in ``folder`` kept anything, by the plan in it; None
    without one."""
    file = folder / "fastprune" / "plan.json"
    try:
        layers = read_json(file)["layers"]
        return [layer["index"] for layer in layers if layer["kv_groups"] or layer["channels"]]
    except (ValueError, KeyError, TypeError):
        return None


def _walk(
    ours: Layers, theirs: Layers, ids: Tensor, numbers: dict[int, int]
) -> tuple[list[LayerLoss], float]:
    """Every layer's loss, and the divergence of the whole model."""
    (hidden,), (dense,) = ours.embed([ids]), theirs.embed([ids])
    facts = []
    alone: list[Tensor | None] = []
    for index in range(len(theirs)):
        after = theirs.run(index, dense)
        number = numbers.get(index)
        own = dense if number is None else _run(ours, number, dense)
        if number is not None:
            hidden = ours.run(number, hidden)
        added = (after - dense).float().norm().item()
        error = (own - after).float().norm().item()
        cosine = cosine_similarity(hidden.float(), after.float(), dim=-1).mean().item()
        facts.append((min(cosine, 1.0), error / added if added else error))
        alone.append(None if torch.equal(own, after) else own)
        dense = after
    ends = [(ours, hidden)]
    for index, own in enumerate(track(alone, "exchanging layers")):
        if own is not None:
            for later in range(index + 1, len(theirs)):
                own = theirs.run(later, own)
            ends.append((theirs, own))
    kl, *costs = _divergences(theirs, dense, ends)
    cost = iter(costs)
    layers = [
        LayerLoss(index, *facts[index], 0.0 if own is None else next(cost))
        for index, own in enumerate(alone)
    ]
    return layers, kl


def _run(layers: Layers, index: int, hidden: Tensor) -> Tensor:
    """A layer on another model's hidden states, in its own dtype and back."""
    return layers.run(index, hidden.to(layers.model.dtype)).to(hidden.dtype)


def _final(layers: Layers, ids: Tensor) -> Tensor:
    states = layers.embed([ids])
    for index in range(len(layers)):
        states = layers.through(index, states)
    return states[0]


def _divergences(
    reference: Layers, expected: Tensor, others: Sequence[tuple[Layers, Tensor]]
) -> list[float]:
    """Mean KL(reference ‖ other) in nats a token for each of ``others``, from the hidden states
    (n, s, h) before the norm of each."""
    size = max(1, CHUNK_LOGITS // reference.model.config.vocab_size)
    count = expected.shape[0] * expected.shape[1]
    totals = [0.0] * len(others)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        true = _log_probabilities(reference, expected.flatten(0, 1)[rows])
        chances = true.exp()
        for number, (layers, hidden) in enumerate(others):
            guess = _log_probabilities(layers, hidden.flatten(0, 1)[rows])
            totals[number] += (chances * (true - guess)).sum().double().item()
    return [max(0.0, total / count) for total in totals]


def _log_probabilities(layers: Layers, hidden: Tensor) -> Tensor:
    return layers.head(layers.norm(hidden)).float().log_softmax(-1)
