"""The cheapest mix of thinning levels under an exact budget: dynamic programming over curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

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
)

STEPS = 32
"""Channel levels between none and all that the program may choose from."""
BINS = 4000
"""Resolution of the budget."""


@dataclass(frozen=True)
class Curve:
    """Divergence per token, in nats, of one sublayer with ``removed[i]`` units gone.

    ``kind`` is groups or channels, or attention or mlp for the whole sublayer, which then is the
    one unit. Values never fall. Of the dense model the first point is (0, 0); of a thinned model
    the point it is at has divergence 0, and what gives units back less than that.
    """

    layer: int
    kind: str
    removed: tuple[int, ...]
    divergence: tuple[float, ...]

    @classmethod
    def rising(
        cls, layer: int, kind: str, points: Mapping[int, float], *, whole: bool = False
    ) -> Curve:
        """The curve through ``points``; one below its predecessor is noise, and raised to that."""
        kind = kind if whole else {"attention": "groups", "mlp": "channels"}.get(kind, kind)
        removed = sorted(points)
        values = itertools.accumulate((points[n] for n in removed), max)
        return cls(layer, kind, tuple(removed), tuple(values))

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

    Multiple-choice knapsack over the curves' levels, within the limits of a layer; channels are
    then trimmed so that the total is within half a unit. Limits are passed by less than a unit
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
    """Sum of the sublayers' divergences: what the whole would cost if errors only added up."""
    return sum(c.at(getattr(removals[c.layer], c.kind)) for c in curves)


def _options(
    curves: list[Curve], size: LayerSize, limits: Limits, slack: float
) -> list[tuple[Removal, float]]:
    """Combinations of levels of one layer within its limits, with their divergences.

    Channels are trimmed later, so levels a little below the lowest rate count too. Of a layer
    without channels ``slack`` KV groups may be missing or too many.
    """
    by_kind = {c.kind: c for c in curves}
    attention = [Removal(groups=g) for g in _groups(by_kind)]
    mlp = [Removal(channels=c) for c in _channels(by_kind, size, limits)]
    if "attention" in by_kind:
        attention.append(Removal(attention=True))
    if "mlp" in by_kind:
        mlp.append(Removal(mlp=True))
    found = []
    for a, m in itertools.product(attention, mlp):
        removal = Removal(a.groups, m.channels, a.attention, m.mlp)
        (left,) = remaining([size], [removal])
        gone = parameters(left, Removal(a.groups, m.channels))
        loose = 0.0 if left.channels else slack * left.group_cost
        lowest = limits.lowest * left.prunable - max(left.prunable / STEPS, loose)
        outside = max(lowest - gone, gone - limits.highest * left.prunable - loose, 0.0)
        value = sum(c.at(getattr(removal, c.kind)) for c in curves)
        found.append((removal, value, outside))
    least = min(outside for *_, outside in found)
    return [(r, v) for r, v, outside in found if outside == least]


def _groups(by_kind: Mapping[str, Curve]) -> Sequence[int]:
    return by_kind["groups"].removed if "groups" in by_kind else (0,)


def _channels(by_kind: Mapping[str, Curve], size: LayerSize, limits: Limits) -> Sequence[int]:
    """Channel levels: a grid, and what was measured as far as ``limits`` allow it."""
    if "channels" not in by_kind:
        return (0,)
    removed, align = by_kind["channels"].removed, limits.align
    offset = size.channels % align
    step = max(align, round(size.channels / STEPS / align) * align)
    grid = range(max(removed[0], offset), removed[-1] + 1, step)
    return sorted({*grid, *(c for c in removed if c >= offset and (c - offset) % align == 0)})
