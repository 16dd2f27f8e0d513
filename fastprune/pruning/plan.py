"""The plan: per layer, which KV groups and channels stay. Pure data, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastprune.errors import InputError
from fastprune.models.families import KINDS, UNITS, Geometry
from fastprune.readers import read_json

FORMAT = "fastprune-plan/1"
FIELDS = {"attention": "kv_groups", "mlp": "channels"}
"""What the kept units of each kind of sublayer are called in a file."""


@dataclass(frozen=True)
class LayerPlan:
    """Kept units of one layer by kind of sublayer, ascending; one that keeps none is removed."""

    index: int
    kept: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        every = {kind: tuple(self.kept.get(kind, ())) for kind in KINDS}
        object.__setattr__(self, "kept", every)


@dataclass(frozen=True)
class Plan:
    """What stays of a model whose layers have the given geometries."""

    geometries: tuple[Geometry, ...]
    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.geometries):
            raise InputError(
                f"the plan lists {len(self.layers)} layers for a model of {len(self.geometries)}"
            )
        for expected, (layer, size) in enumerate(zip(self.layers, self.geometries, strict=True)):
            if layer.index != expected:
                raise InputError(f"the plan's layer {expected} calls itself {layer.index}")
            for kind, kept in layer.kept.items():
                _check_kept(layer.index, UNITS[kind], kept, size.units[kind])

    def result(self) -> list[Geometry]:
        """The geometry of every layer after surgery."""
        return [
            size.keeping({kind: len(kept) for kind, kept in layer.kept.items()})
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
            raise InputError(f"the plan was made for another model: {detail}")

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
            first = layers[index]
            kept = {k: tuple(first.kept[k][i] for i in units) for k, units in second.kept.items()}
            layers[index] = LayerPlan(index, kept)
        return Plan(self.geometries, tuple(layers))

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON-ready data."""
        return {
            "format": FORMAT,
            "model": {"layers": [asdict(g) for g in self.geometries]},
            "layers": [
                {"index": layer.index} | {FIELDS[k]: list(kept) for k, kept in layer.kept.items()}
                for layer in self.layers
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
            raise InputError(f"{path} is not a plan: its format is not '{FORMAT}'")
        try:
            return Plan(
                tuple(Geometry(**sizes) for sizes in data["model"]["layers"]),
                tuple(
                    LayerPlan(entry["index"], {k: tuple(entry[f]) for k, f in FIELDS.items()})
                    for entry in data["layers"]
                ),
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is not a plan: a field is missing or wrong") from error


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


def _check_kept(index: int, what: str, kept: tuple[int, ...], count: int) -> None:
    ascending = all(isinstance(unit, int) for unit in kept) and all(
        a < b for a, b in zip(kept, kept[1:])
    )
    if not ascending or (kept and not (0 <= kept[0] and kept[-1] < count)):
        raise InputError(
            f"the plan's {what} of layer {index} are not ascending numbers below {count}"
        )


def _words(g: Geometry) -> str:
    return f"{g.query_heads}:{g.kv_heads} heads of {g.head_dim} and {g.channels} channels"
