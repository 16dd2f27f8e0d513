"""The cheapest mix of thinning levels under an exact budget: dynamic programming over curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastprune.models.families import COARSE, FINEST, KINDS
from fastprune.pruning.allocation import fit_channels
from fastprune.pruning.sizes import (
    BudgetError,
    LayerSize,
    Limits,
    Removal,
    half_unit,
    parameters,
    remaining,
    removed_parameters,
    unit_parameters,
)

STEPS = 32
"""Levels of the finest units between none and all that the program may choose from."""
BINS = 4000
"""Resolution of the budget."""


@dataclass(frozen=True)
class Curve:
    """Divergence per token, in nats, of one sublayer with ``removed[i]`` units gone.

    Where the sublayer goes as a ``whole``, that is the one unit. Values never fall. Of the dense
    model the first point is (0, 0); of a thinned model the point it is at has divergence 0, and
    what gives units back less than that.
    """

    layer: int
    kind: str
    removed: tuple[int, ...]
    divergence: tuple[float, ...]
    whole: bool = False

    @classmethod
    def rising(
        cls, layer: int, kind: str, points: Mapping[int, float], *, whole: bool = False
    ) -> Curve:
        """The curve through ``points``; one below its predecessor is noise, and raised to that."""
        removed = sorted(points)
        values = itertools.accumulate((points[n] for n in removed), max)
        return cls(layer, kind, tuple(removed), tuple(values), whole)

    def of(self, removal: Removal) -> float:
        """What ``removal`` adds to the divergence by what it takes of this sublayer."""
        return self.at(self.kind in removal.gone if self.whole else removal.count(self.kind))

    def at(self, units: int) -> float:
        """Divergence with any number of units gone: linear between measured levels.

        Beyond the last level it rises on as between the last two; below the first, or off the
        only one, it is infinite.
        """
        beyond = units - self.removed[-1]
        if beyond > 0 and len(self.removed) > 1:
            (start, end), (low, high) = self.removed[-2:], self.divergence[-2:]
            return high + beyond * (high - low) / (end - start)
        if beyond > 0 or units < self.removed[0]:
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

    Multiple-choice knapsack over the curves' levels, within the limits of a layer; the finest units
    are then trimmed so that the total is within half a unit. Limits are passed by less than a unit
    where the target is out of reach otherwise. Where ``saved`` says, layer by layer, what a removal
    saves, ``target`` is a sum of that, such as milliseconds, and at least so much is saved. Raises
    BudgetError when out of reach.
    """
    half = half_unit(sizes, limits)
    removals = _cheapest(curves, sizes, target, limits, saved, slack=0.5)
    if saved is None and abs(removed_parameters(sizes, removals) - target) > half:
        removals = _cheapest(curves, sizes, target, limits, saved, slack=1.0)
    return removals, predicted(curves, removals)


def _cheapest(
    curves: Sequence[Curve],
    sizes: Sequence[LayerSize],
    target: float,
    limits: Limits,
    saved: Sequence[Callable[[Removal], float]] | None,
    slack: float,
) -> list[Removal]:
    """What `choose` returns, when ``slack`` units of a layer may be missing from its limits."""
    layers = sorted({c.layer for c in curves})
    options = {
        i: _options([c for c in curves if c.layer == i], sizes[i], limits, slack) for i in layers
    }
    price: Sequence[Callable[[Removal], float]]
    price = saved or [partial(parameters, size) for size in sizes]
    dearest = max(price[i](r) for i in layers for r, _ in options[i])
    width = max(target, dearest) / BINS or 1.0
    aim = math.ceil(target / width - 1e-6)
    bins = {i: [price[i](r) / width for r, _ in options[i]] for i in layers}
    if saved is None:
        # Room for half a unit beyond the target: the nearest reachable total may lie above it.
        beyond = half_unit(sizes, limits) / width
        shifts = {i: [round(n) for n in bins[i]] for i in layers}
    else:
        # Room for one level beyond it; rounded down, so that what is counted is really saved.
        beyond = max(max(row) for row in bins.values())
        shifts = {i: [math.floor(n) for n in bins[i]] for i in layers}
    least = sum(min(row) for row in shifts.values())
    room = max(aim, least) + 2 + math.ceil(beyond)
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
        position = int(reach[np.abs(reach - aim).argmin()])
    elif reach[-1] < aim:
        raise BudgetError(0, reach[-1] * width)
    else:
        position = aim + int(best[aim:].argmin())
    removals = [Removal()] * len(sizes)
    for i in reversed(layers):
        row = picks[i][position]
        removals[i] = options[i][row][0]
        position -= shifts[i][row]
    if saved is None:
        removals = fit_channels(sizes, removals, round(target), limits)
    return removals


def predicted(curves: Sequence[Curve], removals: Sequence[Removal]) -> float:
    """Sum of the sublayers' divergences: that of the model if errors only added up."""
    return sum(c.of(removals[c.layer]) for c in curves)


def _options(
    curves: list[Curve], size: LayerSize, limits: Limits, slack: float
) -> list[tuple[Removal, float]]:
    """Combinations of levels of one layer within its limits, with their divergences.

    The finest units are trimmed later, so levels a little below the lowest rate count too. Of a
    layer without any ``slack`` coarse units may be missing or too many.
    """
    ways = [_ways([c for c in curves if c.kind == kind], size, limits) for kind in KINDS]
    kinds = [KINDS.index(c.kind) for c in curves]
    values = [[c.of(way) for way in ways[k]] for c, k in zip(curves, kinds)]
    rest: dict[Set[str], LayerSize] = {}
    found = []
    for mix in itertools.product(*(range(len(own)) for own in ways)):
        chosen = [own[n] for own, n in zip(ways, mix)]
        units = {kind: n for way in chosen for kind, n in way.units.items()}
        removal = Removal(units, frozenset().union(*(way.gone for way in chosen)))
        if removal.gone not in rest:
            (rest[removal.gone],) = remaining([size], [removal])
        outside = _outside(rest[removal.gone], removal, limits, slack)
        found.append((removal, sum(own[mix[k]] for own, k in zip(values, kinds)), outside))
    least = min(outside for *_, outside in found)
    return [(r, v) for r, v, outside in found if outside == least]


def _outside(left: LayerSize, removal: Removal, limits: Limits, slack: float) -> float:
    """Parameters by which the units of ``removal`` miss the limits of what is ``left`` to thin."""
    gone, prunable = unit_parameters(left, removal), left.prunable
    loose = 0.0
    if not left.finest.units:
        loose = slack * max(left.sublayers[kind].cost for kind in COARSE)
    lowest = limits.lowest * prunable - max(prunable / STEPS, loose)
    return max(lowest - gone, gone - limits.highest * prunable - loose, 0.0)


def _ways(curves: Sequence[Curve], size: LayerSize, limits: Limits) -> list[Removal]:
    """What may go of one sublayer by its ``curves``: each of its levels, or all of it."""
    found = [Removal()]
    for curve in curves:
        if not curve.whole:
            found = [Removal({curve.kind: n}) for n in _levels(curve, size, limits)]
    return found + [Removal(gone={curve.kind}) for curve in curves if curve.whole]


def _levels(curve: Curve, size: LayerSize, limits: Limits) -> Sequence[int]:
    """Levels to choose from: what was measured, of the finest units a grid and what was measured
    as far as ``limits`` allow it."""
    if curve.kind != FINEST:
        return curve.removed
    removed, align, units = curve.removed, limits.align, size.finest.units
    offset = units % align
    step = max(align, round(units / STEPS / align) * align)
    grid = range(max(removed[0], offset), removed[-1] + 1, step)
    return sorted({*grid, *(n for n in removed if n >= offset and (n - offset) % align == 0)})
