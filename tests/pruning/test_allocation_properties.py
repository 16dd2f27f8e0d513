"""Every allocation on random shapes, costs and limits: bounds, alignment and the budget hold."""

from __future__ import annotations

from counting import sized
from hypothesis import assume, given
from hypothesis import strategies as st

from fastprune.pruning.allocation import allocate, allocate_same
from fastprune.pruning.ranking import allocate_global
from fastprune.pruning.search import Curve, choose
from fastprune.pruning.sizes import (
    LayerSize,
    Limits,
    Removal,
    half_unit,
    parameters,
    reachable,
    removed_parameters,
)

STRUCTURES = st.sampled_from(["attention", "mlp", "both"])


@st.composite
def layers(draw, structures: str, count: int, align: int) -> list[LayerSize]:
    """Layers of one hidden size; where both structures go, the channels outweigh a KV group."""
    group_cost, channel_cost = draw(st.integers(1, 100)), draw(st.integers(1, 20))
    found = []
    for _ in range(count):
        groups = 0 if structures == "mlp" else draw(st.integers(2, 8))
        least = 2 * align + (2 * group_cost // channel_cost if groups else 0)
        channels = 0 if structures == "attention" else draw(st.integers(least, least + 40))
        found.append(sized(groups, group_cost, channels, channel_cost))
    return found


@st.composite
def problems(draw) -> tuple[list[LayerSize], Limits, int]:
    """Sizes, limits, and a number of parameters that can be removed within them."""
    align = draw(st.sampled_from([1, 1, 2, 8, 16]))
    sizes = draw(layers(draw(STRUCTURES), draw(st.integers(1, 6)), align))
    lowest = draw(st.floats(0, 0.5))
    limits = Limits(lowest, draw(st.floats(lowest, 1)), align)
    low, high = reachable(sizes, limits)
    return sizes, limits, round(low + draw(st.floats(0, 1)) * (high - low))


def check(sizes: list[LayerSize], limits: Limits, target: int, removals: list[Removal]) -> None:
    """Counts within bounds, alignment kept, and the budget met to half a unit.

    A layer may pass its limits by less than its coarsest unit. Where the limits leave less room
    than that in every layer, the budget may be missed by as much.
    """
    unit = 2 * half_unit(sizes, limits)
    coarsest = max(
        [unit, *(s.sublayers["attention"].cost for s in sizes if s.sublayers["attention"].units)]
    )
    room = len(sizes) * coarsest
    low, high = reachable(sizes, limits)
    roomy = low + room <= target <= high - room
    for size, removal in zip(sizes, removals, strict=True):
        attention, mlp = size.sublayers["attention"], size.sublayers["mlp"]
        for kind, part in size.sublayers.items():
            assert 0 <= removal.count(kind) <= max(part.units - 1, 0)
        assert (mlp.units - removal.count("mlp")) % limits.align == 0
        unaligned = mlp.units % limits.align * mlp.cost
        most = max(limits.highest * size.prunable, unaligned)
        assert parameters(size, removal) <= most + coarsest
        able = max(attention.units - 1, 0) * attention.cost
        able += max(mlp.units - limits.align, 0) * mlp.cost
        assert parameters(size, removal) >= min(limits.lowest * size.prunable, able) - coarsest
    missed = abs(removed_parameters(sizes, removals) - target)
    assert missed <= (unit / 2 + 1e-6 if roomy else room)


@given(problems(), st.data())
def test_rates_by_weights(problem, data) -> None:
    sizes, limits, target = problem
    count = len(sizes)
    weights = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    check(sizes, limits, target, allocate(sizes, weights, target, limits))


@given(problems(), st.data(), st.floats(0, 1))
def test_global(problem, data, alpha) -> None:
    sizes, limits, target = problem
    numbers = st.randoms(use_true_random=False)
    random = data.draw(numbers)
    level = [10 ** random.uniform(-4, 4) for _ in sizes]
    scores = [
        {kind: [f * random.random() for _ in range(p.units)] for kind, p in s.sublayers.items()}
        for f, s in zip(level, sizes)
    ]
    removals = allocate_global(sizes, scores, target, limits, alpha)
    check(sizes, limits, target, removals)


@given(problems(), st.integers(1, 6))
def test_the_same_in_every_layer(problem, count) -> None:
    (size, *_), limits, _ = problem
    low, high = reachable([size] * count, limits)
    share = round((low + high) / 2 / count)
    assume(low <= share * count <= high)  # a number of parameters may lie in no narrow limits
    removals = allocate_same([size] * count, share * count, limits)
    assert removals == removals[:1] * count
    check([size], limits, share, removals[:1])


@given(problems(), st.data())
def test_search(problem, data) -> None:
    sizes, limits, target = problem
    random = data.draw(st.randoms(use_true_random=False))

    def curve(layer: int, kind: str, units: int) -> Curve:
        shares = range(1, 8) if kind == "mlp" else [8 * n / units for n in range(units)]
        levels = sorted({0, *(round(units * share / 8) for share in shares)} - {units})
        points = {n: random.random() * (n / units) ** 2 if n else 0.0 for n in levels}
        return Curve.rising(layer, kind, points)

    curves = [
        curve(layer, kind, part.units)
        for layer, size in enumerate(sizes)
        for kind, part in size.sublayers.items()
        if part.units > 1
    ]
    removals, _ = choose(curves, sizes, target, limits)
    check(sizes, limits, target, removals)
