"""From a budget to removals in every layer, for every allocation but the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastprune.models.families import COARSE
from fastprune.pruning.allocation import allocate, allocate_same, layer_weights
from fastprune.pruning.budget import Budget, limits_of
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.depth import Candidate, cheaper_than, nearest
from fastprune.pruning.importance import Scores
from fastprune.pruning.ranking import allocate_global
from fastprune.pruning.sizes import (
    BudgetError,
    LayerSize,
    Limits,
    Removal,
    check_reachable,
    coarsest_step,
    half_unit,
    merged,
    reachable,
    remaining,
    removed_parameters,
)

Allocator = Callable[[float], list[Removal]]
"""Removals of so many parameters."""


@dataclass(frozen=True)
class Thinning:
    """Unit by unit: ``--allocation`` over the layers ``selected``, on scores or sensitivities."""

    config: PruneConfig
    selected: range
    scores: Scores
    importance: list[float] | None
    fits: Callable[[Removal], bool] = lambda coarse: True
    """whether layers that all lose so many coarse units make a standard model"""

    def __call__(self, sizes: Sequence[LayerSize], target: float) -> list[Removal]:
        """Removals of ``target`` parameters from ``sizes``; BudgetError when out of reach."""
        config, limits = self.config, limits_of(self.config)
        assert config.alpha is not None
        chosen = [sizes[i] for i in self.selected]
        target = round(target)
        if config.layout == "uniform":
            removals = allocate_same(chosen, target, limits, self.fits)
        elif config.allocation == "global":
            scores = [
                {kind: self.scores.ascending(i, kind) for kind in _thinnable(sizes[i])}
                for i in self.selected
            ]
            removals = allocate_global(chosen, scores, target, limits, config.alpha)
        else:
            weights = [1.0] * len(chosen)
            if self.importance is not None:
                sensitivity = [self.importance[i] for i in self.selected]
                weights = layer_weights(sensitivity, config.allocation, config.alpha)
            order = [self._cheapest_coarse(i) for i in self.selected]
            removals = allocate(chosen, weights, target, limits, order)
        everywhere = [Removal()] * len(sizes)
        for i, removal in zip(self.selected, removals):
            everywhere[i] = removal
        return everywhere

    def _cheapest_coarse(self, layer: int) -> float:
        """The lowest score of a coarse unit of ``layer``, which goes first where equal rates leave
        a choice of layer; 0 where it has none."""
        coarse = [s for kind in COARSE if len(s := self.scores.layers[layer].get(kind, ()))]
        return min((float(s.min()) for s in coarse), default=0.0)


def whole_only(candidates: Sequence[Candidate], layers: int) -> Allocator:
    """Nothing but whole sublayers, in order of loss per parameter."""
    return lambda target: nearest(candidates, layers, target)


def whole_and_thinned(
    sizes: Sequence[LayerSize],
    candidates: Sequence[Candidate],
    price: float,
    thin: Thinning,
) -> Allocator:
    """Sublayers that cost less than ``price`` per parameter go whole, the others are thinned.

    ``price`` is what thinning costs, in nats per parameter; infinite where it cannot do it alone.
    """
    limits = limits_of(thin.config)
    half = half_unit(sizes, limits)

    def allocated(target: float) -> list[Removal]:
        def left(whole: list[Removal]) -> float:
            return target - removed_parameters(sizes, whole)

        def enough(whole: list[Removal]) -> bool:
            return left(whole) <= reachable(remaining(sizes, whole), limits)[1] + half

        whole = cheaper_than(price, candidates, len(sizes), target, enough)
        if left(whole) <= half:
            return whole
        rest = remaining(sizes, whole)
        return merged(whole, thin(rest, min(left(whole), reachable(rest, limits)[1])))

    return allocated


def allocate_budget(
    budget: Budget, sizes: Sequence[LayerSize], allocator: Allocator, limits: Limits
) -> list[Removal]:
    """Removals that ``allocator`` makes for ``budget``: the nearest, or the fewest that save
    enough.

    Raises BudgetError, in the budget's currency, when the limits rule it out.
    """
    step = max(2 * half_unit(sizes, limits), 1)
    if not budget.at_least:
        check_reachable(sizes, round(budget.need), limits)
        removals = allocator(budget.need)
        removed = removed_parameters(sizes, removals)
        only_whole = not any(s.prunable for s in sizes)
        short = budget.need - removed - max(step / 2, coarsest_step(sizes, limits))
        if any(s.whole for s in sizes) and not only_whole and short > 1:
            raise BudgetError(0, removed)  # what is not thinned is more than the budget leaves
        return removals
    low, high = reachable(sizes, limits)
    best = allocator(high)
    most = budget.total(sizes, best)
    if most < budget.need:
        raise BudgetError(0, most)
    if budget.table is None:
        low = min(max(low, budget.need - step), high)
    while high - low > step / 2:
        middle = (low + high) / 2
        trial = allocator(middle)
        if budget.total(sizes, trial) >= budget.need:
            best, high = trial, middle
        else:
            low = middle
    return best


def first_guess(budget: Budget, sizes: Sequence[LayerSize]) -> float:
    """About how many parameters the budget takes, before anything is measured by it."""
    if budget.table is None:
        return budget.need
    everything = sum(
        budget.table.milliseconds(g.units)
        for g, size in zip(budget.table.sizes, sizes, strict=True)
        if size.prunable or size.whole
    )
    share = budget.need / everything if everything else math.inf
    return min(share, 1.0) * sum(s.whole or s.prunable for s in sizes)


def _thinnable(size: LayerSize) -> list[str]:
    """The kinds of sublayers of which units may go."""
    return [kind for kind, part in size.sublayers.items() if part.units]
