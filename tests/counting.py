"""Sizes, removals and plans of a layer in short: of its attention first, then of its MLP."""

from __future__ import annotations

from collections.abc import Iterable

from fastprune.pruning.plan import LayerPlan
from fastprune.pruning.sizes import LayerSize, Removal, SublayerSize


def sized(
    groups: int = 0,
    group_cost: int = 0,
    channels: int = 0,
    channel_cost: int = 0,
    attention: int = 0,
    mlp: int = 0,
) -> LayerSize:
    """A layer of so many units of such a cost; `attention` and `mlp` may go as a whole."""
    return LayerSize(
        {
            "attention": SublayerSize(groups, group_cost, attention),
            "mlp": SublayerSize(channels, channel_cost, mlp),
        }
    )


def less(
    groups: int = 0, channels: int = 0, *, attention: bool = False, mlp: bool = False
) -> Removal:
    """The removal of so many units, and of the sublayers that go as a whole."""
    gone = {kind for kind, whole in (("attention", attention), ("mlp", mlp)) if whole}
    return Removal({"attention": groups, "mlp": channels}, gone)


def keeping(index: int, groups: Iterable[int], channels: Iterable[int]) -> LayerPlan:
    """The plan of a layer that keeps these units."""
    return LayerPlan(index, {"attention": tuple(groups), "mlp": tuple(channels)})
