"""Which sublayers go as a whole: counting over measured losses, no weights.

Formulas: the allocation section of docs/dev/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastprune.pruning.sizes import LayerSize, Removal


@dataclass(frozen=True)
class Candidate:
    """A sublayer that may go as a whole: its parameters, and the loss it costs in nats a token."""

    layer: int
    kind: str
    parameters: int
    loss: float

    @property
    def price(self) -> float:
        """Loss per parameter."""
        return self.loss / self.parameters


def cheapest_first(
    sizes: Sequence[LayerSize], losses: Sequence[Mapping[str, float]]
) -> list[Candidate]:
    """The sublayers that may go, by loss per parameter.

    ``losses`` are the loss increases, in nats a token, without each sublayer, by its kind, of each
    layer.
    """
    found = [
        Candidate(layer, kind, part.whole, own[kind])
        for layer, (size, own) in enumerate(zip(sizes, losses, strict=True))
        for kind, part in size.sublayers.items()
        if part.whole
    ]
    return sorted(found, key=lambda s: s.price)


def nearest(candidates: Sequence[Candidate], layers: int, target: float) -> list[Removal]:
    """Whole sublayers in order of price until ``target`` parameters are gone, as near as they fit.

    One that would overshoot by more than half the smallest sublayer is passed over for later ones;
    at the end one more goes where that comes nearer. One sublayer always stays.
    """
    half = min((s.parameters for s in candidates), default=0) / 2
    taken: list[Candidate] = []
    left = target
    for sublayer in candidates:
        if left > half and sublayer.parameters <= left + half and len(taken) < len(candidates) - 1:
            taken.append(sublayer)
            left -= sublayer.parameters
    rest = [s for s in candidates if s not in taken]
    if len(rest) > 1:
        last = min(rest, key=lambda s: abs(left - s.parameters))
        if abs(left - last.parameters) < abs(left):
            taken.append(last)
    return removals(taken, layers)


def cheaper_than(
    price: float,
    candidates: Sequence[Candidate],
    layers: int,
    target: float,
    enough: Callable[[list[Removal]], bool],
) -> list[Removal]:
    """Whole sublayers that cost less than ``price`` nats per parameter, at most ``target`` in all.

    ``price`` is what thinning costs, infinite where it cannot reach the budget alone. More of them
    go, in order, until ``enough`` says that thinning can do the rest.
    """
    taken: list[Candidate] = []
    left = target
    for sublayer in candidates:
        worth_it = sublayer.price < price < math.inf
        if not worth_it and enough(removals(taken, layers)):
            break
        last = len(taken) == len(candidates) - 1
        if sublayer.parameters <= left and not last:
            taken.append(sublayer)
            left -= sublayer.parameters
    return removals(taken, layers)


def removals(taken: Sequence[Candidate], layers: int) -> list[Removal]:
    """``taken`` layer by layer."""
    return [Removal(gone={s.kind for s in taken if s.layer == index}) for index in range(layers)]
