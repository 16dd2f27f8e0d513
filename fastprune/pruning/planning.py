"""From scores and a budget to a plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprune.cache import cache_directory
from fastprune.models.checkpoint import has_stock_form
from fastprune.models.families import FINEST, KINDS, decoder_layers, geometries
from fastprune.pruning.allocators import (
    Allocator,
    Thinning,
    allocate_budget,
    first_guess,
    whole_and_thinned,
    whole_only,
)
from fastprune.pruning.budget import Budget, layer_size, layer_sizes, limits_of
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.curves import Search, measure_curves
from fastprune.pruning.depth import cheapest_first
from fastprune.pruning.exchange import Problem, exchange
from fastprune.pruning.importance import Scores, score
from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.measured import remembered
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.search import choose, predicted
from fastprune.pruning.sensitivity import activation, load_layer_importance, removal
from fastprune.pruning.sizes import (
    BudgetError,
    LayerSize,
    Removal,
    check_align,
    check_reachable,
    half_unit,
    parameters,
    remaining,
    removed_parameters,
)
from fastprune.pruning.sublayers import mean_loss, sublayer_losses
from fastprune.report.run import Clock

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class Request:
    """What a plan is made for: a model and the text to measure it on, a budget, and the settings.

    ``gone`` is a plan by which the model is masked already: what it removes goes first.
    """

    calibration: Calibration
    budget: Budget
    config: PruneConfig
    gone: Plan | None = None

    @property
    def model(self) -> nn.Module:
        """The model, which has sizes only where its weights are fetched layer by layer."""
        return self.calibration.layers.model

    @property
    def some(self) -> Calibration:
        """The windows that measure losses of the model."""
        return self.calibration.part(slice(self.config.sensitivity_samples))

    @property
    def refit(self) -> Calibration | None:
        """The windows that refit what stays, unless nothing is to be compensated."""
        return None if self.config.compensate == "none" else self.calibration


class Planned(NamedTuple):
    """What `make_plan` decided, and what it went by."""

    plan: Plan
    layer_importance: list[float] | None = None
    divergence: float | None = None
    """what `search` foresees, in nats a token"""


def make_plan(request: Request, clock: Clock) -> Planned:
    """A plan that meets the budget, with the layer sensitivities and the prediction, where used.

    Raises InputError when the limits rule the budget out.
    """
    model, config, budget = request.model, request.config, request.budget
    costs = layer_sizes(model, config)
    check_align(costs, limits_of(config))
    importance = divergence = None
    with clock("score"):
        scores = _scores(request)
        if config.allocation in ("inverse", "proportional"):
            importance = _sensitivity(request)
    try:
        if config.allocation == "search":
            with clock("plan"):
                removals, divergence = _search(request, scores, costs)
        else:
            fits = partial(_standard, model)
            selected = config.selected_layers(len(costs))
            thin = Thinning(config, selected, scores, importance, fits)
            allocator = _allocator(request, costs, thin, clock)
            with clock("plan"):
                removals = allocate_budget(budget, costs, allocator, limits_of(config))
    except BudgetError as error:
        raise budget.unreachable(error, model, config) from error
    return Planned(plan_of(model, scores, removals), importance, divergence)


def plan_of(model: nn.Module, scores: Scores, removals: Sequence[Removal]) -> Plan:
    """The plan that keeps the best-scored units of every layer."""
    sizes = geometries(model)
    layers = []
    for i, (size, r) in enumerate(zip(sizes, removals, strict=True)):
        there = [kind for kind, units in size.units.items() if units and kind not in r.gone]
        kept = {kind: keep_best(scores.layers[i][kind], r.count(kind)) for kind in there}
        inside: list[tuple[int, ...]] = []
        if kept.get("experts") and r.count(FINEST):
            channels = scores.layers[i][FINEST]  # (experts, channels)
            inside = [keep_best(channels[expert], r.count(FINEST)) for expert in kept["experts"]]
        layers.append(LayerPlan(i, kept, tuple(inside)))
    return Plan(tuple(sizes), tuple(layers))


def _scores(request: Request) -> Scores:
    """Scores of all units, those of units that are gone below all others."""
    scores = score(request.calibration, request.config.importance, seed=request.config.seed)
    return scores if request.gone is None else _gone_first(scores, request.gone)


def _allocator(request: Request, costs: list[LayerSize], thin: Thinning, clock: Clock) -> Allocator:
    """How any number of parameters is allocated to the layers, units going as ``thin`` says."""
    if not any(size.whole for size in costs):
        return partial(thin, costs)
    with clock("score"):
        losses = remembered("sublayer-losses", request.some, sublayer_losses)
        candidates = cheapest_first(costs, _losses_of_gone(losses, request.gone))
        for s in candidates:
            log.info("without the %s of layer %d: %+.4f nats a token", s.kind, s.layer, s.loss)
        if not any(size.prunable for size in costs):
            return whole_only(candidates, len(costs))
        price = _price_of_thinning(request, costs, thin)
        log.info("thinning costs %.3g nats a token per million parameters", 1e6 * price)
    return whole_and_thinned(costs, candidates, price, thin)


def _price_of_thinning(request: Request, costs: list[LayerSize], thin: Thinning) -> float:
    """Loss per parameter, in nats a token, when thinning alone meets the budget; or infinity."""
    model, config, gone = request.model, request.config, request.gone
    target = first_guess(request.budget, costs)
    try:
        removals = thin(remaining(costs, [Removal()] * len(costs)), target)
    except BudgetError:
        return math.inf
    before = 0 if gone is None else parameters_removed(model, gone)
    more = removed_parameters(costs, removals) - before
    if more <= half_unit(costs, limits_of(config)):
        return math.inf
    dense = mean_loss(request.some)
    layers = request.calibration.layers
    with preserved(layers):
        mask(layers, plan_of(model, thin.scores, removals), request.refit)
        return max(mean_loss(request.some) - dense, 0.0) / more


def _losses_of_gone(losses: list[dict[str, float]], gone: Plan | None) -> list[dict[str, float]]:
    """``losses`` with those of sublayers that are gone already as low as can be."""
    if gone is None:
        return losses
    return [
        {kind: loss if layer.kept[kind] else -math.inf for kind, loss in own.items()}
        for own, layer in zip(losses, gone.layers, strict=True)
    ]


def _gone_first(scores: Scores, gone: Plan) -> Scores:
    """``scores`` with those of removed units below all others."""

    return Scores(
        [
            {kind: _lowered(values, kind, layer) for kind, values in own.items()}
            for own, layer in zip(scores.layers, gone.layers, strict=True)
        ]
    )


def _lowered(values: Tensor, kind: str, layer: LayerPlan) -> Tensor:
    """Scores of the units of ``kind``, those that ``layer`` removes below all others."""
    stay = torch.zeros_like(values, dtype=torch.bool)
    if values.dim() == 1:
        stay[list(layer.kept[kind])] = True
    elif not layer.inside:
        stay[list(layer.kept["experts"])] = True
    for expert, channels in zip(layer.kept["experts"], layer.inside):
        stay[expert, list(channels)] = True
    lowest = min(0.0, float(values.min()) if values.numel() else 0.0)
    return torch.where(stay, values, lowest - 1)


def _search(
    request: Request, scores: Scores, costs: list[LayerSize]
) -> tuple[list[Removal], float]:
    """The mix of thinning levels that diverges least, and by how much, as `choose` foresees it.

    Measured levels are kept for a next run.
    """
    budget, config, limits = request.budget, request.config, limits_of(request.config)
    target, saved = budget.need, None
    if budget.table is not None or (budget.at_least and not any(s.prunable for s in costs)):
        saved = [partial(budget.saved, i, size) for i, size in enumerate(costs)]
    else:
        target += half_unit(costs, limits) if budget.at_least else 0
        check_reachable(costs, round(target), limits)
    some = request.calibration.part(slice(config.search_samples))
    search = Search(some, scores, request.refit is not None, cache_directory() / "levels")
    curves = measure_curves(search, costs)
    removals, divergence = choose(curves, costs, target, limits, saved)
    log.info("search: predicted divergence %.4f nats a token", divergence)
    problem = Problem(costs, limits, target, saved)
    decide = partial(plan_of, request.model, scores)
    removals = exchange(search, problem, removals, decide, config.exchange_rounds or 0)
    return removals, predicted(curves, removals)


def _standard(model: nn.Module, removal: Removal) -> bool:
    """Whether a standard model has the layers that are left when each loses ``removal``."""
    first = geometries(model)[0]
    kept = {kind: units - removal.count(kind) for kind, units in first.units.items()}
    return has_stock_form(model, first.keeping(kept))


def keep_best(scores: Tensor, remove: int) -> tuple[int, ...]:
    """Indices, ascending, that stay when the ``remove`` lowest scores go; ties keep the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[: len(scores) - remove].tolist()))


def _sensitivity(request: Request) -> list[float]:
    method = request.config.layer_importance
    if method not in ("removal", "activation"):
        return load_layer_importance(Path(method), len(decoder_layers(request.model)))

    def measure(some: Calibration) -> list[float]:
        return removal(some)[0] if method == "removal" else activation(some)

    return remembered(f"layers-{method}", request.some, measure)


def parameters_removed(model: nn.Module, plan: Plan) -> int:
    """Parameters that ``plan`` takes from the uncut ``model``."""
    total = 0
    for layer, own in zip(decoder_layers(model), plan.layers, strict=True):
        size = layer_size(layer, (*KINDS, "sublayer"))
        parts = size.sublayers
        units = {kind: parts[kind].units - len(kept) for kind, kept in own.kept.items() if kept}
        gone = {kind for kind, kept in own.kept.items() if not kept}
        total += parameters(size, Removal(units, gone))
        if own.inside:
            inner = layer_size(layer, (FINEST,)).finest
            removed = sum(inner.units - len(channels) for channels in own.inside)
            total += removed * inner.cost // parts["experts"].units
    return total
