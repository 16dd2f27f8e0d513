"""Depth: whole sublayers leave in order of loss per parameter, by pure counting."""

from __future__ import annotations

import math

import pytest
from counting import less, sized

from fastprune.pruning.depth import Candidate, cheaper_than, cheapest_first, nearest, removals
from fastprune.pruning.sizes import Limits, Removal, reachable, removed_parameters

SIZE = sized(0, 0, 0, 0, attention=100, mlp=300)
"""Nothing may be thinned, an attention and an MLP may go."""


def candidates(losses: list[tuple[float, float]]) -> list[Candidate]:
    return cheapest_first([SIZE] * len(losses), by_kind(losses))


def by_kind(losses: list[tuple[float, float]]) -> list[dict[str, float]]:
    return [{"attention": attention, "mlp": mlp} for attention, mlp in losses]


def test_order_is_loss_per_parameter() -> None:
    found = candidates([(1.0, 1.5), (4.0, -0.1)])
    assert [(s.layer, s.kind) for s in found] == [
        (1, "mlp"),
        (0, "mlp"),
        (0, "attention"),
        (1, "attention"),
    ]


def test_a_sublayer_that_may_not_go_is_no_candidate() -> None:
    sizes = [SIZE, sized(0, 0, 0, 0, mlp=300), sized(4, 10, 9, 1)]
    found = cheapest_first(sizes, by_kind([(1.0, 1.0)] * 3))
    assert {(s.layer, s.kind) for s in found} == {(0, "attention"), (0, "mlp"), (1, "mlp")}


@pytest.mark.parametrize("target", range(100, 2300, 50))
def test_the_budget_is_met_to_half_a_sublayer(target: int) -> None:
    losses = [(1.0 + (3 * i) % 5, 2.0 + (7 * i) % 4) for i in range(6)]
    removed = removed_parameters([SIZE] * 6, nearest(candidates(losses), 6, target))
    assert abs(removed - target) <= 50


def test_one_that_is_too_large_is_passed_over() -> None:
    assert nearest(candidates([(5.0, 0.1), (6.0, 9.0)]), 2, 100) == [
        less(attention=True),
        Removal(),
    ]


def test_one_sublayer_stays() -> None:
    _, high = reachable([SIZE] * 2, Limits())
    assert high == 700
    removed = removed_parameters([SIZE] * 2, nearest(candidates([(1.0, 1.0)] * 2), 2, 800))
    assert removed == 500 or removed == 700


def test_what_costs_less_than_thinning_goes() -> None:
    found = candidates([(1.0, 9.0), (0.1, 0.2), (5.0, 0.6)])
    taken = cheaper_than(0.005, found, 3, 1000, lambda _: True)
    assert taken == [Removal(), less(attention=True, mlp=True), less(mlp=True)]
    taken = cheaper_than(0.005, found, 3, 500, lambda _: True)
    assert taken == [Removal(), less(attention=True, mlp=True), Removal()]


def test_no_more_than_needed_goes_where_thinning_falls_short() -> None:
    found = candidates([(1.0, 9.0), (0.1, 0.2), (5.0, 0.6)])
    for price in (math.inf, 0.0008):  # 0.0008 pays for the cheapest only
        taken = cheaper_than(
            price, found, 3, 1000, lambda whole: removed_parameters([SIZE] * 3, whole) >= 350
        )
        assert taken == [Removal(), less(attention=True, mlp=True), Removal()]


def test_removals_of_nothing() -> None:
    assert removals([], 2) == [Removal(), Removal()]
