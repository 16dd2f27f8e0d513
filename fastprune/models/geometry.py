"""Kinds of sublayers, and the sizes of a decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

UNITS = {"attention": "KV groups", "experts": "experts", "mlp": "channels"}
"""Kinds of sublayers, in the order in which a layer runs them, and what their units are called.

A layer has an MLP or, in its place, a mixture of experts, which have channels inside.
"""
KINDS = tuple(UNITS)
COARSE, FINEST = KINDS[:-1], KINDS[-1]
"""The finest units are a row or a column wide and cost the fewest parameters: they fill up what is
left of a budget once the coarse ones are apportioned, and they are what an alignment counts."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one decoder layer; a removed sublayer has zero units.

    Where ``experts`` take the place of the MLP, ``channels`` are those of each of them.
    """

    query_heads: int
    kv_heads: int
    channels: int
    head_dim: int
    experts: int = 0

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head (0 when the attention is removed)."""
        return self.query_heads // self.kv_heads if self.kv_heads else 0

    @property
    def units(self) -> dict[str, int]:
        """Units of each kind of sublayer."""
        return {
            "attention": self.kv_heads,
            "experts": self.experts,
            "mlp": 0 if self.experts else self.channels,
        }

    def has(self, kind: str) -> bool:
        """Whether a layer of these sizes, or one like it whose MLP is removed, has the ``kind``."""
        return kind == "attention" or (kind == "experts") == bool(self.experts)

    def to_dict(self) -> dict[str, int]:
        """The sizes as JSON-ready data; those of experts where there are some."""
        return {name: n for name, n in asdict(self).items() if n or name != "experts"}

    def keeping(self, units: Mapping[str, int], channels: int | None = None) -> Geometry:
        """These sizes with so many ``units`` of the kinds that it names, and ``channels`` in each
        expert (default: all)."""
        kept = {**self.units, **units}
        groups, experts = kept["attention"], kept["experts"]
        inside = self.channels if channels is None else channels
        return replace(
            self,
            query_heads=groups * self.queries_per_kv,
            kv_heads=groups,
            channels=inside if experts else kept["mlp"],
            experts=experts,
        )
