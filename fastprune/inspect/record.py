"""What a pruned checkpoint says of its own making, in fastprune/metrics.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PruningRecord:
    """Of what, by which command and by how much a checkpoint was pruned.

    ``perplexities`` are the dense model's, by (text, seq_len, windows).
    """

    dense: str
    command: str
    removed: float
    perplexities: dict[tuple[str, int, int], float]

    @staticmethod
    def of(folder: Path) -> PruningRecord | None:
        """The record in a checkpoint's folder; None where there is none that can be read."""
        try:
            metrics = json.loads((folder / "fastprune" / "metrics.json").read_text("utf-8"))
            return PruningRecord(
                dense=str(metrics["model"]),
                command=str(metrics["command"]),
                removed=float(metrics["ratio"]["achieved"]),
                perplexities={
                    (p["text"], p["seq_len"], p["windows"]): float(p["before"])
                    for p in metrics["perplexity"]
                },
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def dense_perplexity(self, text: str, seq_len: int, windows: int) -> float | None:
        """The dense model's perplexity in exactly these windows, if it was measured."""
        return self.perplexities.get((text, seq_len, windows))
