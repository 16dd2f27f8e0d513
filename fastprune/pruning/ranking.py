"""Units of all layers ranked by score per parameter: ``--allocation global``.

Counts only, no weights. Formulas: the allocation section of docs/dev/numerics.md.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fastprune.pruning.sizes import (
    MIN_KEPT,
    LayerSize,
    Limits,
    Removal,
    channel_counts,
    check_reachable,
    half_unit,
    parameters,
)

Kind = Literal["groups", "channels"]


def allocate_global(
    sizes: Sequence[LayerSize],
    group_scores: Sequence[Sequence[float]],
    channel_scores: Sequence[Sequence[float]],
    target: int,
    limits: Limits,
    alpha: float = 1.0,
) -> list[Removal]:
    """Remove the units of lowest score per parameter wherever they are, within ``limits``.

    Each layer first loses what the lowest rate asks for; then the cheapest go of all. ``alpha``
    says how much of the difference between layers counts: 1 takes the scores as they are, 0 makes
    all layers alike. Raises InputError with the reachable range when the limits rule the target
    out; they are passed by less than a unit where it is out of reach otherwise.
    """
    check_reachable(sizes, target, limits)
    factors = _level_factors(sizes, group_scores, channel_scores, alpha)
    scores: dict[Kind, list[list[float]]] = {
        "groups": [sorted(f * x for x in s) for f, s in zip(factors, group_scores)],
        "channels": [sorted(f * x for x in s) for f, s in zip(factors, channel_scores)],
    }
    ranking, layers = _Ranking(sizes, scores, limits), range(len(sizes))
    half = ranking.half
    for layer, size in enumerate(sizes):
        upward = half if size.channels else 0  # to the nearest group, but to the next channel
        ranking.reach([layer], limits.lowest * size.prunable + upward)
    ranking.bring_back(layers, target + half)  # rounded up in each they may be too many
    ranking.reach(layers, target)
    ranking.reach(layers, target, beyond=2 * half)
    return ranking.removed


class _Ranking:
    """Units of every layer, cheapest first, and how many of them are gone.

    ``scores`` are those of the KV groups and of the channels of each layer, ascending. Channels go
    by as many as the alignment.
    """

    def __init__(
        self, sizes: Sequence[LayerSize], scores: dict[Kind, list[list[float]]], limits: Limits
    ) -> None:
        self.sizes, self.scores, self.limits = sizes, scores, limits
        self.removed = [Removal(0, channel_counts(size, limits)[0]) for size in sizes]
        self.half = half_unit(sizes, limits)

    def reach(self, layers: Sequence[int], target: float, beyond: float = 0.0) -> None:
        """Remove the cheapest units of ``layers`` until ``target`` parameters of theirs are gone.

        No layer passes its highest rate by more than ``beyond`` parameters. Channels come back for
        a KV group that is larger than what is missing at the end.
        """
        for layer in self._remove(layers, target, beyond):
            if target - self._gone(layers) > self.half:
                self._remove_group(layer, layers, target, beyond)

    def _remove(self, layers: Sequence[int], target: float, beyond: float) -> list[int]:
        """Remove what fits, cheapest first; the layers with a KV group that did not."""
        total = self._gone(layers)
        queue: list[tuple[float, int, Kind]] = []

        def push(layer: int, kind: Kind) -> None:
            more, ranked = self._width(kind), self.scores[kind][layer]
            if getattr(self.removed[layer], kind) + more <= len(ranked) - MIN_KEPT:
                heapq.heappush(queue, (self._price(layer, kind, more), layer, kind))

        for layer in layers:
            for kind in self.scores:
                push(layer, kind)
        too_large = []
        while queue and target - total > self.half:
            _, layer, kind = heapq.heappop(queue)
            size, cost = self.sizes[layer], self._cost(layer, kind)
            most = self.limits.highest * size.prunable + beyond
            gone = parameters(size, self.removed[layer]) + cost
            if gone > most or total + cost > target + self.half:
                if kind == "groups":
                    too_large.append(layer)
                continue
            self._change(layer, kind, 1)
            total += cost
            push(layer, kind)
        return too_large

    def bring_back(self, layers: Sequence[int], most: float) -> None:
        """Bring back the best units until ``layers`` lack ``most`` parameters.

        Channels where a layer has some, else KV groups; none where it is at its lowest rate or
        below.
        """
        total = self._gone(layers)
        while total > most and (able := [i for i in layers if self._can_give(i)]):
            best = max(able, key=lambda i: self._price(i, self._finest(i)))
            self._change(best, self._finest(best), -1)
            total -= self._cost(best, self._finest(best))

    def _can_give(self, layer: int) -> bool:
        size, kind = self.sizes[layer], self._finest(layer)
        spare = parameters(size, self.removed[layer]) >= self.limits.lowest * size.prunable
        return spare and getattr(self.removed[layer], kind) >= self._width(kind)

    def _finest(self, layer: int) -> Kind:
        """The smallest units that ``layer`` has."""
        return "channels" if self.sizes[layer].channels else "groups"

    def _remove_group(
        self, layer: int, layers: Sequence[int], target: float, beyond: float
    ) -> None:
        """Remove a KV group of ``layer``, for which the best channels of ``layers`` come back.

        As many as bring the layer within its highest rate and the total down to ``target``; where
        that comes no nearer to the target, all stays as it is.
        """
        before, total = list(self.removed), self._gone(layers)
        highest = self.limits.highest * self.sizes[layer].prunable + beyond
        self._change(layer, "groups", 1)
        self.bring_back([layer], highest)
        self.bring_back(layers, target + self.half)
        excess = self._gone([layer]) - highest
        if excess > 0 or abs(self._gone(layers) - target) >= abs(total - target):
            self.removed = before

    def _gone(self, layers: Sequence[int]) -> int:
        """Parameters that ``layers`` have lost."""
        return sum(parameters(self.sizes[i], self.removed[i]) for i in layers)

    def _width(self, kind: Kind) -> int:
        """Units that go at a time."""
        return self.limits.align if kind == "channels" else 1

    def _cost(self, layer: int, kind: Kind) -> int:
        """Parameters that go at a time."""
        size = self.sizes[layer]
        return self._width(kind) * (size.group_cost if kind == "groups" else size.channel_cost)

    def _price(self, layer: int, kind: Kind, more: int = 0) -> float:
        """Score per parameter of the last units to go when so many ``more`` are gone than now."""
        end = getattr(self.removed[layer], kind) + more
        units = self.scores[kind][layer][end - self._width(kind) : end]
        return sum(units) / self._cost(layer, kind)

    def _change(self, layer: int, kind: Kind, times: int) -> None:
        gone = getattr(self.removed[layer], kind) + times * self._width(kind)
        self.removed[layer] = replace(self.removed[layer], **{kind: gone})


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
