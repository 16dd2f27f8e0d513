"""The plan: per layer, which KV groups and channels stay. Pure data, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.models.families import KINDS, UNITS, Geometry
from fastprune.readers import read_json

FORMAT = "fastprune-plan/1"
FIELDS = {"attention": "kv_groups", "experts": "experts", "mlp": "channels"}
"""What the kept units of each kind of sublayer are called in a file."""
INSIDE = "expert_channels"
"""What the kept channels of each kept expert are called there."""


@dataclass(frozen=True)
class LayerPlan:
    """Kept units of one layer by kind of sublayer, ascending; one that keeps none is removed.

    ``inside`` are the kept channels of each kept expert, as many in all of them; empty where they
    keep all.
    """

    index: int
    kept: Mapping[str, tuple[int, ...]]
    inside: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        every = {kind: tuple(self.kept.get(kind, ())) for kind in KINDS}
        object.__setattr__(self, "kept", every)
        object.__setattr__(self, "inside", tuple(tuple(own) for own in self.inside))

    @property
    def channels(self) -> int | None:
        """Channels that each expert keeps; None where they keep all."""
        return len(self.inside[0]) if self.inside else None

    def to_dict(self, size: Geometry) -> dict[str, object]:
        """This plan for a layer of ``size`` as JSON-ready data."""
        data: dict[str, object] = {"index": self.index}
        data |= {FIELDS[k]: list(kept) for k, kept in self.kept.items() if size.has(k)}
        if self.inside:
            data[INSIDE] = [list(own) for own in self.inside]
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any], size: Geometry) -> LayerPlan:
        """What `to_dict` gave; KeyError or TypeError where it is something else."""
        kept = {kind: tuple(data[FIELDS[kind]]) for kind in KINDS if size.has(kind)}
        return LayerPlan(data["index"], kept, tuple(map(tuple, data.get(INSIDE, ()))))


@dataclass(frozen=True)
class Plan:
    """What stays of a model whose layers have the given geometries."""

    geometries: tuple[Geometry, ...]
    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.geometries):
            raise InputError(
                f"the plan lists {len(self.layers)} layers for a model of {len(self.geometries)}; "
                "it needs one entry for each layer"
            )
        for expected, (layer, size) in enumerate(zip(self.layers, self.geometries, strict=True)):
            if layer.index != expected:
                raise InputError(
                    f"the plan has layer {layer.index} where layer {expected} belongs; number its "
                    "layers from 0, without gaps"
                )
            for kind, kept in layer.kept.items():
                _check_kept(layer.index, UNITS[kind], kept, size.units[kind])
            _check_inside(layer, size)

    def result(self) -> list[Geometry]:
        """The geometry of every layer after surgery."""
        return [
            size.keeping({kind: len(kept) for kind, kept in layer.kept.items()}, layer.channels)
            for layer, size in zip(self.layers, self.geometries, strict=True)
        ]

    def check_model(self, geometries: Sequence[Geometry]) -> None:
        """InputError when this plan was made for a model of another shape."""
        if tuple(geometries) != self.geometries:
            where = next(
                (i for i, (a, b) in enumerate(zip(geometries, self.geometries)) if a != b), None
            )
            detail = (
                f"it has {len(self.geometries)} layers, the model {len(geometries)}"
                if where is None
                else f"layer {where} is {_words(self.geometries[where])} in the plan and "
                f"{_words(geometries[where])} in the model"
            )
            raise InputError(
                f"the plan was made for another model: {detail}; give a plan of this model"
            )

    def then(self, later: Plan) -> Plan:
        """This plan followed by ``later``, made for its result, as one plan.

        A layer of which this plan leaves nothing may be missing in ``later``.
        """
        left = [i for i, size in enumerate(self.result()) if any(size.units.values())]
        if len(later.layers) == len(self.layers):
            left = list(range(len(self.layers)))
        later.check_model([self.result()[i] for i in left])
        layers = list(self.layers)
        for index, second in zip(left, later.layers, strict=True):
            layers[index] = _then(layers[index], second)
        return Plan(self.geometries, tuple(layers))

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON-ready data."""
        return {
            "format": FORMAT,
            "model": {"layers": [g.to_dict() for g in self.geometries]},
            "layers": [
                layer.to_dict(size)
                for layer, size in zip(self.layers, self.geometries, strict=True)
            ],
        }

    def save(self, path: Path) -> None:
        """Write the plan as JSON, one layer to a line so that two plans diff well."""
        data = self.to_dict()
        layers = ",\n  ".join(json.dumps(layer) for layer in data.pop("layers"))  # type: ignore[attr-defined]
        head = json.dumps(data)[:-1]
        path.write_text(f'{head}, "layers": [\n  {layers}\n]}}\n', encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Plan:
        """Read a plan; InputError when the file is missing or is not a plan."""
        try:
            data = read_json(path)
        except InputError as error:
            raise InputError(f"plan {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(
                f"{path} is not a plan: its format is not '{FORMAT}'; give a plan.json that prune "
                "wrote"
            )
        try:
            sizes = tuple(Geometry(**size) for size in data["model"]["layers"])
            # of a layer too many Plan says so
            beyond = [Geometry(0, 0, 0, 0)] * max(0, len(data["layers"]) - len(sizes))
            layers = zip(data["layers"], [*sizes, *beyond])
            return Plan(sizes, tuple(LayerPlan.from_dict(own, size) for own, size in layers))
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a plan: a field is missing or wrong; give a plan.json that prune "
                "wrote"
            ) from error


def keep_all(geometries: Iterable[Geometry]) -> Plan:
    """The plan that removes nothing."""
    sizes = tuple(geometries)
    return Plan(
        sizes,
        tuple(
            LayerPlan(i, {kind: tuple(range(units)) for kind, units in g.units.items()})
            for i, g in enumerate(sizes)
        ),
    )


def _then(first: LayerPlan, second: LayerPlan) -> LayerPlan:
    """One layer's plan ``first`` followed by ``second``, made for its result."""
    kept = {k: tuple(first.kept[k][i] for i in units) for k, units in second.kept.items()}
    inside = [first.inside[i] for i in second.kept["experts"]] if first.inside else second.inside
    if first.inside and second.inside:
        inside = [tuple(own[i] for i in chosen) for own, chosen in zip(inside, second.inside)]
    return LayerPlan(first.index, kept, tuple(inside))


def _check_inside(layer: LayerPlan, size: Geometry) -> None:
    """InputError unless every kept expert keeps as many channels, or all keep all."""
    if not layer.inside:
        return
    counts = {len(own) for own in layer.inside}
    if len(layer.inside) != len(layer.kept["experts"]) or len(counts) > 1 or 0 in counts:
        raise InputError(
            f"the plan's {INSIDE} of layer {layer.index} are not lists of one length, one for each "
            "expert that it keeps"
        )
    for own in layer.inside:
        _check_kept(layer.index, UNITS["mlp"], own, size.channels)


def _check_kept(index: int, what: str, kept: tuple[int, ...], count: int) -> None:
    ascending = all(isinstance(unit, int) for unit in kept) and all(
        a < b for a, b in zip(kept, kept[1:])
    )
    if not ascending or (kept and not (0 <= kept[0] and kept[-1] < count)):
        raise InputError(
            f"the plan's {what} of layer {index} are not ascending numbers below {count}; list "
            "each one that is kept once, in ascending order"
        )


def _words(g: Geometry) -> str:
    experts = f"{g.experts} experts of " if g.experts else ""
    return f"{g.query_heads}:{g.kv_heads} heads of {g.head_dim} and {experts}{g.channels} channels"
