"""Exchange: budgets hold, the whole model comes closer, and what it is given is left alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from calibrated import calibrated
from counting import less
from tiny import tiny_model, token_ids

from fastprune.models.families import decoder_layers
from fastprune.models.layers import Layers
from fastprune.pruning import curves, exchange
from fastprune.pruning.budget import layer_size
from fastprune.pruning.curves import Search, Thinned, measure_curves
from fastprune.pruning.divergence import Yardstick
from fastprune.pruning.importance import score
from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.planning import plan_of
from fastprune.pruning.sizes import Limits, Removal, half_unit, removed_parameters


class Case:
    """A tiny model, its text, and how far a mix of removals takes it."""

    def __init__(self, structures=("attention", "mlp"), refits: bool = True) -> None:
        self.model = tiny_model("llama")
        self.windows, self.refits = token_ids(16, 32), refits
        self.scores = score(calibrated(self.model, self.windows), "magnitude-l2")
        self.sizes = [layer_size(layer, structures) for layer in decoder_layers(self.model)]
        self.yardstick = Yardstick(self.search().judging)
        self.plan_of = partial(plan_of, self.model, self.scores)

    def search(self, cache: Path | None = None) -> Search:
        return Search(calibrated(self.model, self.windows), self.scores, self.refits, cache)

    @property
    def layers(self) -> Layers:
        return Layers(self.model)

    def divergence(self, removals) -> float:
        with preserved(self.layers):
            mask(self.layers, self.plan_of(removals), self.search().fitting)
            return self.yardstick.divergence(self.layers)

    def exchange(self, start, limits=Limits(), *, saved=None, target=None, rounds=2, cache=None):  # noqa: B008
        target = removed_parameters(self.sizes, start) if target is None else target
        problem = exchange.Problem(self.sizes, limits, target, saved)
        return exchange.exchange(self.search(cache), problem, start, self.plan_of, rounds)


def lopsided(case: Case, share: float = 0.75) -> list[Removal]:
    """Nearly all from the first layer and nothing from the others."""
    first = less(0, round(share * case.sizes[0].finest.units))
    return [first] + [Removal()] * (len(case.sizes) - 1)


@pytest.mark.parametrize("refits", [True, False])
def test_the_whole_model_comes_closer_within_the_budget(refits: bool) -> None:
    case = Case(refits=refits)
    before = {name: p.clone() for name, p in case.model.state_dict().items()}
    start = lopsided(case)
    found = case.exchange(start)
    assert case.divergence(found) < case.divergence(start)
    off = removed_parameters(case.sizes, found) - removed_parameters(case.sizes, start)
    assert abs(off) <= half_unit(case.sizes, Limits())
    for name, p in case.model.state_dict().items():
        assert torch.equal(p, before[name]), name


def test_no_round_changes_nothing() -> None:
    case = Case()
    assert case.exchange(lopsided(case), rounds=0) == lopsided(case)


def test_a_round_that_makes_it_worse_is_not_taken(monkeypatch) -> None:
    case = Case()
    start = case.exchange(lopsided(case))
    worst = lambda *args: [Removal(), *[less(0, 8)] * (len(case.sizes) - 1)]  # noqa: E731
    monkeypatch.setattr(exchange, "_cheapest", worst)
    monkeypatch.setattr(exchange.Problem, "halfway_to_equal", lambda *_: None)
    assert case.divergence(case.exchange(start)) <= case.divergence(start)


def test_limits_and_alignment_hold() -> None:
    case = Case(("mlp",))
    limits = Limits(highest=0.8, align=8)
    start = lopsided(case)
    found = case.exchange(start, limits)
    for size, removal in zip(case.sizes, found, strict=True):
        assert (size.finest.units - removal.count("mlp")) % 8 == 0
        assert removal.count("mlp") <= 0.8 * size.finest.units


def test_sublayers_that_are_gone_stay_gone() -> None:
    case = Case(("attention", "mlp", "sublayer"))
    start = [less(1, 0, mlp=True), less(0, 40), less(attention=True), Removal()]
    found = case.exchange(start)
    assert [r.gone for r in found] == [r.gone for r in start]
    assert case.divergence(found) <= case.divergence(start)
    off = removed_parameters(case.sizes, found) - removed_parameters(case.sizes, start)
    assert abs(off) <= half_unit(case.sizes, Limits())


def test_whole_sublayers_alone_leave_nothing_to_exchange() -> None:
    case = Case(("sublayer",))
    start = [Removal(), less(mlp=True), Removal(), Removal()]
    assert case.exchange(start) == start


def test_a_saving_that_is_not_parameters_is_kept() -> None:
    case = Case(("mlp",))
    start = lopsided(case)
    saved = [lambda r, i=i: (i + 1) * r.count("mlp") for i in range(len(start))]
    target = saved[0](start[0])
    found = case.exchange(start, saved=saved, target=target)
    assert sum(s(r) for s, r in zip(saved, found, strict=True)) >= target
    assert case.divergence(found) <= case.divergence(start)


def test_the_level_a_layer_is_at_is_refitted_as_it_was(monkeypatch) -> None:
    case = Case(("mlp",))
    now = [less(0, 48)] * len(case.sizes)

    monkeypatch.setattr(curves._Measurement, "_levels", lambda *_: [48])
    with preserved(case.layers) as dense:
        mask(case.layers, case.plan_of(now), case.search().fitting)
        whole = case.yardstick.divergence(case.layers)
        thinned = Thinned(now, dense, case.yardstick, 1 / 8, 1)
        found = measure_curves(case.search(), case.sizes, thinned)
    # fp32 sums in another order; without targets the later layers are beyond it
    assert all(abs(curve.divergence[-1]) < 1e-3 * whole for curve in found)


def test_curves_of_a_thinned_model_are_what_the_change_adds(tmp_path: Path) -> None:
    case = Case(("mlp",), refits=False)
    now = [less(0, 8)] * len(case.sizes)
    with preserved(case.layers) as dense:
        mask(case.layers, case.plan_of(now), None)
        masked = {name: p.clone() for name, p in case.model.state_dict().items()}
        thinned = Thinned(now, dense, case.yardstick, 1 / 8, 1)
        measure = partial(measure_curves, case.search(tmp_path), case.sizes, thinned)
        found = measure()
        for name, p in case.model.state_dict().items():
            assert torch.equal(p, masked[name]), name
        assert measure() == found
    base = case.divergence(now)
    for curve in found:
        assert 8 in curve.removed and len(curve.removed) == 3
        for removed in curve.removed:
            changed = [r if i != curve.layer else less(0, removed) for i, r in enumerate(now)]
            expected = case.divergence(changed) - base
            # logits may come from bf16 matrix units; a curve never falls
            assert curve.at(removed) >= expected - 1e-4
            if list(curve.divergence) == sorted({*curve.divergence}):
                assert curve.at(removed) == pytest.approx(expected, abs=1e-4)


def test_an_interrupted_exchange_goes_on(tmp_path: Path, monkeypatch) -> None:
    case = Case()
    first = case.exchange(lopsided(case), cache=tmp_path)
    monkeypatch.setattr(
        curves._Measurement, "_changed", lambda *_: pytest.fail("measured although cached")
    )
    assert case.exchange(lopsided(case), cache=tmp_path) == first
