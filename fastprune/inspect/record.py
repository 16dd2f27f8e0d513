"""What a checkpoint says of its own making, in fastprune/metrics.json.

The dense model, how much of it is left and what it could do travel with every later checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.output import RECORDS
from fastprune.readers import read_json

Windows = tuple[str, int, int]
"""What a perplexity was measured in: the text, tokens of a window, windows. Only figures of equal
windows compare."""


@dataclass(frozen=True)
class Figures:
    """Perplexities in the same windows, None where there is none: of the dense model, and of what
    pruning made of it."""

    dense: float | None
    pruned: float | None


@dataclass(frozen=True)
class Params:
    """Parameters of the dense model and of what it is now, in all and in the decoder layers."""

    dense: int
    now: int
    block_dense: int
    block_now: int


@dataclass(frozen=True)
class Origin:
    """The dense model that a checkpoint goes back to. ``perplexity`` holds figures by windows."""

    dense: str
    params: Params
    perplexity: Mapping[Windows, Figures]

    @property
    def removed(self) -> float:
        """Share of the dense model's block parameters that is gone."""
        return 1 - self.params.block_now / self.params.block_dense

    def figures(self, windows: Windows) -> Figures:
        """The perplexities in exactly these windows, as far as they were measured."""
        return self.perplexity.get(windows, Figures(None, None))

    def known(self) -> Windows | None:
        """The first windows in which the dense model was measured."""
        return next((w for w, f in self.perplexity.items() if f.dense is not None), None)

    def with_params(self, now: int) -> Origin:
        """The same where the model has ``now`` parameters in all."""
        return replace(self, params=replace(self.params, now=now))

    def in_other_tokens(self, windows: Windows, now: Windows, longer: float) -> Origin:
        """The same for a model of other tokens, which are ``longer`` times as many bytes long.

        Figures measured in ``windows`` are those of the windows ``now`` then, per token of that
        model. What was measured elsewhere is left out.
        """
        found = self.figures(windows)
        figures = [None if f is None else f**longer for f in (found.dense, found.pruned)]
        return replace(self, perplexity={now: Figures(*figures)})

    @staticmethod
    def of(source: str | Path) -> Origin | None:
        """The origin of the checkpoint in the folder ``source``, by its record.

        None where there is no such folder, no record, or none that goes back to a pruning.
        """
        return _origin(Path(source), frozenset()) if str(source) else None

    @staticmethod
    def of_pruning(metrics: Mapping[str, Any], earlier: Origin | None) -> Origin:
        """The origin of what ``prune`` made; ``earlier`` is that of the model it was given.

        ``metrics`` holds model, params and perplexity as metrics.json does. Raises KeyError,
        TypeError or ValueError where they do not.
        """
        params = metrics["params"]
        after = {_windows(p): float(p["after"]) for p in metrics["perplexity"]}
        now = int(params["after"]), int(params["block_after"])
        if earlier is None:
            given = int(params["before"]), int(params["block_before"])
            before = {_windows(p): float(p["before"]) for p in metrics["perplexity"]}
            dense = str(metrics["model"])
        else:
            given = earlier.params.dense, earlier.params.block_dense
            before = {w: f.dense for w, f in earlier.perplexity.items() if f.dense is not None}
            dense = earlier.dense
        if not given[1] > 0:
            raise ValueError("a model without decoder layers")
        return Origin(
            dense,
            Params(given[0], now[0], given[1], now[1]),
            {w: Figures(before.get(w), after.get(w)) for w in {**before, **after}},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, from which `of` reads it again."""
        names = ("text", "seq_len", "windows")
        return {
            "dense": self.dense,
            "params": dict(vars(self.params)),
            "removed": self.removed,
            "perplexity": [
                {**dict(zip(names, windows)), **vars(figures)}
                for windows, figures in self.perplexity.items()
            ],
        }


def read_metrics(folder: Path) -> dict[str, Any]:
    """What fastprune/metrics.json in ``folder`` holds; empty where there is none to be read."""
    try:
        found = read_json(folder / RECORDS / "metrics.json")
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def _origin(folder: Path, seen: frozenset[Path]) -> Origin | None:
    """`Origin.of`, but for the folders ``seen`` on the way back from a later checkpoint."""
    try:
        place = folder.expanduser().resolve()
        metrics = {} if place in seen else read_metrics(place)
        if "origin" in metrics:
            return _stored(metrics["origin"])
        if not metrics.get("model"):
            return None
        # Earlier versions did not record it: what they began with leads back.
        earlier = _origin(Path(str(metrics["model"])), seen | {place})
        return Origin.of_pruning(metrics, earlier) if "ratio" in metrics else earlier
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, OSError, RuntimeError):
        return None


def _stored(found: Mapping[str, Any]) -> Origin:
    origin = Origin(
        dense=str(found["dense"]),
        params=Params(**{name: int(count) for name, count in found["params"].items()}),
        perplexity={
            _windows(p): Figures(_figure(p["dense"]), _figure(p["pruned"]))
            for p in found["perplexity"]
        },
    )
    if origin.params.block_dense <= 0:
        raise ValueError("a model without decoder layers")
    return origin


def _windows(p: Mapping[str, Any]) -> Windows:
    return str(p["text"]), int(p["seq_len"]), int(p["windows"])


def _figure(value: Any) -> float | None:
    return None if value is None else float(value)
