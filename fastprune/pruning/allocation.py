"""How a budget is spread over the layers: units to remove per sublayer.

Counts only, no weights and no scores' tensors, so everything here runs in
milliseconds. Formulas: the allocation section of docs/dev/numerics.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from fastprune.errors import InputError
from fastprune.pruning.sizes import (
    MIN_KEPT,
    LayerSize,
    Limits,
    Removal,
    channel_counts,
    check_reachable,
    half_unit,
    merged,
    parameters,
    remaining,
    removed_parameters,
    whole_parameters,
)

ROUNDING = 1e-9
"""By so much of a unit a computed rate may miss the whole number that it stands for."""


def layer_weights(sensitivity: Sequence[float], rule: str, alpha: float) -> list[float]:
    """Relative rates of the layers: ŝ^(-α) for ``inverse``, ŝ^α for ``proportional``.

    ŝ is the sensitivity divided by its mean; sensitivities at or below a thousandth of the mean
    (a layer whose removal does no harm, or helps) count as that thousandth.
    """
    mean = sum(max(s, 0.0) for s in sensitivity) / len(sensitivity)
    if not math.isfinite(mean) or mean <= 0:
        raise InputError("the layer sensitivities are not positive finite numbers")
    exponent = {"inverse": -alpha, "proportional": alpha}[rule]
    return [max(s / mean, 1e-3) ** exponent for s in sensitivity]


def allocate(
    sizes: Sequence[LayerSize],
    weights: Sequence[float],
    target: int,
    limits: Limits,
    order: Sequence[float] | None = None,
) -> list[Removal]:
    """Spread ``target`` parameters over the layers in proportion to ``weights``.

    A layer's rate is its weight times a common scale, held within ``limits``. KV groups are
    coarse, so they are apportioned first; channels then fill each layer up to its rate, which
    brings the total within half a unit of the target. ``order`` breaks ties between layers for
    the coarse part (lower goes first). Raises InputError with the reachable range when the
    limits rule the target out.
    """
    check_reachable(sizes, target, limits)
    rates = _rates(sizes, weights, target, limits)
    order = order if order is not None else range(len(sizes))
    wanted = [r * s.groups for r, s in zip(rates, sizes)]
    best: tuple[float, list[Removal]] | None = None
    for low, high in _group_bounds(sizes, limits):
        middle = _round(sum(wanted))
        for total in sorted(range(sum(low), sum(high) + 1), key=lambda n: (abs(n - middle), n)):
            groups = _apportion(wanted, low, high, total, order)
            removals = _fill_with_channels(sizes, rates, groups, target, limits)
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
    fits: Callable[[int], bool] = lambda groups: True,
) -> list[Removal]:
    """The same counts in every layer, as near to ``target`` as whole layers of units allow.

    ``fits`` says of a number of removed KV groups whether a standard model can have what is left.
    """
    if any(size != sizes[0] for size in sizes):
        raise InputError("the uniform layout needs layers of one size; use --layout per-layer")
    check_reachable(sizes, target, limits)
    one, share = sizes[0], target / len(sizes)
    rate = share / one.prunable
    counts = [n for n in range(max(one.groups - MIN_KEPT, 0) + 1) if fits(n)] or [0]
    counts.sort(key=lambda n: (abs(n - rate * one.groups), -n))
    found = [_fill_with_channels([one], [rate], [n], share, limits)[0] for n in counts]
    half = half_unit(sizes, limits)
    # Of those within half a unit the first: its attention and its MLP lose the most equal shares.
    nearest = min(found, key=lambda removal: max(abs(parameters(one, removal) - share), half))
    return [nearest] * len(sizes)


def fit_channels(
    sizes: Sequence[LayerSize], removals: Sequence[Removal], target: int, limits: Limits
) -> list[Removal]:
    """``removals`` with the channels changed a little, in proportion, to meet ``target``."""
    channels = sum(r.channels * s.channel_cost for r, s in zip(removals, sizes))
    others = removed_parameters(sizes, removals) - channels
    factor = max(target - others, 0) / channels if channels else 1.0
    left = remaining(sizes, removals)
    rates = [
        (r.groups * s.group_cost + r.channels * factor * s.channel_cost) / s.prunable
        if s.prunable
        else 0.0
        for r, s in zip(removals, left)
    ]
    target -= sum(whole_parameters(s, r) for s, r in zip(sizes, removals))
    thinned = _fill_with_channels(left, rates, [r.groups for r in removals], target, limits)
    return merged(removals, thinned)


def _fill_with_channels(
    sizes: Sequence[LayerSize],
    rates: Sequence[float],
    groups: Sequence[int],
    target: float,
    limits: Limits,
) -> list[Removal]:
    """Beside so many ``groups`` channels up to each layer's rate, ``target`` parameters in all.

    A channel costs the same in every layer that has some. The limits hold, or are passed by less
    than a unit where the target is out of reach otherwise.
    """
    step, counts = limits.align, [channel_counts(s, limits) for s in sizes]
    cost = next((s.channel_cost for s in sizes if s.channels), 0)
    if not cost:
        return [Removal(g, 0) for g in groups]

    def blocks(rate: float, i: int) -> float:
        left = rate * sizes[i].prunable - groups[i] * sizes[i].group_cost
        return (left / cost - counts[i][0]) / step if sizes[i].channels else 0.0

    def bounds(rate: float, whole: Callable[[float], int]) -> list[int]:
        return [min(max(whole(blocks(rate, i)), 0), len(counts[i]) - 1) for i in layers]

    layers = range(len(sizes))
    left = target - sum(g * s.group_cost for g, s in zip(groups, sizes))
    total = _round((left - sum(c[0] for c in counts) * cost) / (cost * step))
    low, high = bounds(limits.lowest, _up), bounds(limits.highest, _down)
    if not sum(low) <= total <= sum(high) or any(a > b for a, b in zip(low, high)):
        low, high = bounds(limits.lowest, _down), bounds(limits.highest, _up)
    total = min(max(total, sum(low)), sum(high))
    wanted = [blocks(rates[i], i) for i in layers]
    removed = _apportion(wanted, low, high, total, layers)
    return [Removal(g, c[n]) for g, c, n in zip(groups, counts, removed)]


def _group_bounds(sizes: Sequence[LayerSize], limits: Limits) -> list[tuple[list[int], list[int]]]:
    """Least and most KV groups to remove from each layer: nearest to the limits, then beyond them.

    Beyond by less than a group, for a target that is out of reach otherwise.
    """

    def bounds(rate: float, whole: Callable[[float], int]) -> list[int]:
        return [min(whole(rate * s.groups), max(s.groups - MIN_KEPT, 0)) for s in sizes]

    nearest = bounds(limits.lowest, _round), bounds(limits.highest, _round)
    return [nearest, (bounds(limits.lowest, _down), bounds(limits.highest, _up))]


def _apportion(
    wanted: Sequence[float],
    low: Sequence[int],
    high: Sequence[int],
    total: int,
    order: Sequence[float],
) -> list[int]:
    """Whole numbers near ``wanted``, within bounds, that sum to ``total``: largest remainder."""
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
        return sum(r * s.prunable for r, s in zip(rates(scale), sizes))

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
