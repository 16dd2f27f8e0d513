"""How a budget is spread over the layers: units to remove per sublayer.

Counts only, no weights and no scores' tensors, so everything here runs in
milliseconds. Formulas: the allocation section of docs/numerics.md.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastprune.errors import InputError
from fastprune.prune.sizes import (
    MIN_KEPT,
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
    low = [min(_round(limits.lowest * s.groups), max(s.groups - MIN_KEPT, 0)) for s in sizes]
    high = [min(_round(limits.highest * s.groups), max(s.groups - MIN_KEPT, 0)) for s in sizes]
    middle = _round(sum(wanted))
    candidates = sorted(range(sum(low), sum(high) + 1), key=lambda n: (abs(n - middle), n))
    best: tuple[int, list[Removal]] | None = None
    for total in candidates:
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
    groups = min(counts, key=lambda n: (abs(n - rate * one.groups), -n))
    if not one.channels:
        return [Removal(groups, 0)] * len(sizes)
    step, offset = limits.align, one.channels % limits.align
    blocks = _round(((share - groups * one.group_cost) / one.channel_cost - offset) / step)
    most = (one.channels - offset) // step - 1
    channels = offset + step * min(max(blocks, 0), most)
    return [Removal(groups, channels)] * len(sizes)


def allocate_global(
    sizes: Sequence[LayerSize],
    group_scores: Sequence[Sequence[float]],
    channel_scores: Sequence[Sequence[float]],
    target: int,
    limits: Limits,
    alpha: float = 1.0,
) -> list[Removal]:
    """Remove the units of lowest score per parameter wherever they are, within ``limits``.

    ``alpha`` says how much of the difference between layers counts: 1 takes the scores as they are,
    0 makes all layers alike.
    """
    check_reachable(sizes, target, limits)
    factors = _level_factors(sizes, group_scores, channel_scores, alpha)
    step = limits.align
    removed = [Removal(0, s.channels % step) for s in sizes]
    queue: list[tuple[float, int, str]] = []

    def push(layer: int, kind: str) -> None:
        done, size = removed[layer], sizes[layer]
        if kind == "groups":
            ranked, start, width, cost = group_scores[layer], done.groups, 1, size.group_cost
        else:
            ranked, start, width, cost = (
                channel_scores[layer],
                done.channels,
                step,
                size.channel_cost,
            )
        if start + width <= len(ranked) - MIN_KEPT:
            price = sum(ranked[start : start + width]) / (width * cost)
            heapq.heappush(queue, (price, layer, kind))

    group_scores = [sorted(f * x for x in s) for f, s in zip(factors, group_scores)]
    channel_scores = [sorted(f * x for x in s) for f, s in zip(factors, channel_scores)]
    for layer in range(len(sizes)):
        push(layer, "groups")
        push(layer, "channels")
    half = half_unit(sizes, limits)
    too_large: list[int] = []  # layers with a KV group that did not fit
    total = removed_parameters(sizes, removed)
    while queue and target - total > half:
        _, layer, kind = heapq.heappop(queue)
        done, size = removed[layer], sizes[layer]
        more = (
            replace(done, groups=done.groups + 1)
            if kind == "groups"
            else replace(done, channels=done.channels + step)
        )
        gone = parameters(size, more)
        beyond = gone > limits.highest * size.prunable
        if beyond or total + gone - parameters(size, done) > target + half:
            if kind == "groups":
                too_large.append(layer)
            continue
        total += gone - parameters(size, done)
        removed[layer] = more
        push(layer, kind)
    for layer in too_large:
        if target - total > half:
            removed = _one_group_more(sizes, removed, layer, channel_scores, target, limits)
            total = removed_parameters(sizes, removed)
    return _raise_to_lowest(sizes, removed, limits)


def _level_factors(
    sizes: Sequence[LayerSize],
    group_scores: Sequence[Sequence[float]],
    channel_scores: Sequence[Sequence[float]],
    alpha: float,
) -> list[float]:
    """What multiplies each layer's scores so that its level becomes its level to the ``alpha``.

    The level is the median score per parameter of the channels, or of the KV groups where no
    channel has a positive one; levels are relative to the highest, and a millionth at least.
    """
    levels = []
    for size, groups, channels in zip(sizes, group_scores, channel_scores):
        positive = [s / size.channel_cost for s in channels if s > 0]
        positive = positive or [s / size.group_cost for s in groups if s > 0]
        levels.append(statistics.median(positive) if positive else 0.0)
    highest = max(levels, default=0.0) or 1.0
    return [max(level / highest, 1e-6) ** (alpha - 1) for level in levels]


def _one_group_more(
    sizes: Sequence[LayerSize],
    removals: Sequence[Removal],
    layer: int,
    ranked: Sequence[Sequence[float]],
    target: int,
    limits: Limits,
) -> list[Removal]:
    """``removals`` and a KV group of ``layer``, for which the best of the channels come back.

    As many as bring the total down to ``target`` and the layer within its highest rate; where that
    comes no nearer to the target, ``removals`` as they are. ``ranked`` are the channels' scores,
    ascending.
    """
    grown = list(removals)
    grown[layer] = replace(grown[layer], groups=grown[layer].groups + 1)
    size, step = sizes[layer], limits.align
    total = removed_parameters(sizes, grown)
    while True:
        beyond = parameters(size, grown[layer]) > limits.highest * size.prunable
        if not beyond and total <= target + half_unit(sizes, limits):
            break
        able = [i for i in ([layer] if beyond else range(len(sizes))) if grown[i].channels >= step]
        if not able:
            break
        best = max(able, key=lambda i: ranked[i][grown[i].channels - 1])
        grown[best] = replace(grown[best], channels=grown[best].channels - step)
        total -= step * sizes[best].channel_cost
    nearer = abs(total - target) < abs(removed_parameters(sizes, removals) - target)
    return grown if nearer and not beyond else list(removals)


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


def _raise_to_lowest(
    sizes: Sequence[LayerSize], removals: list[Removal], limits: Limits
) -> list[Removal]:
    """Layers below the lowest rate give channels that the others get back."""
    surplus = 0
    result = list(removals)
    for i, size in enumerate(sizes):
        missing = limits.lowest * size.prunable - parameters(size, result[i])
        if missing > 0 and size.channels:
            units = limits.align * math.ceil(missing / (size.channel_cost * limits.align))
            units = min(units, size.channels - MIN_KEPT - result[i].channels)
            result[i] = replace(result[i], channels=result[i].channels + units)
            surplus += units
    while surplus > 0:
        i = max(
            range(len(sizes)),
            key=lambda i: parameters(sizes[i], result[i]) / max(sizes[i].prunable, 1),
        )
        result[i] = replace(result[i], channels=result[i].channels - limits.align)
        surplus -= limits.align
    return result


def _fill_with_channels(
    sizes: Sequence[LayerSize],
    rates: Sequence[float],
    groups: Sequence[int],
    target: int,
    limits: Limits,
) -> list[Removal]:
    step = limits.align
    offsets = [s.channels % step for s in sizes]
    cost = next((s.channel_cost for s in sizes if s.channels), 0)
    if not cost:
        return [Removal(g, 0) for g in groups]

    def blocks(rate: float, i: int) -> float:
        left = rate * sizes[i].prunable - groups[i] * sizes[i].group_cost
        return (left / cost - offsets[i]) / step if sizes[i].channels else 0.0

    most = [max((s.channels - o) // step - 1, 0) for s, o in zip(sizes, offsets)]
    low = [min(max(_round(blocks(limits.lowest, i)), 0), most[i]) for i in range(len(sizes))]
    high = [min(max(_round(blocks(limits.highest, i)), 0), most[i]) for i in range(len(sizes))]
    left = target - sum(g * s.group_cost for g, s in zip(groups, sizes)) - sum(offsets) * cost
    total = min(max(_round(left / (cost * step)), sum(low)), sum(high))
    wanted = [blocks(rates[i], i) for i in range(len(sizes))]
    counts = _apportion(wanted, low, high, total, range(len(sizes)))
    return [Removal(g, o + step * n) for g, o, n in zip(groups, offsets, counts)]


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
