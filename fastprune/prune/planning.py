"""From scores and a budget to a plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.models.families import (
    attention_slices,
    block_parameters,
    decoder_layers,
    geometries,
    mlp_slices,
    unit_cost,
)
from fastprune.models.foreign import cache_directory
from fastprune.models.streamed import StreamedModel
from fastprune.prune import stream
from fastprune.prune.allocation import (
    BudgetError,
    LayerSize,
    Limits,
    Removal,
    allocate,
    allocate_global,
    allocate_same,
    check_reachable,
    layer_weights,
)
from fastprune.prune.config import PruneConfig
from fastprune.prune.curves import measure_curves
from fastprune.prune.importance import Scores, score
from fastprune.prune.plan import LayerPlan, Plan
from fastprune.prune.search import choose
from fastprune.prune.sensitivity import activation, load_layer_importance, removal
from fastprune.report.run import Clock

log = logging.getLogger("fastprune")


def make_plan(
    model: nn.Module,
    windows: Tensor,
    target: int,
    config: PruneConfig,
    clock: Clock,
    source: StreamedModel | None = None,
) -> tuple[Plan, list[float] | None]:
    """Plan the removal of ``target`` parameters; also the layer sensitivities, where used.

    ``windows`` are calibration token ids (n, s). ``source`` has the weights when ``model`` has
    sizes only. Raises InputError when the limits rule the target out.
    """
    sizes = geometries(model)
    selected = config.selected_layers(len(sizes))
    costs = [
        layer_size(layer, config.structures if i in selected else ())
        for i, layer in enumerate(decoder_layers(model))
    ]
    importance = None
    with clock("score"):
        if source is None:
            scores = score(model, windows, config.importance, seed=config.seed)
        else:
            scores = stream.score(source, windows, config.importance, seed=config.seed)
        if config.allocation in ("inverse", "proportional"):
            importance = _sensitivity(model, windows, config, source)
    with clock("plan"):
        try:
            if config.allocation == "search":
                removals = _search(model, windows, scores, costs, target, config)
            else:
                removals = _allocate(costs, selected, scores, importance, target, config)
        except BudgetError as error:
            block = block_parameters(model)
            raise InputError(
                f"removing {target / block:.1%} of the block parameters cannot be reached: within "
                f"these structures, layers and limits {error.low / block:.1%} to "
                f"{error.high / block:.1%} can be removed"
            ) from error
        plan = Plan(
            tuple(sizes),
            tuple(
                LayerPlan(
                    i,
                    keep_best(scores.attention[i], removals[i].groups),
                    keep_best(scores.mlp[i], removals[i].channels),
                )
                for i in range(len(sizes))
            ),
        )
    return plan, importance


def _search(
    model: nn.Module,
    windows: Tensor,
    scores: Scores,
    costs: list[LayerSize],
    target: int,
    config: PruneConfig,
) -> list[Removal]:
    """The mix of thinning levels that diverges least; measured levels are kept for a next run."""
    limits = _limits(config)
    check_reachable(costs, target, limits)
    curves = measure_curves(model, windows, scores, costs, cache_directory() / "levels")
    removals, divergence = choose(curves, costs, target, limits)
    log.info("search: predicted divergence %.4f nats a token", divergence)
    return removals


def _limits(config: PruneConfig) -> Limits:
    return Limits(config.min_layer_ratio, config.max_layer_ratio, config.align)


def layer_size(layer: nn.Module, structures: Sequence[str]) -> LayerSize:
    """What may be removed from ``layer`` when only ``structures`` may be touched."""
    attention = attention_slices(layer) if "attention" in structures else []
    mlp = mlp_slices(layer) if "mlp" in structures else []
    return LayerSize(
        groups=_units(layer, attention),
        group_cost=unit_cost(layer, attention),
        channels=_units(layer, mlp),
        channel_cost=unit_cost(layer, mlp),
    )


def keep_best(scores: Tensor, remove: int) -> tuple[int, ...]:
    """Indices, ascending, that stay when the ``remove`` lowest scores go; ties keep the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[: len(scores) - remove].tolist()))


def _units(layer: nn.Module, slices: Sequence) -> int:
    if not slices:
        return 0
    first = slices[0]
    return layer.get_parameter(first.name).shape[first.dim] // first.width


def _allocate(
    costs: list[LayerSize],
    selected: range,
    scores: Scores,
    importance: list[float] | None,
    target: int,
    config: PruneConfig,
) -> list[Removal]:
    limits = _limits(config)
    chosen = [costs[i] for i in selected]
    if config.layout == "uniform":
        removals = allocate_same(chosen, target, limits)
    elif config.allocation == "global":
        removals = allocate_global(
            chosen,
            [scores.attention[i].tolist() if costs[i].groups else [] for i in selected],
            [scores.mlp[i].tolist() if costs[i].channels else [] for i in selected],
            target,
            limits,
        )
    else:
        weights = [1.0] * len(chosen)
        if importance is not None:
            sensitivity = [importance[i] for i in selected]
            weights = layer_weights(sensitivity, config.allocation, config.alpha)
        # Where equal rates leave a choice of layer, the cheapest KV group goes first.
        order = [float(s.min()) if len(s) else 0.0 for s in scores.attention]
        removals = allocate(chosen, weights, target, limits, [order[i] for i in selected])
    everywhere = [Removal()] * len(costs)
    for i, removal_of_layer in zip(selected, removals):
        everywhere[i] = removal_of_layer
    return everywhere


def _sensitivity(
    model: nn.Module, windows: Tensor, config: PruneConfig, source: StreamedModel | None
) -> list[float]:
    some = windows[: config.sensitivity_samples]
    if config.layer_importance == "activation":
        return activation(model, some) if source is None else stream.layer_activation(source, some)
    if config.layer_importance != "removal":
        return load_layer_importance(Path(config.layer_importance), len(decoder_layers(model)))
    importance, _ = removal(model, some) if source is None else stream.removal(source, some)
    return importance


def parameters_removed(model: nn.Module, plan: Plan) -> int:
    """Parameters that ``plan`` takes from the uncut ``model``."""
    total = 0
    for layer, kept in zip(decoder_layers(model), plan.layers, strict=True):
        size = layer_size(layer, ("attention", "mlp"))
        total += (size.groups - len(kept.kv_groups)) * size.group_cost
        total += (size.channels - len(kept.channels)) * size.channel_cost
    return total
