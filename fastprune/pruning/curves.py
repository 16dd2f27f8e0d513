"""What each sublayer costs at each thinning level, in divergence from the dense model.

For every sublayer and a few levels the KL divergence to the dense model is measured with only that
sublayer changed, and refitted where the final compensation will: the hidden states before it are
those of the model as it stands, computed once. `search` chooses among the curves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.errors import InputError
from fastprune.models.blocks import Blocks
from fastprune.models.families import FINEST, KINDS, Slice, Sublayer, decoder_layers, sublayers
from fastprune.precision import fast_forward
from fastprune.progress import track
from fastprune.pruning.compensation import HELD_OUT, MADE_UP, STRENGTHS, fitting, refit
from fastprune.pruning.divergence import TOP, Yardstick
from fastprune.pruning.importance import Scores
from fastprune.pruning.masking import DenseOutputs, zero_removed
from fastprune.pruning.measured import fingerprint, keep, read
from fastprune.pruning.moments import ADDED, After, Moments, advance, collect
from fastprune.pruning.search import Curve
from fastprune.pruning.sizes import LayerSize, Removal
from fastprune.pruning.surgery import kept_entries

CHANNEL_LEVELS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)
"""Shares of a layer's channels at which its divergence is measured."""
LEVEL_NAMES = {"attention": "groups", "mlp": "channels"}
"""What measured levels of units are kept by; those of whole sublayers by their kind."""
KL_SHARE = 8
"""One calibration window in this many measures divergences; the others fit the refits."""


@dataclass(frozen=True)
class _Thinning:
    """One sublayer and the levels at which it is to be measured.

    Without an ``order`` of units it is measured as a whole, gone.
    """

    kind: str
    name: str
    """by which measured levels are kept"""
    linear: nn.Linear
    last: Slice
    order: list[int]
    levels: list[int]
    now: int = 0


@dataclass(frozen=True)
class Thinned:
    """That a model is thinned already, as `mask` does it, and how far to look around."""

    removals: Sequence[Removal]
    dense: DenseOutputs
    yardstick: Yardstick
    share: float
    """of a layer's channels: so many fewer and more are tried, and a KV group fewer and more"""
    align: int
    """channels are kept in multiples of this"""


def judging(windows: Tensor) -> Tensor:
    """The calibration windows (n, s) that measure divergences; the others fit the refits."""
    return windows[: max(1, len(windows) // KL_SHARE)]


@torch.no_grad()
def measure_curves(
    model: nn.Module,
    windows: Tensor,
    scores: Scores,
    sizes: Sequence[LayerSize],
    cache: Path | None = None,
    *,
    refits: bool = True,
    thinned: Thinned | None = None,
) -> list[Curve]:
    """Divergence curves of every sublayer that ``sizes`` allows to thin.

    ``windows`` (n, s) are calibration token ids, n >= 2. Of a model that is ``thinned`` the curves
    hold what a sublayer's change adds to its divergence, at the level it has, one less and one
    more. Levels are kept in the folder ``cache``, in a file for this model, text and ranking of
    units, and are not measured again: an interrupted search goes on where it was. The model is
    left as it was. Raises InputError for one window.
    """
    if len(windows) < 2:
        raise InputError("the search needs two calibration windows; use more --calib-samples")
    device = next(model.parameters()).device
    blocks = Blocks(model)
    yardstick = thinned.yardstick if thinned else Yardstick(model, judging(windows))
    kl = [blocks.embed(ids.to(device)) for ids in yardstick.batches]
    others = windows[len(judging(windows)) :]
    batches = fitting(others) if refits else []
    fit = [blocks.embed(ids.to(device)) for ids, _ in batches]
    held_out = [judges for _, judges in batches]
    dense_fit = [hidden.clone() for hidden in fit] if thinned else []

    def divergence(start: int) -> float:
        return yardstick.mean(_suffix(blocks, start, hidden) for hidden in kl)

    whole = divergence(0) if thinned else None
    name = _name(model, windows, scores, refits, whole)
    known = _Cache(None if cache is None else cache / name)
    curves = []
    for index in track(range(len(blocks)), "measuring sublayers"):
        layer = decoder_layers(model)[index]
        if thinned:
            thinnings = _around(thinned, layer, sizes[index], scores, index)
        else:
            thinnings = _thinnings(layer, sizes[index], scores, index)
        missing = [t for t in thinnings if not known.complete(index, t)]
        refitted = [t.linear for t in missing if t.order] if refits else []
        after: After = {}
        if thinned and refits:
            with thinned.dense.shown(layer):
                after = advance(blocks, index, dense_fit, refitted)
        moments = collect(blocks, index, refitted, fit, held_out, after)
        levels = [
            (t, removed)
            for t in missing
            for removed in t.levels
            if known.get(index, t.name, removed) is None
        ]
        dense = thinned.dense if thinned else None
        values = _measured(levels, moments, dense, partial(divergence, index))
        for (t, removed), value in zip(levels, values, strict=True):
            known.put(index, t.name, removed, value)
        for t in thinnings:
            points = {t.now: 0.0}
            points |= {n: known.value(index, t.name, n) - (whole or 0.0) for n in t.levels}
            curves.append(Curve.rising(index, t.kind, points, whole=not t.order))
        known.save()
        for states in (kl, fit):
            advance(blocks, index, states)
    return curves


def _measured(
    levels: Sequence[tuple[_Thinning, int]],
    moments: Mapping[nn.Linear, tuple[Moments, Moments]],
    dense: DenseOutputs | None,
    divergence: Callable[[], float],
) -> list[float]:
    """The ``divergence`` at each of ``levels``; each is measured by one process."""
    values = [0.0] * len(levels)
    for n in distributed.share(range(len(levels))):
        t, removed = levels[n]
        with _changed(t, removed, moments.get(t.linear) if t.order else None, dense):
            values[n] = divergence()
    return distributed.sums(values)


def _suffix(blocks: Blocks, start: int, hidden: Tensor) -> Tensor:
    """Final hidden states from the input of layer ``start``."""
    with fast_forward(hidden.device, hidden.dtype):
        for index in range(start, len(blocks)):
            hidden = blocks.run(index, hidden)
        return blocks.norm(hidden)


@contextmanager
def _changed(
    t: _Thinning,
    removed: int,
    moments: tuple[Moments, Moments] | None,
    dense: DenseOutputs | None,
) -> Iterator[None]:
    """A sublayer without its ``removed`` lowest units, and with ``moments`` the rest refitted.

    ``dense`` has its weights where it is thinned already.
    """
    linear = t.linear
    before = {name: p.clone() for name, p in linear.named_parameters()}
    try:
        if dense is not None:
            dense.restore(linear)
        kept = kept_entries(t.last, tuple(sorted(t.order[removed:]))).to(linear.weight.device)
        if moments is not None and removed:
            refit(linear, kept, *moments).write(linear)
        else:
            zero_removed(linear, kept)
        yield
    finally:
        for name, p in linear.named_parameters():
            p.copy_(before[name])


def _thinnings(layer: nn.Module, size: LayerSize, scores: Scores, index: int) -> list[_Thinning]:
    """The levels of every sublayer that may be thinned, then the sublayers that may go whole."""
    found, whole = [], []
    for s in sublayers(layer):
        part = size.sublayers[s.kind]
        if part.units > 1:
            levels = set(range(1, part.units))
            if s.kind == FINEST:
                levels = {round(share * part.units) for share in CHANNEL_LEVELS} - {0, part.units}
            found.append(_thinning(layer, s, scores.layers[index][s.kind], sorted(levels)))
        if part.whole:
            whole.append(_Thinning(s.kind, s.kind, s.linear(layer), s.output, [], [1]))
    return found + whole


def _around(
    thinned: Thinned, layer: nn.Module, size: LayerSize, scores: Scores, index: int
) -> list[_Thinning]:
    """The sublayers still there, with the levels next to those that they are at."""
    found, align = [], thinned.align
    for s in sublayers(layer):
        units, now = size.sublayers[s.kind].units, thinned.removals[index].count(s.kind)
        if units > 1:
            span, move = range(units), 1
            if s.kind == FINEST:
                span = range(units % align, units, align)
                move = max(align, round(thinned.share * units / align) * align)
            levels = {max(now - move, span[0]), min(now + move, span[-1])} - {now}
            one = _thinning(layer, s, scores.layers[index][s.kind], sorted(levels))
            found.append(replace(one, now=now))
    return found


def _thinning(layer: nn.Module, sublayer: Sublayer, scores: Tensor, levels: list[int]) -> _Thinning:
    order = torch.argsort(scores, descending=True, stable=True).flip(0).tolist()
    kind, linear = sublayer.kind, sublayer.linear(layer)
    return _Thinning(kind, LEVEL_NAMES[kind], linear, sublayer.output, order, levels)


class _Cache:
    """Measured levels in a file, so that an interrupted search goes on where it was."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        found = None if path is None else read(path, dict)
        self.values: dict[str, float] = distributed.from_first(found or {})

    def get(self, layer: int, kind: str, removed: int) -> float | None:
        return self.values.get(f"{layer} {kind} {removed}")

    def value(self, layer: int, kind: str, removed: int) -> float:
        return self.values[f"{layer} {kind} {removed}"]

    def complete(self, layer: int, t: _Thinning) -> bool:
        return all(self.get(layer, t.name, removed) is not None for removed in t.levels)

    def put(self, layer: int, kind: str, removed: int, value: float) -> None:
        self.values[f"{layer} {kind} {removed}"] = value

    def save(self) -> None:
        if self.path is not None:
            keep(self.path, self.values)


def _name(
    model: nn.Module, windows: Tensor, scores: Scores, refits: bool, whole: float | None
) -> str:
    """The name of the file that holds the levels: it tells all that these depend on.

    ``whole`` is the divergence of a model that is thinned already, which says from which dense one.
    """
    ranking = hashlib.sha256()
    for tensor in (layer[kind] for kind in KINDS for layer in scores.layers):
        ranking.update(tensor.argsort(stable=True).numpy().tobytes())
    refitting = (STRENGTHS, MADE_UP, HELD_OUT, ADDED) if refits else None
    more = [TOP, KL_SHARE, refitting, whole, ranking.hexdigest()]
    return f"{fingerprint(model, windows, more=more)}.json"
