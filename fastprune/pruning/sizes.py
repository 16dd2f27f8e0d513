"""What may be removed from each layer, what a removal costs, and what the limits allow.

Counts only, no weights: the vocabulary of allocation.py, depth.py and search.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastprune.errors import InputError

MIN_KEPT = 1
"""Units that a thinned sublayer always keeps: it must stay a working sublayer."""


@dataclass(frozen=True)
class SublayerSize:
    """What may be removed from one sublayer: ``units`` of ``cost`` parameters each.

    ``whole`` are the parameters of a sublayer that may go as a whole; 0 where it may not.
    """

    units: int = 0
    cost: int = 0
    whole: int = 0


@dataclass(frozen=True)
class LayerSize:
    """What may be removed from one layer: units and the parameters that each one owns.

    ``attention`` and ``mlp`` are the parameters of a sublayer that may go as a whole, norm and
    biases included; 0 where it may not.
    """

    groups: int
    group_cost: int
    channels: int
    channel_cost: int
    attention: int = 0
    mlp: int = 0

    @property
    def sublayers(self) -> dict[str, SublayerSize]:
        """The same by kind of sublayer."""
        return {
            "attention": SublayerSize(self.groups, self.group_cost, self.attention),
            "mlp": SublayerSize(self.channels, self.channel_cost, self.mlp),
        }

    @property
    def prunable(self) -> int:
        """Parameters owned by units."""
        return self.groups * self.group_cost + self.channels * self.channel_cost

    @property
    def whole(self) -> int:
        """Parameters of the sublayers that may go as a whole."""
        return self.attention + self.mlp


@dataclass(frozen=True)
class Removal:
    """Units to remove from one layer; ``attention`` and ``mlp`` remove a whole sublayer.

    Of a sublayer that goes as a whole no units are counted.
    """

    groups: int = 0
    channels: int = 0
    attention: bool = False
    mlp: bool = False

    @property
    def gone(self) -> frozenset[str]:
        """Kinds of the sublayers that go as a whole."""
        return frozenset(kind for kind in ("attention", "mlp") if getattr(self, kind))

    def count(self, kind: str) -> int:
        """Units of ``kind`` to remove."""
        return {"attention": self.groups, "mlp": self.channels}[kind]

    def with_units(self, units: Mapping[str, int]) -> Removal:
        """This removal with so many ``units`` of the kinds that it names."""
        groups, channels = (units.get(k, self.count(k)) for k in ("attention", "mlp"))
        return replace(self, groups=groups, channels=channels)


@dataclass(frozen=True)
class Limits:
    """Bounds on the share of a layer's prunable parameters that may go unit by unit.

    In a layer that loses a whole sublayer they hold for the other one.
    """

    lowest: float = 0.0
    highest: float = 0.9
    align: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest <= 1:
            raise InputError(
                "the layer limits must satisfy 0 <= min-layer-ratio <= max-layer-ratio <= 1, "
                f"not {self.lowest} and {self.highest}"
            )
        if self.align < 1:
            raise InputError(f"--align must be at least 1, not {self.align}")


def remaining(sizes: Sequence[LayerSize], removals: Sequence[Removal]) -> list[LayerSize]:
    """What may be thinned once the sublayers that ``removals`` take as a whole are gone."""
    return [
        LayerSize(
            0 if r.attention else s.groups, s.group_cost, 0 if r.mlp else s.channels, s.channel_cost
        )
        for s, r in zip(sizes, removals, strict=True)
    ]


def merged(whole: Sequence[Removal], thinned: Sequence[Removal]) -> list[Removal]:
    """``thinned`` with the sublayers that ``whole`` removes."""
    return [
        replace(t, attention=w.attention, mlp=w.mlp) for w, t in zip(whole, thinned, strict=True)
    ]


def removed_parameters(sizes: Sequence[LayerSize], removals: Sequence[Removal]) -> int:
    """Parameters that ``removals`` take away."""
    return sum(parameters(size, removal) for size, removal in zip(sizes, removals, strict=True))


def parameters(size: LayerSize, removal: Removal) -> int:
    """Parameters that ``removal`` takes from a layer of ``size``."""
    units = removal.groups * size.group_cost + removal.channels * size.channel_cost
    return units + whole_parameters(size, removal)


def whole_parameters(size: LayerSize, removal: Removal) -> int:
    """Those of them that leave with whole sublayers."""
    return removal.attention * size.attention + removal.mlp * size.mlp


def channel_counts(size: LayerSize, limits: Limits) -> range:
    """Numbers of channels that may go: some stay, and as many as a multiple of the alignment."""
    return range(size.channels % limits.align, size.channels, limits.align) or range(1)


def check_align(sizes: Sequence[LayerSize], limits: Limits) -> None:
    """InputError when a layer has too few channels to keep a multiple of ``limits.align``."""
    for index, size in enumerate(sizes):
        if 0 < size.channels < limits.align:
            raise InputError(
                f"--align {limits.align}: layer {index} has {size.channels} channels, so no "
                f"multiple of that can be kept; use --align {size.channels} at most, or leave such "
                "layers out with --layers"
            )


def check_reachable(sizes: Sequence[LayerSize], target: int, limits: Limits) -> None:
    """BudgetError when ``limits`` rule out removing ``target`` parameters."""
    low, high = reachable(sizes, limits)
    half = half_unit(sizes, limits)
    if not low - half <= target <= high + half:
        raise BudgetError(low, high)


def reachable(sizes: Sequence[LayerSize], limits: Limits) -> tuple[float, float]:
    """The least and the largest number of parameters that can be removed within ``limits``.

    Where whole sublayers may go, one of them stays.
    """
    low = high = 0.0
    for size in sizes:
        counts = channel_counts(size, limits)
        unaligned = counts[0] * size.channel_cost
        most = max(size.groups - MIN_KEPT, 0) * size.group_cost + counts[-1] * size.channel_cost
        if not size.whole:
            low += min(max(limits.lowest * size.prunable, unaligned), most)
        high += size.whole or max(min(limits.highest * size.prunable, most), unaligned)
    return low, high - min((c for s in sizes for c in (s.attention, s.mlp) if c), default=0)


class BudgetError(InputError):
    """The limits rule the budget out; ``low`` and ``high`` bound what can be removed."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__(f"between {low:.0f} and {high:.0f} parameters can be removed")
        self.low, self.high = low, high


def smallest_unit(sizes: Sequence[LayerSize], limits: Limits) -> int:
    """Parameters of the cheapest removal: a block of channels, a KV group or a whole sublayer."""
    channels = [s.channel_cost * limits.align for s in sizes if s.channels]
    groups = [s.group_cost for s in sizes if s.groups]
    whole = [cost for s in sizes for cost in (s.attention, s.mlp) if cost]
    return min([*channels, *groups, *whole], default=0)


def half_unit(sizes: Sequence[LayerSize], limits: Limits) -> float:
    """Half of the finest step: a block of channels, else a KV group, else a whole sublayer."""
    channels = [s.channel_cost * limits.align for s in sizes if s.channels]
    groups = [s.group_cost for s in sizes if s.groups]
    whole = [cost for s in sizes for cost in (s.attention, s.mlp) if cost]
    return min(channels or groups or whole or [0]) / 2
