"""Allocation: budgets are met to half a unit, within the limits, by pure counting."""

from __future__ import annotations

import itertools

import pytest
from counting import less, sized

from fastprune.errors import InputError
from fastprune.pruning.allocation import allocate, allocate_same, layer_weights
from fastprune.pruning.ranking import allocate_global
from fastprune.pruning.sizes import LayerSize, Limits, removed_parameters

SMOLLM2 = sized(groups=3, group_cost=294_912, channels=1536, channel_cost=1728)
LLAMA3 = sized(groups=8, group_cost=5_242_880, channels=14336, channel_cost=12288)


def by_kind(groups: list[list[float]], channels: list[list[float]]) -> list[dict]:
    """Scores of the units of every layer."""
    return [{"attention": g, "mlp": c} for g, c in zip(groups, channels, strict=True)]


def budget(sizes: list[LayerSize], ratio: float) -> int:
    return round(ratio * sum(s.prunable for s in sizes))


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("size", [SMOLLM2, LLAMA3])
@pytest.mark.parametrize("rule", ["equal", "inverse", "proportional"])
def test_budget_is_met_to_half_a_channel(ratio: float, size: LayerSize, rule: str) -> None:
    sizes = [size] * 30
    sensitivity = [10.0, *(0.5 + 0.1 * i for i in range(28)), 4.0]
    weights = [1.0] * 30 if rule == "equal" else layer_weights(sensitivity, rule, 1.2)
    target = budget(sizes, ratio)
    removals = allocate(sizes, weights, target, Limits(highest=0.95))
    assert abs(removed_parameters(sizes, removals) - target) <= size.finest.cost / 2
    for removal in removals:
        for kind, part in size.sublayers.items():
            assert 0 <= removal.count(kind) < max(part.units, 1)


def test_rates_follow_the_weights() -> None:
    sizes = [SMOLLM2] * 3
    removals = allocate(sizes, [1.0, 2.0, 3.0], budget(sizes, 0.2), Limits())
    removed = [removed_parameters([SMOLLM2], [r]) for r in removals]
    # half a channel of the 205 that the first layer loses is 0.25 %
    assert removed[1] / removed[0] == pytest.approx(2, rel=3e-3)
    assert removed[2] / removed[0] == pytest.approx(3, rel=3e-3)


def test_limits_hold() -> None:
    sizes = [LLAMA3] * 4
    weights = [1e-3, 1.0, 1.0, 1e3]
    removals = allocate(sizes, weights, budget(sizes, 0.2), Limits(0.1, 0.35))
    shares = [removed_parameters([LLAMA3], [r]) / LLAMA3.prunable for r in removals]
    half = LLAMA3.finest.cost / LLAMA3.prunable
    assert min(shares) >= 0.1 - half and max(shares) <= 0.35 + half


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_attention_only_is_met_to_half_a_group(ratio: float) -> None:
    sizes = [sized(8, 1000, 0, 0)] * 10
    target = budget(sizes, ratio)
    removals = allocate(sizes, [1.0] * 10, target, Limits())
    assert abs(removed_parameters(sizes, removals) - target) <= 500
    assert all(r.count("mlp") == 0 for r in removals)


def test_ties_among_groups_go_by_order() -> None:
    sizes = [sized(3, 100, 0, 0)] * 3
    removals = allocate(sizes, [1.0] * 3, 100, Limits(), order=[0.3, 0.1, 0.2])
    assert [r.count("attention") for r in removals] == [0, 1, 0]


@pytest.mark.parametrize("align", [8, 64, 128])
@pytest.mark.parametrize("channels", [1536, 1500])
def test_aligned_channels(align: int, channels: int) -> None:
    sizes = [sized(4, 9000, channels, 100)] * 5
    target = budget(sizes, 0.3)
    removals = allocate(sizes, [1.0] * 5, target, Limits(align=align))
    assert all((channels - r.count("mlp")) % align == 0 for r in removals)
    assert abs(removed_parameters(sizes, removals) - target) <= 100 * align / 2


def test_unreachable_budget_names_the_range() -> None:
    sizes = [SMOLLM2] * 3
    with pytest.raises(InputError, match="parameters can be removed"):
        allocate(sizes, [1.0] * 3, budget(sizes, 0.5), Limits(0.1, 0.3))
    with pytest.raises(InputError, match="can be removed"):
        allocate(sizes, [1.0] * 3, budget(sizes, 0.05), Limits(0.1, 0.3))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_same_everywhere(ratio: float) -> None:
    sizes = [SMOLLM2] * 30
    removals = allocate_same(sizes, budget(sizes, ratio), Limits())
    assert removals == removals[:1] * 30
    error = abs(removed_parameters(sizes, removals) - budget(sizes, ratio))
    assert error <= 30 * SMOLLM2.finest.cost / 2  # a channel goes from every layer at once


def test_global_takes_the_cheapest_parameters_first() -> None:
    sizes = [sized(2, 10, 4, 1)] * 2
    groups = [[100.0, 200.0], [1.0, 300.0]]
    channels = [[0.1, 5.0, 6.0, 7.0], [0.2, 8.0, 9.0, 9.5]]
    removals = allocate_global(sizes, by_kind(groups, channels), 12, Limits())
    assert removals == [less(0, 1), less(1, 1)]


def test_alpha_of_global_goes_from_the_scores_as_they_are_to_layers_alike() -> None:
    """The second layer's scores are those of the first, a hundred times as high."""
    sizes = [SMOLLM2] * 2
    channels = [[float(c + 1) for c in range(1536)], [100.0 * (c + 1) for c in range(1536)]]
    groups = [[1e12] * 3] * 2
    target = budget(sizes, 0.2)
    lost = [
        [
            r.count("mlp")
            for r in allocate_global(sizes, by_kind(groups, channels), target, Limits(), alpha)
        ]
        for alpha in (1.0, 0.5, 0.0)
    ]
    as_they_are, between, alike = lost
    assert lost[0] == [
        r.count("mlp") for r in allocate_global(sizes, by_kind(groups, channels), target, Limits())
    ]
    assert as_they_are[0] > 50 * as_they_are[1]
    assert between[0] == pytest.approx(10 * between[1], rel=0.1)
    assert abs(alike[0] - alike[1]) <= 1
    assert len({sum(pair) for pair in lost}) == 1


def test_alpha_of_global_levels_kv_groups_where_only_they_may_go() -> None:
    sizes = [sized(8, 10, 0, 0)] * 2
    groups = [[float(g + 1) for g in range(8)], [1e3 * (g + 1) for g in range(8)]]
    lost = allocate_global(sizes, by_kind(groups, [[], []]), 60, Limits(), alpha=0.0)
    assert lost == [less(3, 0), less(3, 0)]


def test_alpha_of_global_takes_a_layer_without_a_positive_score_first() -> None:
    sizes = [sized(0, 0, 10, 1)] * 2
    channels = [[0.0] * 10, [float(c + 1) for c in range(10)]]
    lost = allocate_global(sizes, by_kind([[], []], channels), 6, Limits(), alpha=0.5)
    assert lost == [less(0, 6), less(0, 0)]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_global_meets_the_budget_and_the_lowest_rate(ratio: float) -> None:
    sizes = [SMOLLM2] * 6
    groups = [[1e5 * (layer + g + 1) for g in range(3)] for layer in range(6)]
    channels = [[(layer + 1) * (c + 1) for c in range(1536)] for layer in range(6)]
    limits = Limits(lowest=0.05)
    removals = allocate_global(sizes, by_kind(groups, channels), budget(sizes, ratio), limits)
    removed = removed_parameters(sizes, removals)
    assert abs(removed - budget(sizes, ratio)) <= SMOLLM2.finest.cost / 2
    for removal in removals:
        assert removed_parameters([SMOLLM2], [removal]) >= 0.05 * SMOLLM2.prunable


@pytest.mark.parametrize("align", [1, 16])
def test_global_gives_channels_back_for_a_group_that_is_larger_than_what_is_missing(align) -> None:
    """Channels are cheap, all of them go, and what is missing is a third of a KV group."""
    sizes = [SMOLLM2] * 6
    groups = [[1e9 * (layer + g + 1) for g in range(3)] for layer in range(6)]
    channels = [[(layer + 1) * (c + 1) for c in range(1536)] for layer in range(6)]
    all_channels = 6 * SMOLLM2.finest.units * SMOLLM2.finest.cost
    target = all_channels + SMOLLM2.sublayers["attention"].cost // 3
    limits = Limits(align=align)
    removals = allocate_global(sizes, by_kind(groups, channels), target, limits)
    assert [r.count("attention") for r in removals] == [1, 0, 0, 0, 0, 0]
    assert abs(removed_parameters(sizes, removals) - target) <= align * SMOLLM2.finest.cost / 2
    assert removed_parameters(sizes[:1], removals[:1]) <= 0.9 * SMOLLM2.prunable
    assert all(r.count("mlp") <= before.finest.units for r, before in zip(removals, sizes))
    # the best of the last layer come back, and nothing else
    assert {r.count("mlp") for r in removals[:-1]} == {SMOLLM2.finest.units - align}
    # beyond the highest rate the layer itself gives first
    tight = allocate_global(
        sizes, by_kind(groups, channels), target, Limits(highest=0.8, align=align)
    )
    assert removed_parameters(sizes[:1], tight[:1]) <= 0.8 * SMOLLM2.prunable
    assert abs(removed_parameters(sizes, tight) - target) <= align * SMOLLM2.finest.cost / 2


def test_weights_reject_what_is_no_sensitivity() -> None:
    for bad in ([0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(InputError, match="no layer sensitivity is a positive finite number"):
            layer_weights(bad, "inverse", 1.0)


def test_harmless_layers_do_not_take_everything() -> None:
    weights = layer_weights([-1.0, 1.0, 1.0], "inverse", 1.0)
    assert weights[0] == pytest.approx(1000)  # a thousandth of the mean, inverted
    for alpha, rule in itertools.product((0.5, 2.0), ("inverse", "proportional")):
        assert all(w > 0 for w in layer_weights([-1.0, 0.0, 5.0], rule, alpha))
