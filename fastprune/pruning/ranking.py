"""Units of all layers ranked by score per parameter: ``--allocation global``.

Counts only, no weights. Formulas: the allocation section of docs/dev/numerics.md.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Mapping, Sequence

from fastprune.models.families import FINEST, KINDS
from fastprune.pruning.sizes import LayerSize, Limits, Removal, check_reachable, half_unit

UnitScores = Sequence[Mapping[str, Sequence[float]]]
"""Of every layer the scores of its units by kind of sublayer; none of those that may not go."""


def allocate_global(
    sizes: Sequence[LayerSize],
    scores: UnitScores,
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
    factors = _level_factors(sizes, scores, alpha)
    ascending = [
        {kind: sorted(factor * x for x in own.get(kind, ())) for kind in KINDS}
        for factor, own in zip(factors, scores)
    ]
    ranking, layers = _Ranking(sizes, ascending, limits), range(len(sizes))
    half = ranking.half
    for layer, size in enumerate(sizes):
        upward = half if size.finest.units else 0  # to the nearest coarse, but to the next finest
        ranking.reach([layer], limits.lowest * size.prunable + upward)
    ranking.bring_back(layers, target + half)  # rounded up in each they may be too many
    ranking.reach(layers, target)
    ranking.reach(layers, target, beyond=2 * half)
    return [Removal(removed) for removed in ranking.removed]


class _Ranking:
    """Units of every layer, cheapest first, and how many of them are gone.

    ``scores`` are those of each layer's units by kind, ascending. Units go by as many as
    `Limits.step` says.
    """

    def __init__(
        self, sizes: Sequence[LayerSize], scores: Sequence[dict[str, list[float]]], limits: Limits
    ) -> None:
        self.sizes, self.scores, self.limits = sizes, scores, limits
        self.removed = [{k: limits.counts(size, k)[0] for k in KINDS} for size in sizes]
        self.half = half_unit(sizes, limits)

    def reach(self, layers: Sequence[int], target: float, beyond: float = 0.0) -> None:
        """Remove the cheapest units of ``layers`` until ``target`` parameters of theirs are gone.

        No layer passes its highest rate by more than ``beyond`` parameters. The finest units come
        back for a coarse one that is larger than what is missing at the end.
        """
        for layer, kind in self._remove(layers, target, beyond):
            if target - self._gone(layers) > self.half:
                self._remove_coarse((layer, kind), layers, target, beyond)

    def _remove(self, layers: Sequence[int], target: float, beyond: float) -> list[tuple[int, str]]:
        """Remove what fits, cheapest first; the layers and kinds whose coarse unit did not."""
        total = self._gone(layers)
        queue: list[tuple[float, int, int]] = []

        def push(layer: int, rank: int) -> None:
            kind = finest_first[rank]
            more = self.limits.step(kind)
            most = self.limits.counts(self.sizes[layer], kind)[-1]  # some stay
            if self.removed[layer][kind] + more <= most:
                heapq.heappush(queue, (self._price(layer, kind, more), layer, rank))

        finest_first = KINDS[::-1]
        for layer in layers:
            for rank in range(len(KINDS)):
                push(layer, rank)
        too_large = []
        while queue and target - total > self.half:
            _, layer, rank = heapq.heappop(queue)
            kind = finest_first[rank]
            cost = self._cost(layer, kind)
            most = self.limits.highest * self.sizes[layer].prunable + beyond
            if self._gone([layer]) + cost > most or total + cost > target + self.half:
                if kind != FINEST:
                    too_large.append((layer, kind))
                continue
            self._change(layer, kind, 1)
            total += cost
            push(layer, rank)
        return too_large

    def bring_back(self, layers: Sequence[int], most: float) -> None:
        """Bring back the best units until ``layers`` lack ``most`` parameters.

        The finest that a layer has; none where it is at its lowest rate or below.
        """
        total = self._gone(layers)
        while total > most and (able := [i for i in layers if self._can_give(i)]):
            best = max(able, key=lambda i: self._price(i, self._finest(i)))
            self._change(best, self._finest(best), -1)
            total -= self._cost(best, self._finest(best))

    def _can_give(self, layer: int) -> bool:
        kind = self._finest(layer)
        spare = self._gone([layer]) >= self.limits.lowest * self.sizes[layer].prunable
        return spare and self.removed[layer][kind] >= self.limits.step(kind)

    def _finest(self, layer: int) -> str:
        """The kind of the smallest units that ``layer`` has."""
        parts = self.sizes[layer].sublayers
        return next((kind for kind in reversed(KINDS) if parts[kind].units), KINDS[0])

    def _remove_coarse(
        self, unit: tuple[int, str], layers: Sequence[int], target: float, beyond: float
    ) -> None:
        """Remove a coarse ``unit``, by layer and kind, for which the best finest of ``layers`` come
        back.

        As many as bring the layer within its highest rate and the total down to ``target``; where
        that comes no nearer to the target, all stays as it is.
        """
        layer, kind = unit
        before, total = [dict(removed) for removed in self.removed], self._gone(layers)
        highest = self.limits.highest * self.sizes[layer].prunable + beyond
        self._change(layer, kind, 1)
        self.bring_back([layer], highest)
        self.bring_back(layers, target + self.half)
        excess = self._gone([layer]) - highest
        if excess > 0 or abs(self._gone(layers) - target) >= abs(total - target):
            self.removed = before

    def _gone(self, layers: Sequence[int]) -> int:
        """Parameters that ``layers`` have lost."""
        return sum(
            n * self.sizes[i].sublayers[kind].cost
            for i in layers
            for kind, n in self.removed[i].items()
        )

    def _cost(self, layer: int, kind: str) -> int:
        """Parameters that go at a time."""
        return self.limits.step(kind) * self.sizes[layer].sublayers[kind].cost

    def _price(self, layer: int, kind: str, more: int = 0) -> float:
        """Score per parameter of the last units to go when so many ``more`` are gone than now."""
        end = self.removed[layer][kind] + more
        units = self.scores[layer][kind][end - self.limits.step(kind) : end]
        return sum(units) / self._cost(layer, kind)

    def _change(self, layer: int, kind: str, times: int) -> None:
        self.removed[layer][kind] += times * self.limits.step(kind)


def _level_factors(sizes: Sequence[LayerSize], scores: UnitScores, alpha: float) -> list[float]:
    """What multiplies each layer's scores so that its level becomes its level to the ``alpha``.

    The level is the median positive score per parameter of the finest kind that has one; levels are
    relative to the highest, and a millionth at least.
    """
    levels = []
    for size, own in zip(sizes, scores):
        by_kind = (
            [x / size.sublayers[kind].cost for x in own.get(kind, ()) if x > 0]
            for kind in reversed(KINDS)
        )
        positive = next(filter(None, by_kind), None)
        levels.append(statistics.median(positive) if positive else 0.0)
    highest = max(levels, default=0.0) or 1.0
    return [max(level / highest, 1e-6) ** (alpha - 1) for level in levels]
