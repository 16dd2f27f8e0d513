"""How a budget is allocated to the layers: units to remove per sublayer.

Counts only, no weights and no scores' tensors, so everything here runs in
milliseconds. Formulas: the allocation section of docs/dev/numerics.md.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from fastprune.errors import InputError
from fastprune.models.families import COARSE, FINEST, UNITS
from fastprune.pruning.sizes import (
    LayerSize,
    Limits,
    Removal,
    check_reachable,
    half_unit,
    merged,
    parameters,
    remaining,
    removed_parameters,
    whole_parameters,
)

ROUNDING = 1e-9
"""By so much of a unit a computed rate may miss the integer that it stands for."""


def layer_weights(sensitivity: Sequence[float], rule: str, alpha: float) -> list[float]:
    """Relative rates of the layers: ŝ^(-α) for ``inverse``, ŝ^α for ``proportional``.

    ŝ is the sensitivity divided by its mean; sensitivities at or below a thousandth of the mean
    (a layer whose removal does no harm, or helps) count as that thousandth.
    """
    mean = sum(max(s, 0.0) for s in sensitivity) / len(sensitivity)
    if not math.isfinite(mean) or mean <= 0:
        raise InputError(
            "no layer sensitivity is a positive finite number, so they cannot be compared; use "
            "another --layer-importance, or --allocation uniform"
        )
    exponent = {"inverse": -alpha, "proportional": alpha}[rule]
    return [max(s / mean, 1e-3) ** exponent for s in sensitivity]


def allocate(
    sizes: Sequence[LayerSize],
    weights: Sequence[float],
    target: int,
    limits: Limits,
    order: Sequence[float] | None = None,
) -> list[Removal]:
    """Allocate ``target`` parameters to the layers in proportion to ``weights``.

    A layer's rate is its weight times a common scale, held within ``limits``. Units of the coarse
    kinds are apportioned first; the finest then fill each layer up to its rate, which brings the
    total within half a unit of the target. ``order`` breaks ties between layers for the coarse part
    (lower goes first). Raises InputError with the reachable range when the limits rule the target
    out.
    """
    check_reachable(sizes, target, limits)
    rates = _rates(sizes, weights, target, limits)
    order = order if order is not None else range(len(sizes))
    best: tuple[float, list[Removal]] | None = None
    for coarse in _apportioned(sizes, rates, limits, order):
        removals = _filled_up(sizes, rates, coarse, target, limits)
        error = abs(removed_parameters(sizes, removals) - target)
        if error <= half_unit(sizes, limits):
            return removals
        if best is None or error < best[0]:
            best = (error, removals)
    assert best is not None
    return best[1]


def allocate_same(
    sizes: Sequence[LayerSize],
    target: int,
    limits: Limits,
    fits: Callable[[Removal], bool] = lambda coarse: True,
) -> list[Removal]:
    """The same counts in every layer that may lose any, as near to ``target`` as a step in all of
    them allows.

    ``fits`` says of a removal of coarse units whether a standard model can have what is left.
    Raises InputError where that leaves nothing to remove.
    """
    thinned = [size for size in sizes if size.prunable] or sizes
    if any(size != thinned[0] for size in thinned):
        raise InputError("the uniform layout needs layers of one size; use --layout per-layer")
    check_reachable(sizes, target, limits)
    one, share = thinned[0], target / len(thinned)
    rate = share / one.prunable
    mixes = itertools.product(*(limits.counts(one, kind) for kind in COARSE))
    every = [Removal(dict(zip(COARSE, mix))) for mix in mixes]
    coarse = [removal for removal in every if fits(removal)] or [Removal()]
    if not one.finest.units and len(every) > 1 and not any(r.units for r in coarse):
        units = " or ".join(UNITS[kind] for kind in COARSE)
        raise InputError(
            f"the uniform layout: no standard model of this family has layers with fewer {units}; "
            f"let {UNITS[FINEST]} go as well with --structures, or use --layout per-layer"
        )

    def off(removal: Removal) -> float:
        return sum(abs(removal.count(k) - rate * one.sublayers[k].units) for k in COARSE)

    coarse.sort(key=lambda removal: (off(removal), -sum(removal.units.values())))
    found = [_filled_up([one], [rate], [removal], share, limits)[0] for removal in coarse]
    half = half_unit(sizes, limits)
    # Of those within half a unit the first: its sublayers lose the most equal shares.
    nearest = min(found, key=lambda removal: max(abs(parameters(one, removal) - share), half))
    return [nearest if size.prunable else Removal() for size in sizes]


def fit_channels(
    sizes: Sequence[LayerSize], removals: Sequence[Removal], target: int, limits: Limits
) -> list[Removal]:
    """``removals`` with their finest units changed a little, in proportion, to remove ``target``
    parameters."""
    finest = sum(r.count(FINEST) * s.finest.cost for r, s in zip(removals, sizes))
    others = removed_parameters(sizes, removals) - finest
    factor = max(target - others, 0) / finest if finest else 1.0
    left = remaining(sizes, removals)
    coarse = [Removal({kind: r.count(kind) for kind in COARSE}) for r in removals]
    rates = [
        (parameters(s, c) + r.count(FINEST) * factor * s.finest.cost) / s.prunable
        if s.prunable
        else 0.0
        for r, c, s in zip(removals, coarse, left)
    ]
    target -= sum(whole_parameters(s, r) for s, r in zip(sizes, removals))
    return merged(removals, _filled_up(left, rates, coarse, target, limits))


def _filled_up(
    sizes: Sequence[LayerSize],
    rates: Sequence[float],
    coarse: Sequence[Removal],
    target: float,
    limits: Limits,
) -> list[Removal]:
    """``coarse`` removals, and the finest units up to each layer's rate: ``target`` parameters.

    The limits hold, or are passed by less than a unit where the target is out of reach otherwise.
    Where a finest unit costs more in some layers than in others, as in those with experts, the
    dearest are apportioned by their rates, and the cheapest fill up what is left.
    """
    removals = list(coarse)
    costs = sorted({s.finest.cost for s in sizes if s.finest.units}, reverse=True)
    for cost in costs:
        own = [i for i, s in enumerate(sizes) if s.finest.units and s.finest.cost == cost]
        if cost == costs[-1]:
            others = removed_parameters(sizes, removals)
            others -= sum(parameters(sizes[i], removals[i]) for i in own)
            wanted = target - others
        else:
            wanted = sum(rates[i] * sizes[i].prunable for i in own)
        filled = _filled_up_alike(
            [sizes[i] for i in own],
            [rates[i] for i in own],
            [coarse[i] for i in own],
            wanted,
            limits,
        )
        for i, removal in zip(own, filled):
            removals[i] = removal
    return removals


def _filled_up_alike(
    sizes: Sequence[LayerSize],
    rates: Sequence[float],
    coarse: Sequence[Removal],
    target: float,
    limits: Limits,
) -> list[Removal]:
    """What `_filled_up` returns for layers whose finest units all cost the same."""
    step, counts = limits.step(FINEST), [limits.counts(s, FINEST) for s in sizes]
    cost = sizes[0].finest.cost
    taken = [parameters(s, removal) for s, removal in zip(sizes, coarse)]

    def blocks(rate: float, i: int) -> float:
        return ((rate * sizes[i].prunable - taken[i]) / cost - counts[i][0]) / step

    def bounds(rate: float, integer: Callable[[float], int]) -> list[int]:
        return [min(max(integer(blocks(rate, i)), 0), len(counts[i]) - 1) for i in layers]

    layers = range(len(sizes))
    left = target - sum(taken)
    total = _round((left - sum(c[0] for c in counts) * cost) / (cost * step))
    low, high = bounds(limits.lowest, _up), bounds(limits.highest, _down)
    if not sum(low) <= total <= sum(high) or any(a > b for a, b in zip(low, high)):
        low, high = bounds(limits.lowest, _down), bounds(limits.highest, _up)
    total = min(max(total, sum(low)), sum(high))
    wanted = [blocks(rates[i], i) for i in layers]
    removed = _apportion(wanted, low, high, total, layers)
    return [r.with_units({FINEST: c[n]}) for r, c, n in zip(coarse, counts, removed)]


def _apportioned(
    sizes: Sequence[LayerSize], rates: Sequence[float], limits: Limits, order: Sequence[float]
) -> Iterator[list[Removal]]:
    """Removals of coarse units from every layer by its rate, the nearest totals first.

    Within the nearest numbers to the limits, then beyond them: by less than a unit, for a target
    that is out of reach otherwise.
    """
    wanted = {k: [r * s.sublayers[k].units for r, s in zip(rates, sizes)] for k in COARSE}

    def bounds(rate: float, kind: str, integer: Callable[[float], int]) -> list[int]:
        return [
            min(integer(rate * s.sublayers[kind].units), limits.counts(s, kind)[-1]) for s in sizes
        ]

    for least, most in ((_round, _round), (_down, _up)):
        low = {k: bounds(limits.lowest, k, least) for k in COARSE}
        high = {k: bounds(limits.highest, k, most) for k in COARSE}
        for totals in itertools.product(
            *(_nearest_first(sum(wanted[k]), sum(low[k]), sum(high[k])) for k in COARSE)
        ):
            counts = {
                kind: _apportion(wanted[kind], low[kind], high[kind], total, order)
                for kind, total in zip(COARSE, totals)
            }
            yield [Removal({k: counts[k][i] for k in COARSE}) for i in range(len(sizes))]


def _nearest_first(wanted: float, low: int, high: int) -> list[int]:
    """Integers from ``low`` to ``high``, those nearest to ``wanted`` first."""
    middle = _round(wanted)
    return sorted(range(low, high + 1), key=lambda n: (abs(n - middle), n))


def _apportion(
    wanted: Sequence[float],
    low: Sequence[int],
    high: Sequence[int],
    total: int,
    order: Sequence[float],
) -> list[int]:
    """Integers near ``wanted``, within bounds, that sum to ``total``: largest remainder."""
    counts = [min(max(math.floor(w), a), b) for w, a, b in zip(wanted, low, high)]
    step = 1 if sum(counts) < total else -1
    queue = [(-step * (w - n), order[i], i) for i, (w, n) in enumerate(zip(wanted, counts))]
    heapq.heapify(queue)
    missing = abs(total - sum(counts))
    while missing:
        short, _, i = heapq.heappop(queue)
        if low[i] <= counts[i] + step <= high[i]:
            counts[i] += step
            missing -= 1
            heapq.heappush(queue, (short + 1, order[i], i))
    return counts


def _rates(
    sizes: Sequence[LayerSize], weights: Sequence[float], target: int, limits: Limits
) -> list[float]:
    """Rates scale·weight held within limits whose removals sum to ``target`` (bisection)."""

    def rates(scale: float) -> list[float]:
        return [min(max(scale * w, limits.lowest), limits.highest) for w in weights]

    def removed(scale: float) -> float:
        return sum(r * n for r, n in zip(rates(scale), prunable))

    prunable = [size.prunable for size in sizes]
    low, high = 0.0, 1.0 / min(weights)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) < target else (low, middle)
    return rates(high)


def _round(x: float) -> int:
    return math.floor(x + 0.5)


def _down(x: float) -> int:
    return math.floor(x + ROUNDING)


def _up(x: float) -> int:
    return math.ceil(x - ROUNDING)
