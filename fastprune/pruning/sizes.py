"""What may be removed from each layer, what a removal costs, and what the limits allow.

Counts only, no weights: the vocabulary of allocation.py, depth.py and search.py. A layer is a
mapping from kinds of sublayers (`KINDS`) to their sizes. The units of the kind `FINEST` are small
enough to fill up any budget, and go by the alignment; those of the others are coarse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from fastprune.errors import InputError
from fastprune.models.families import FINEST, KINDS, UNITS


@dataclass(frozen=True)
class SublayerSize:
    """What may be removed from one sublayer: ``units`` of ``cost`` parameters each.

    ``whole`` are the parameters of a sublayer that may go as a whole, norms and biases included; 0
    where it may not. Of a sublayer that is thinned at least ``least`` units stay.
    """

    units: int = 0
    cost: int = 0
    whole: int = 0
    least: int = 1

    @property
    def prunable(self) -> int:
        """Parameters owned by units."""
        return self.units * self.cost


NOTHING = SublayerSize()
"""Of a sublayer that must stay as it is."""


@dataclass(frozen=True)
class LayerSize:
    """What may be removed from one layer, by kind of sublayer; of a kind left out, nothing.

    ``shared`` are the parameters that go with the last of its sublayers: of a norm that all read.
    """

    sublayers: Mapping[str, SublayerSize]
    shared: int = 0

    def __post_init__(self) -> None:
        every = {kind: self.sublayers.get(kind, NOTHING) for kind in KINDS}
        object.__setattr__(self, "sublayers", every)

    @property
    def prunable(self) -> int:
        """Parameters owned by units."""
        return sum(part.prunable for part in self.sublayers.values())

    @property
    def whole(self) -> int:
        """Parameters of the sublayers that may go as a whole."""
        return sum(part.whole for part in self.sublayers.values()) + self.shared

    @property
    def removable(self) -> Set[str]:
        """The kinds of the sublayers that may go as a whole."""
        return {kind for kind, part in self.sublayers.items() if part.whole}

    @property
    def finest(self) -> SublayerSize:
        """The sublayer whose units are the finest."""
        return self.sublayers[FINEST]


@dataclass(frozen=True)
class Removal:
    """Units to remove from one layer, by kind of sublayer, and the sublayers that go as a whole.

    Of a sublayer that goes as a whole no units are counted.
    """

    units: Mapping[str, int] = field(default_factory=dict)
    gone: Set[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", {kind: n for kind, n in self.units.items() if n})
        object.__setattr__(self, "gone", frozenset(self.gone))

    def count(self, kind: str) -> int:
        """Units of ``kind`` to remove."""
        return self.units.get(kind, 0)

    def with_units(self, units: Mapping[str, int]) -> Removal:
        """This removal with so many ``units`` of the kinds that it names."""
        return Removal({**self.units, **units}, self.gone)


@dataclass(frozen=True)
class Limits:
    """Bounds on the share of a layer's prunable parameters that may go unit by unit.

    In a layer that loses a whole sublayer they hold for the other one. The finest units are kept in
    multiples of ``align``.
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

    def step(self, kind: str) -> int:
        """Units of ``kind`` that go at a time."""
        return self.align if kind == FINEST else 1

    def counts(self, size: LayerSize, kind: str) -> range:
        """Numbers of units of ``kind`` that may go: a thinned sublayer keeps at least one step and
        its ``least`` units, and as many as a multiple of the step."""
        part, step = size.sublayers[kind], self.step(kind)
        return range(part.units % step, part.units - part.least + 1, step) or range(1)


def remaining(sizes: Sequence[LayerSize], removals: Sequence[Removal]) -> list[LayerSize]:
    """What may be thinned once the sublayers that ``removals`` take as a whole are gone."""
    return [
        LayerSize(
            {
                kind: replace(part, units=0 if _is_gone(kind, r) else part.units, whole=0)
                for kind, part in s.sublayers.items()
            }
        )
        for s, r in zip(sizes, removals, strict=True)
    ]


def _is_gone(kind: str, removal: Removal) -> bool:
    """Whether ``removal`` leaves no sublayer of ``kind``; experts take their channels along."""
    return kind in removal.gone or (kind == FINEST and "experts" in removal.gone)


def merged(whole: Sequence[Removal], thinned: Sequence[Removal]) -> list[Removal]:
    """``thinned`` with the sublayers that ``whole`` removes."""
    return [Removal(t.units, w.gone) for w, t in zip(whole, thinned, strict=True)]


def removed_parameters(sizes: Sequence[LayerSize], removals: Sequence[Removal]) -> int:
    """Parameters that ``removals`` take away."""
    return sum(parameters(size, removal) for size, removal in zip(sizes, removals, strict=True))


def parameters(size: LayerSize, removal: Removal) -> int:
    """Parameters that ``removal`` takes from a layer of ``size``."""
    return unit_parameters(size, removal) + whole_parameters(size, removal)


def unit_parameters(size: LayerSize, removal: Removal) -> int:
    """Those of them that leave unit by unit."""
    return sum(n * size.sublayers[kind].cost for kind, n in removal.units.items())


def whole_parameters(size: LayerSize, removal: Removal) -> int:
    """Those of them that leave with whole sublayers."""
    last = size.shared if removal.gone >= size.removable else 0
    return sum(size.sublayers[kind].whole for kind in removal.gone) + last


def check_align(sizes: Sequence[LayerSize], limits: Limits) -> None:
    """InputError when a layer has too few units to keep a multiple of ``limits.align``."""
    for index, size in enumerate(sizes):
        if 0 < size.finest.units < limits.align:
            raise InputError(
                f"--align {limits.align}: layer {index} has {size.finest.units} {UNITS[FINEST]}, "
                f"so no multiple of that can be kept; use --align {size.finest.units} at most, or "
                "leave such layers out with --layers"
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
        counts = [(limits.counts(size, kind), p.cost) for kind, p in size.sublayers.items()]
        unaligned = sum(able[0] * cost for able, cost in counts)
        most = sum(able[-1] * cost for able, cost in counts)
        if not size.whole:
            low += min(max(limits.lowest * size.prunable, unaligned), most)
        high += size.whole or max(min(limits.highest * size.prunable, most), unaligned)
    return low, high - min(_wholes(sizes), default=0)


class BudgetError(InputError):
    """The limits rule the budget out; ``low`` and ``high`` bound what can be removed."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__(f"between {low:.0f} and {high:.0f} parameters can be removed")
        self.low, self.high = low, high


def smallest_unit(sizes: Sequence[LayerSize], limits: Limits) -> int:
    """Parameters of the cheapest removal: of units that go at a time, or of a whole sublayer."""
    steps = (cost for kind in KINDS for cost in _steps(sizes, limits, kind))
    return min([*steps, *_wholes(sizes)], default=0)


def half_unit(sizes: Sequence[LayerSize], limits: Limits) -> float:
    """Half of the smallest step of the finest kind that has units, else of a whole sublayer."""
    ways = [*(_steps(sizes, limits, kind) for kind in reversed(KINDS)), _wholes(sizes), [0]]
    return min(next(filter(None, ways))) / 2


def coarsest_step(sizes: Sequence[LayerSize], limits: Limits) -> int:
    """Parameters of the largest units that go at a time in a layer that has no finest ones to fill
    up what they leave; 0 where every layer has some."""
    without = [size for size in sizes if not size.finest.units]
    return max((cost for kind in KINDS for cost in _steps(without, limits, kind)), default=0)


def _steps(sizes: Sequence[LayerSize], limits: Limits, kind: str) -> list[int]:
    """Parameters of the units of ``kind`` that go at a time, of the layers that have some."""
    parts = (size.sublayers[kind] for size in sizes)
    return [part.cost * limits.step(kind) for part in parts if part.units]


def _wholes(sizes: Sequence[LayerSize]) -> list[int]:
    """Parameters of every sublayer that may go as a whole."""
    return [part.whole for size in sizes for part in size.sublayers.values() if part.whole]
