"""The cheapest mix of thinning levels under an exact budget: dynamic programming over curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastprune.prune.allocation import LayerSize, Limits, Removal, fit_channels, half_unit

STEPS = 32
"""Channel levels between none and all that the program may choose from."""
BINS = 4000
"""Resolution of the budget."""


@dataclass(frozen=True)
class Curve:
    """Divergence per token, in nats, of one sublayer with ``removed[i]`` units gone.

    ``kind`` is groups or channels; the first point is (0, 0), and values never fall.
    """

    layer: int
    kind: str
    removed: tuple[int, ...]
    divergence: tuple[float, ...]

    def at(self, units: int) -> float:
        """Divergence with any number of units gone: linear between measured levels."""
        if units > self.removed[-1]:
            return math.inf
        return float(np.interp(units, self.removed, self.divergence))


def choose(
    curves: Sequence[Curve], sizes: Sequence[LayerSize], target: int, limits: Limits
) -> tuple[list[Removal], float]:
    """Removals of ``target`` parameters whose predicted divergence is least, and that prediction.

    Multiple-choice knapsack over the curves' levels, within the limits of a layer; channels are
    then trimmed so that the total is within half a unit. Raises BudgetError when out of reach.
    """
    layers = sorted({c.layer for c in curves})
    by_layer = {i: [c for c in curves if c.layer == i] for i in layers}
    width = target / BINS
    # Room for half a unit beyond the target: the nearest reachable total may lie above it.
    room = BINS + 2 + math.ceil(half_unit(sizes, limits) / width)
    best = np.full(room, np.inf)
    best[0] = 0.0
    back: list[tuple[np.ndarray, list[Removal]]] = []
    for i in layers:
        options = _options(by_layer[i], sizes[i], limits)
        costs = [_parameters(sizes[i], r) for r, _ in options]
        values = np.full((len(options), room), np.inf)
        for row, (cost, (_, value)) in enumerate(zip(costs, options)):
            shift = min(round(cost / width), room)
            values[row, shift:] = best[: room - shift] + value
        pick = values.argmin(0)
        back.append((pick, [r for r, _ in options]))
        best = values[pick, np.arange(room)]
    reach = np.flatnonzero(np.isfinite(best))
    position = int(reach[np.abs(reach - BINS).argmin()])
    removals = [Removal()] * len(sizes)
    for i, (pick, options) in zip(reversed(layers), reversed(back)):
        removals[i] = options[pick[position]]
        position -= round(_parameters(sizes[i], removals[i]) / width)
    removals = fit_channels(sizes, removals, target, limits)
    return removals, predicted(curves, removals)


def predicted(curves: Sequence[Curve], removals: Sequence[Removal]) -> float:
    """Sum of the sublayers' divergences: what the whole would cost if errors only added up."""
    return sum(c.at(getattr(removals[c.layer], c.kind)) for c in curves)


def _options(curves: list[Curve], size: LayerSize, limits: Limits) -> list[tuple[Removal, float]]:
    """Combinations of levels of one layer within its limits, with their divergences."""
    groups = next((c for c in curves if c.kind == "groups"), None)
    channels = next((c for c in curves if c.kind == "channels"), None)
    step = max(limits.align, round(size.channels / STEPS / limits.align) * limits.align)
    offset = size.channels % limits.align
    found = []
    for g in groups.removed if groups else (0,):
        for c in range(offset, channels.removed[-1] + 1, step) if channels else (0,):
            removal = Removal(g, c)
            share = _parameters(size, removal) / size.prunable
            if share <= limits.highest and share >= limits.lowest - 1 / STEPS:
                value = (groups.at(g) if groups else 0.0) + (channels.at(c) if channels else 0.0)
                found.append((removal, value))
    return found or [(Removal(), 0.0)]


def _parameters(size: LayerSize, removal: Removal) -> int:
    return removal.groups * size.group_cost + removal.channels * size.channel_cost
