"""What each sublayer costs at each thinning level, in divergence from the dense model.

For every sublayer and a few levels the KL divergence to the dense model is measured with only that
sublayer changed, and refitted where the final compensation will: the hidden states before it are
those of the model as it stands, computed once. `search` chooses among the curves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprune.distributed import Processes
from fastprune.errors import InputError
from fastprune.models.families import FINEST, sublayers
from fastprune.models.layers import Branches
from fastprune.models.units import Sublayer
from fastprune.pruning.calibration import HELD_OUT, Calibration, Prefix
from fastprune.pruning.compensation import PROPAGATED, STRENGTHS, refit
from fastprune.pruning.divergence import TOP, Yardstick
from fastprune.pruning.importance import Scores
from fastprune.pruning.masking import DenseOutputs
from fastprune.pruning.measured import fingerprint, keep, read
from fastprune.pruning.moments import ADDED, After, Moments, advance
from fastprune.pruning.search import Curve
from fastprune.pruning.sizes import LayerSize, Removal
from fastprune.pruning.surgery import kept_entries, zero_removed

CHANNEL_LEVELS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)
"""Shares of a layer's channels at which its divergence is measured."""
KL_SHARE = 8
"""One calibration window in this many measures divergences; the others fit the refits."""


@dataclass(frozen=True)
class Search:
    """What a search goes by: text, the ranking of units, and whether what stays is refitted.

    Measured levels are kept in the folder ``cache``, in a file for this model, text and ranking.
    """

    calibration: Calibration
    scores: Scores
    refits: bool = True
    cache: Path | None = None

    @property
    def judging(self) -> Calibration:
        """The windows that measure divergences."""
        return self.calibration.part(slice(len(judging(self.calibration.windows))))

    @property
    def fitting(self) -> Calibration | None:
        """The other windows, where they refit what stays."""
        rest = slice(len(judging(self.calibration.windows)), None)
        return self.calibration.part(rest) if self.refits else None


@dataclass(frozen=True)
class Thinned:
    """That a model is thinned already, as `mask` does it, and how far to look around."""

    removals: Sequence[Removal]
    dense: DenseOutputs
    yardstick: Yardstick
    share: float
    """of a layer's finest units: so many fewer and more are tried, and one coarse unit"""
    align: int
    """the finest units are kept in multiples of this"""


@dataclass(frozen=True)
class _Thinning:
    """One sublayer of layer ``index`` and the ``levels``, units gone, at which it is measured.

    Without an ``order`` of units it is measured gone as a whole.
    """

    index: int
    sublayer: Sublayer
    linear: nn.Linear
    order: list[int]
    levels: list[int]
    now: int = 0

    def key(self, removed: int) -> str:
        """The name of a level in the cache."""
        return f"{self.index} {self.sublayer.kind} {removed} of {len(self.order) or 1}"

    @property
    def keys(self) -> list[str]:
        return [self.key(removed) for removed in self.levels]


def judging(windows: Tensor) -> Tensor:
    """The calibration windows (n, s) that measure divergences; the others fit the refits."""
    return windows[: max(1, len(windows) // KL_SHARE)]


@torch.no_grad()
def measure_curves(
    search: Search, sizes: Sequence[LayerSize], thinned: Thinned | None = None
) -> list[Curve]:
    """Divergence curves of every sublayer that ``sizes`` allows to thin, on two windows or more.

    Of a model that is ``thinned`` the curves hold what a sublayer's change adds to its divergence,
    at the level it has, one less and one more. Levels in the cache are not measured again. Where
    all layers are resident they go there layer by layer, so an interrupted search goes on where it
    was. Elsewhere all levels travel side by side: the host keeps the hidden states of each on the
    windows that judge. The model is left as it was. Raises InputError for one window.
    """
    if len(search.calibration.windows) < 2:
        raise InputError("the search needs two calibration windows; use more --calib-samples")
    return _Measurement(search, thinned).curves(sizes)


class _Measurement:
    """One walk through the layers that measures what the cache lacks."""

    def __init__(self, search: Search, thinned: Thinned | None) -> None:
        self.search, self.thinned = search, thinned
        self.layers, self.processes = search.calibration.layers, search.calibration.processes
        yardstick = thinned.yardstick if thinned else Yardstick(search.judging)
        self.base = yardstick.divergence(self.layers) if thinned else None
        self.known = _Cache(
            None if search.cache is None else search.cache / _name(search, self.base),
            self.processes,
        )
        self.branches = Branches(self.layers, yardstick.mean, fast=True)
        self.judged = self.layers.embed(yardstick.batches)
        self.fit: Prefix | None = None
        if search.fitting is not None:
            self.fit = Prefix(search.fitting, random=False, place=self.layers.waiting)
            if thinned:
                self.fit.part_from_dense()
        self.pending: list[str] = []

    def curves(self, sizes: Sequence[LayerSize]) -> list[Curve]:
        """The curves of all layers, in order."""
        found = []
        for index, layer in self.layers.walk("measuring sublayers"):
            thinnings = list(self._thinnings(index, layer, sizes[index]))
            found += thinnings
            self.branches.pass_through(index)
            self._measure(index, [t for t in thinnings if not self.known.has(t.keys)])
            if self.layers.resident:
                self._settle()
            advance(self.layers, index, self.judged)
            if self.fit is not None:
                self.fit.advance(index)
        self.branches.finish()
        self._settle()
        return [self._curve(t) for t in found]

    def _measure(self, index: int, missing: Sequence[_Thinning]) -> None:
        """Begin a branch for each missing level; each is measured by one process."""
        moments: dict[nn.Linear, tuple[Moments, Moments]] = {}
        if self.fit is not None:
            refitted = [t.linear for t in missing if t.order]
            after: After = {}
            if self.thinned:
                with self.thinned.dense.shown(index):
                    after = self.fit.advance_dense(index, refitted)
            moments = self.fit.moments(index, refitted, after)
        levels = [
            (t, removed)
            for t in missing
            for removed in t.levels
            if not self.known.has([t.key(removed)])
        ]
        for t, removed in self.processes.share(levels):
            with self._changed(t, removed, moments.get(t.linear) if t.order else None):
                behind = (
                    self.layers.run(index, hidden.to(self.layers.device), fast=True)
                    for hidden in self.judged
                )
                self.branches.leave(t.key(removed), index, behind)
        self.pending += [t.key(removed) for t, removed in levels]

    def _settle(self) -> None:
        """Put the values of pending levels, which some process has measured, into the cache."""
        mine = [self.branches.values.get(key, 0.0) for key in self.pending]
        self.known.add(dict(zip(self.pending, self.processes.sums(mine), strict=True)))
        self.pending.clear()

    def _curve(self, t: _Thinning) -> Curve:
        points = {t.now: 0.0}
        points |= {n: self.known.values[t.key(n)] - (self.base or 0.0) for n in t.levels}
        return Curve.rising(t.index, t.sublayer.kind, points, whole=not t.order)

    @contextmanager
    def _changed(
        self, t: _Thinning, removed: int, moments: tuple[Moments, Moments] | None
    ) -> Iterator[None]:
        """The sublayer without its ``removed`` lowest units, with ``moments`` the rest refitted."""
        linear = t.linear
        before = {name: p.clone() for name, p in linear.named_parameters()}
        try:
            if self.thinned:
                self.thinned.dense.show(t.index, t.sublayer.kind)
            kept = kept_entries(t.sublayer.output, tuple(sorted(t.order[removed:])))
            kept = kept.to(linear.weight.device)
            if moments is not None and removed:
                refit(linear, kept, *moments).write(linear)
            else:
                zero_removed(linear, kept)
            yield
        finally:
            for name, p in linear.named_parameters():
                p.copy_(before[name])

    def _thinnings(self, index: int, layer: nn.Module, size: LayerSize) -> Iterator[_Thinning]:
        """The sublayers of a layer that are to be measured: unit by unit, then as a whole."""
        parts = [(s, s.linear(layer), size.sublayers[s.kind]) for s in sublayers(layer)]
        for sublayer, linear, part in parts:
            if part.units > 1:
                scores = self.search.scores.layers[index][sublayer.kind]
                order = torch.argsort(scores, descending=True, stable=True).flip(0).tolist()
                now = self.thinned.removals[index].count(sublayer.kind) if self.thinned else 0
                levels = self._levels(sublayer.kind, part.units, now)
                yield _Thinning(index, sublayer, linear, order, levels, now)
        for sublayer, linear, part in parts:
            if part.whole and not self.thinned:
                yield _Thinning(index, sublayer, linear, [], [1])

    def _levels(self, kind: str, units: int, now: int) -> list[int]:
        """Numbers of units gone to measure at; of a thinned model those next to ``now``."""
        if self.thinned is None:
            if kind != FINEST:
                return list(range(1, units))
            return sorted({round(share * units) for share in CHANNEL_LEVELS} - {0, units})
        step, move = 1, 1
        if kind == FINEST:
            step = self.thinned.align
            move = max(step, round(self.thinned.share * units / step) * step)
        span = range(units % step, units, step)
        return sorted({max(now - move, span[0]), min(now + move, span[-1])} - {now})


class _Cache:
    """Measured levels in a file, so that an interrupted search goes on where it was."""

    def __init__(self, path: Path | None, processes: Processes) -> None:
        self.path, self.processes = path, processes
        found = None if path is None else read(path, dict)
        self.values: dict[str, float] = processes.from_first(found or {})

    def has(self, keys: Sequence[str]) -> bool:
        return all(key in self.values for key in keys)

    def add(self, values: dict[str, float]) -> None:
        self.values |= values
        if self.path is not None:
            keep(self.path, self.values, self.processes)


def _name(search: Search, base: float | None) -> str:
    """The name of the file that holds the levels: it tells all that these depend on.

    ``base`` is the divergence of a model that is thinned already, which says from which dense one.
    """
    ranking = hashlib.sha256()
    for units in search.scores.layers:
        for scores in units.values():
            ranking.update(scores.argsort(stable=True).numpy().tobytes())
    refitting = (STRENGTHS, PROPAGATED, HELD_OUT, ADDED) if search.refits else None
    more = [TOP, KL_SHARE, refitting, base, ranking.hexdigest()]
    return f"{fingerprint(search.calibration, more=more)}.json"
