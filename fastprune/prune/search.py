"""The cheapest mix of thinning levels under an exact budget: dynamic programming over curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastprune.prune.allocation import fit_channels
from fastprune.prune.sizes import (
    BudgetError,
    LayerSize,
    Limits,
    Removal,
    half_unit,
    parameters,
    remaining,
)

STEPS = 32
"""Channel levels between none and all that the program may choose from."""
BINS = 4000
"""Resolution of the budget."""


@dataclass(frozen=True)
class Curve:
    """Divergence per token, in nats, of one sublayer with ``removed[i]`` units gone.

    ``kind`` is groups or channels, or attention or mlp for the whole sublayer, which then is the
    one unit. The first point is (0, 0), and values never fall.
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
    curves: Sequence[Curve],
    sizes: Sequence[LayerSize],
    target: float,
    limits: Limits,
    saved: Sequence[Callable[[Removal], float]] | None = None,
) -> tuple[list[Removal], float]:
    """Removals of ``target`` parameters whose predicted divergence is least, and that prediction.

    Multiple-choice knapsack over the curves' levels, within the limits of a layer; channels are
    then trimmed so that the total is within half a unit. Where ``saved`` says, layer by layer,
    what a removal saves, ``target`` is a sum of that, such as milliseconds, and at least so much
    is saved. Raises BudgetError when out of reach.
    """
    layers = sorted({c.layer for c in curves})
    options = {i: _options([c for c in curves if c.layer == i], sizes[i], limits) for i in layers}
    width = target / BINS
    price: Sequence[Callable[[Removal], float]]
    price = saved or [partial(parameters, size) for size in sizes]
    bins = {i: [price[i](r) / width for r, _ in options[i]] for i in layers}
    if saved is None:
        # Room for half a unit beyond the target: the nearest reachable total may lie above it.
        beyond = half_unit(sizes, limits) / width
        shifts = {i: [round(n) for n in bins[i]] for i in layers}
    else:
        # Room for one level beyond it; rounded down, so that what is counted is really saved.
        beyond = max(max(row) for row in bins.values())
        shifts = {i: [math.floor(n) for n in bins[i]] for i in layers}
    room = BINS + 2 + math.ceil(beyond)
    best = np.full(room, np.inf)
    best[0] = 0.0
    picks: dict[int, np.ndarray] = {}
    for i in layers:
        values = np.full((len(options[i]), room), np.inf)
        for row, (shift, (_, value)) in enumerate(zip(shifts[i], options[i])):
            values[row, shift:] = best[: max(room - shift, 0)] + value
        picks[i] = values.argmin(0)
        best = values[picks[i], np.arange(room)]
    reach = np.flatnonzero(np.isfinite(best))
    if saved is None:
        position = int(reach[np.abs(reach - BINS).argmin()])
    elif reach[-1] < BINS:
        raise BudgetError(0, reach[-1] * width)
    else:
        position = BINS + int(best[BINS:].argmin())
    removals = [Removal()] * len(sizes)
    for i in reversed(layers):
        row = picks[i][position]
        removals[i] = options[i][row][0]
        position -= shifts[i][row]
    if saved is None:
        removals = fit_channels(sizes, removals, round(target), limits)
    return removals, predicted(curves, removals)


def predicted(curves: Sequence[Curve], removals: Sequence[Removal]) -> float:
    """Sum of the sublayers' divergences: what the whole would cost if errors only added up."""
    return sum(c.at(getattr(removals[c.layer], c.kind)) for c in curves)


def _options(curves: list[Curve], size: LayerSize, limits: Limits) -> list[tuple[Removal, float]]:
    """Combinations of levels of one layer within its limits, with their divergences."""
    by_kind = {c.kind: c for c in curves}
    groups, channels = by_kind.get("groups"), by_kind.get("channels")
    step = max(limits.align, round(size.channels / STEPS / limits.align) * limits.align)
    offset = size.channels % limits.align
    attention = [Removal(g, 0) for g in (groups.removed if groups else (0,))]
    mlp = [
        Removal(0, c) for c in (range(offset, channels.removed[-1] + 1, step) if channels else (0,))
    ]
    if "attention" in by_kind:
        attention.append(Removal(attention=True))
    if "mlp" in by_kind:
        mlp.append(Removal(mlp=True))
    found = []
    for a, m in itertools.product(attention, mlp):
        removal = Removal(a.groups, m.channels, a.attention, m.mlp)
        (left,) = remaining([size], [removal])
        share = (parameters(left, Removal(a.groups, m.channels))) / max(left.prunable, 1)
        lowest = limits.lowest if left.prunable else 0.0
        if share <= limits.highest and share >= lowest - 1 / STEPS:
            found.append((removal, sum(c.at(getattr(removal, c.kind)) for c in curves)))
    return found or [(Removal(), 0.0)]
