"""The plan: per layer, which KV groups and channels stay. Pure data, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastprune.errors import InputError
from fastprune.models.families import Geometry

FORMAT = "fastprune-plan/1"


@dataclass(frozen=True)
class LayerPlan:
    """Kept units of one layer, ascending; an empty tuple removes the sublayer."""

    index: int
    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """The same by kind of sublayer."""
        return {"attention": self.kv_groups, "mlp": self.channels}


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
            _check_kept(layer.index, "KV groups", layer.kv_groups, size.kv_heads)
            _check_kept(layer.index, "channels", layer.channels, size.channels)

    def result(self) -> list[Geometry]:
        """The geometry of every layer after surgery."""
        return [
            Geometry(
                query_heads=len(layer.kv_groups) * size.queries_per_kv,
                kv_heads=len(layer.kv_groups),
                channels=len(layer.channels),
                head_dim=size.head_dim,
            )
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
        left = [i for i, size in enumerate(self.result()) if size.query_heads or size.channels]
        if len(later.layers) == len(self.layers):
            left = list(range(len(self.layers)))
        later.check_model([self.result()[i] for i in left])
        layers = list(self.layers)
        for index, second in zip(left, later.layers, strict=True):
            first = layers[index]
            layers[index] = LayerPlan(
                index,
                tuple(first.kv_groups[i] for i in second.kv_groups),
                tuple(first.channels[i] for i in second.channels),
            )
        return Plan(self.geometries, tuple(layers))

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON-ready data."""
        return {
            "format": FORMAT,
            "model": {"layers": [asdict(g) for g in self.geometries]},
            "layers": [
                {
                    "index": layer.index,
                    "kv_groups": list(layer.kv_groups),
                    "channels": list(layer.channels),
                }
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
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the plan {path}: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{path} is not a plan: it does not hold JSON") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"{path} is not a plan: its format is not '{FORMAT}'")
        try:
            return Plan(
                tuple(Geometry(**sizes) for sizes in data["model"]["layers"]),
                tuple(
                    LayerPlan(entry["index"], tuple(entry["kv_groups"]), tuple(entry["channels"]))
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
            LayerPlan(i, tuple(range(g.kv_heads)), tuple(range(g.channels)))
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
