"""From scores and a budget to a plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprune.cache import cache_directory
from fastprune.models.checkpoint import has_stock_form
from fastprune.models.families import decoder_layers, geometries
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
from fastprune.pruning.spread import (
    Spread,
    Thinning,
    first_guess,
    meet,
    whole_and_thinned,
    whole_only,
)
from fastprune.pruning.sublayers import mean_loss, sublayer_losses
from fastprune.report.run import Clock

log = logging.getLogger("fastprune")


class Planned(NamedTuple):
    """What `make_plan` decided, and what it went by."""

    plan: Plan
    layer_importance: list[float] | None = None
    divergence: float | None = None
    """what `search` foresees, in nats a token"""


def make_plan(
    calibration: Calibration,
    budget: Budget,
    config: PruneConfig,
    clock: Clock,
    gone: Plan | None = None,
) -> Planned:
    """A plan that meets ``budget``, with the layer sensitivities and the prediction, where used.

    ``gone`` is a plan by which the model is masked already: what it removes goes first. Raises
    InputError when the limits rule the budget out.
    """
    model = calibration.layers.model
    costs = layer_sizes(model, config)
    check_align(costs, limits_of(config))
    importance = divergence = None
    with clock("score"):
        scores = score(calibration, config.importance, seed=config.seed)
        if gone is not None:
            scores = _gone_first(scores, gone)
        if config.allocation in ("inverse", "proportional"):
            importance = _sensitivity(calibration, config)
    try:
        if config.allocation == "search":
            with clock("plan"):
                removals, divergence = _search(calibration, scores, costs, budget, config)
        else:
            fits = partial(_standard, model)
            selected = config.selected_layers(len(costs))
            thin = Thinning(config, selected, scores, importance, fits)
            spread = _spread(calibration, costs, budget, thin, clock, gone)
            with clock("plan"):
                removals = meet(budget, costs, spread, limits_of(config))
    except BudgetError as error:
        raise budget.unreachable(error, model, config) from error
    return Planned(plan_of(model, scores, removals), importance, divergence)


def plan_of(model: nn.Module, scores: Scores, removals: Sequence[Removal]) -> Plan:
    """The plan that keeps the best-scored units of every layer."""
    return Plan(
        tuple(geometries(model)),
        tuple(
            LayerPlan(
                i,
                () if r.attention else keep_best(scores.attention[i], r.groups),
                () if r.mlp else keep_best(scores.mlp[i], r.channels),
            )
            for i, r in enumerate(removals)
        ),
    )


def _spread(
    calibration: Calibration,
    costs: list[LayerSize],
    budget: Budget,
    thin: Thinning,
    clock: Clock,
    gone: Plan | None,
) -> Spread:
    """How the allocation of ``thin`` spreads any number of parameters over the layers."""
    config = thin.config
    if not any(size.whole for size in costs):
        return lambda target: thin(costs, target)
    some = calibration.part(slice(config.sensitivity_samples))
    with clock("score"):
        losses = remembered("sublayer-losses", some, sublayer_losses)
        candidates = cheapest_first(costs, _losses_of_gone(losses, gone))
        for s in candidates:
            log.info("without the %s of layer %d: %+.4f nats a token", s.kind, s.layer, s.loss)
        if not any(size.prunable for size in costs):
            return whole_only(candidates, len(costs))
        price = _price_of_thinning(calibration, costs, budget, thin, gone)
        log.info("thinning costs %.3g nats a token per million parameters", 1e6 * price)
    return whole_and_thinned(costs, candidates, price, thin)


def _price_of_thinning(
    calibration: Calibration,
    costs: list[LayerSize],
    budget: Budget,
    thin: Thinning,
    gone: Plan | None,
) -> float:
    """Loss per parameter, in nats a token, when thinning alone meets the budget; or infinity."""
    config, layers = thin.config, calibration.layers
    some = calibration.part(slice(config.sensitivity_samples))
    target = first_guess(budget, costs)
    try:
        removals = thin(remaining(costs, [Removal()] * len(costs)), target)
    except BudgetError:
        return math.inf
    before = 0 if gone is None else parameters_removed(layers.model, gone)
    more = removed_parameters(costs, removals) - before
    if more <= half_unit(costs, limits_of(config)):
        return math.inf
    dense = mean_loss(some)
    with preserved(layers):
        refit = None if config.compensate == "none" else calibration
        mask(layers, plan_of(layers.model, thin.scores, removals), refit)
        return max(mean_loss(some) - dense, 0.0) / more


def _losses_of_gone(losses: list[dict[str, float]], gone: Plan | None) -> list[tuple[float, float]]:
    """``losses`` with those of sublayers that are gone already as low as can be."""
    pairs = [(own["attention"], own["mlp"]) for own in losses]
    if gone is None:
        return pairs
    return [
        (attention if kept.kv_groups else -math.inf, mlp if kept.channels else -math.inf)
        for (attention, mlp), kept in zip(pairs, gone.layers, strict=True)
    ]


def _gone_first(scores: Scores, gone: Plan) -> Scores:
    """``scores`` with those of removed units below all others."""

    def lowered(values: Tensor, kept: Sequence[int]) -> Tensor:
        below = torch.full_like(values, min(0.0, float(values.min()) if len(values) else 0.0) - 1)
        below[list(kept)] = values[list(kept)]
        return below

    return Scores(
        [
            {kind: lowered(values, kept.kept[kind]) for kind, values in units.items()}
            for units, kept in zip(scores.layers, gone.layers, strict=True)
        ]
    )


def _search(
    calibration: Calibration,
    scores: Scores,
    costs: list[LayerSize],
    budget: Budget,
    config: PruneConfig,
) -> tuple[list[Removal], float]:
    """The mix of thinning levels that diverges least, and by how much, as `choose` foresees it.

    Measured levels are kept for a next run.
    """
    limits, target, saved = limits_of(config), budget.need, None
    if budget.table is not None or (budget.at_least and not any(s.prunable for s in costs)):
        saved = [partial(budget.saved, i, size) for i, size in enumerate(costs)]
    else:
        target += half_unit(costs, limits) if budget.at_least else 0
        check_reachable(costs, round(target), limits)
    some = calibration.part(slice(config.search_samples))
    search = Search(some, scores, config.compensate != "none", cache_directory() / "levels")
    curves = measure_curves(search, costs)
    removals, divergence = choose(curves, costs, target, limits, saved)
    log.info("search: predicted divergence %.4f nats a token", divergence)
    removals = exchange(
        search,
        Problem(costs, limits, target, saved),
        removals,
        partial(plan_of, calibration.layers.model, scores),
        config.exchange_rounds or 0,
    )
    return removals, predicted(curves, removals)


def _standard(model: nn.Module, groups: int) -> bool:
    """Whether a standard model has the layers that are left when each loses ``groups`` groups."""
    first = geometries(model)[0]
    kept = first.kv_heads - groups
    return has_stock_form(
        model, replace(first, kv_heads=kept, query_heads=kept * first.queries_per_kv)
    )


def keep_best(scores: Tensor, remove: int) -> tuple[int, ...]:
    """Indices, ascending, that stay when the ``remove`` lowest scores go; ties keep the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[: len(scores) - remove].tolist()))


def _sensitivity(calibration: Calibration, config: PruneConfig) -> list[float]:
    if config.layer_importance not in ("removal", "activation"):
        count = len(calibration.layers)
        return load_layer_importance(Path(config.layer_importance), count)
    some = calibration.part(slice(config.sensitivity_samples))

    def measure(some: Calibration) -> list[float]:
        return removal(some)[0] if config.layer_importance == "removal" else activation(some)

    return remembered(f"layers-{config.layer_importance}", some, measure)


def parameters_removed(model: nn.Module, plan: Plan) -> int:
    """Parameters that ``plan`` takes from the uncut ``model``."""
    total = 0
    for layer, kept in zip(decoder_layers(model), plan.layers, strict=True):
        size = layer_size(layer, ("attention", "mlp", "sublayer"))
        removal = Removal(
            size.groups - len(kept.kv_groups) if kept.kv_groups else 0,
            size.channels - len(kept.channels) if kept.channels else 0,
            attention=not kept.kv_groups,
            mlp=not kept.channels,
        )
        total += parameters(size, removal)
    return total
