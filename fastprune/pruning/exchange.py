"""Exchange: layers trade units while the pruned model as a whole comes closer to the dense one.

What `search` adds up was measured one sublayer at a time in the dense model, and errors of several
layers do not add up. Here the model is thinned as it will be, and of every sublayer is measured
what one level less and one more is worth *there*; the mix is chosen anew within that reach, and
kept if the divergence of the model falls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fastprune.models.families import KINDS
from fastprune.pruning.allocation import allocate, fit_channels
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.curves import Search, Thinned, measure_curves
from fastprune.pruning.divergence import Yardstick
from fastprune.pruning.masking import DenseOutputs, mask, preserved
from fastprune.pruning.plan import Plan
from fastprune.pruning.search import choose
from fastprune.pruning.sizes import (
    LayerSize,
    Limits,
    Removal,
    merged,
    remaining,
    whole_parameters,
)

log = logging.getLogger("fastprune")

REACH = 1 / 8
"""Share of its channels that a layer may give or take in the first round, half in the next."""
LEAST = 1 / 64
"""No round goes below this share."""


@dataclass(frozen=True)
class Problem:
    """What an exchange must keep to: sizes, limits, and the budget as `choose` reads it."""

    sizes: Sequence[LayerSize]
    limits: Limits
    target: float
    saved: Sequence[Callable[[Removal], float]] | None = None

    def halfway_to_equal(self, removals: Sequence[Removal]) -> list[Removal] | None:
        """Removals between these and equal shares; None where whole sublayers go or time counts."""
        if self.saved is not None or any(r.gone for r in removals):
            return None
        thin = [i for i, size in enumerate(self.sizes) if size.prunable]
        chosen = [self.sizes[i] for i in thin]
        shares = allocate(chosen, [1.0] * len(thin), round(self.target), self.limits)
        equal = dict(zip(thin, shares, strict=True))
        return self.between(removals, [equal.get(i, r) for i, r in enumerate(removals)], 0.5)

    def left(self, removals: Sequence[Removal]) -> float:
        """What of a budget of parameters is not met by whole sublayers alone."""
        if self.saved is not None:
            return self.target
        return self.target - sum(map(whole_parameters, self.sizes, removals))

    def between(self, a: Sequence[Removal], b: Sequence[Removal], share: float) -> list[Removal]:
        """From ``a`` so far towards ``b``, which loses the same sublayers, within the budget."""
        mixed = [
            x.with_units({k: round(x.count(k) + share * (y.count(k) - x.count(k))) for k in KINDS})
            for x, y in zip(a, b, strict=True)
        ]
        return fit_channels(self.sizes, mixed, round(self.target), self.limits)


@dataclass(frozen=True)
class Trial:
    """The uncut model thinned by one mix after the other, and how far each takes it."""

    calibration: Calibration
    fitting: Calibration | None
    dense: DenseOutputs
    yardstick: Yardstick
    plan_of: Callable[[Sequence[Removal]], Plan]

    def __call__(self, removals: Sequence[Removal]) -> float:
        """Divergence of the model thinned by ``removals``, in nats a token; it stays so.

        All processes go by what the first one measures: they must take the same turns.
        """
        layers = self.calibration.layers
        self.dense.restore()
        mask(layers, self.plan_of(removals), self.fitting)
        return self.calibration.processes.from_first(self.yardstick.divergence(layers))


def exchange(
    search: Search,
    problem: Problem,
    start: Sequence[Removal],
    plan_of: Callable[[Sequence[Removal]], Plan],
    rounds: int,
) -> list[Removal]:
    """The removals that ``rounds`` of exchange make of ``start``, of the same budget.

    The windows of ``search`` that judge measure; where the result will be compensated the others
    fit. Sublayers that are gone stay gone. The model is left as it was.
    """
    thinnable = any(size.prunable for size in remaining(problem.sizes, start))
    if not (rounds and thinnable and problem.left(start) > 0):
        return list(start)
    calibration, yardstick = search.calibration, Yardstick(search.judging)
    with preserved(calibration.layers) as dense:
        trial = Trial(calibration, search.fitting, dense, yardstick, plan_of)
        best, least = list(start), trial(start)
        log.info("exchange: divergence %.4f as the search has it", least)
        halfway = problem.halfway_to_equal(start)
        if halfway is not None:
            value = trial(halfway)
            log.info("exchange: divergence %.4f halfway to equal shares", value)
            if value < least:
                best, least = halfway, value
            else:
                trial(best)
        share = REACH
        for number in range(rounds):
            thinned = Thinned(best, dense, yardstick, share, problem.limits.align)
            aim = _cheapest(search, problem, thinned)
            moved = _better(trial, problem, best, aim, least)
            if moved is None:
                log.info("exchange: round %d found nothing better", number + 1)
                if number + 1 < rounds:
                    trial(best)
            else:
                best, least = moved
                log.info("exchange: divergence %.4f after round %d", least, number + 1)
            share = max(share / 2, LEAST)
    return best


def _better(
    trial: Trial, problem: Problem, best: list[Removal], aim: list[Removal], least: float
) -> tuple[list[Removal], float] | None:
    """``aim``, or else the mix halfway to it, if it diverges less than ``least``; and how much."""
    ways = [aim]
    if problem.saved is None:  # else half the way need not save half
        ways.append(problem.between(best, aim, 0.5))
    for removals in ways:
        if removals != best and (value := trial(removals)) < least:
            return removals, value
    return None


def _cheapest(search: Search, problem: Problem, thinned: Thinned) -> list[Removal]:
    """The cheapest mix within reach of what the model is thinned by, as measured in it."""
    gone = thinned.removals
    left = remaining(problem.sizes, gone)
    curves = measure_curves(search, left, thinned)
    saved = problem.saved
    if saved is not None:
        saved = [partial(_with, price, r) for price, r in zip(saved, gone, strict=True)]
    removals, _ = choose(curves, left, problem.left(gone), problem.limits, saved)
    return merged(gone, removals)


def _with(price: Callable[[Removal], float], gone: Removal, thinned: Removal) -> float:
    return price(*merged([gone], [thinned]))
