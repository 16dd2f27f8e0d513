"""A model in memory with the text that it is calibrated on, and scores by kind of sublayer."""

from __future__ import annotations

from torch import Tensor, nn

from fastprune.distributed import ALONE, Processes
from fastprune.models.layers import Layers
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.importance import Scores


def calibrated(model: nn.Module, windows: Tensor, processes: Processes = ALONE) -> Calibration:
    """``model``, all of whose layers are resident, and token ``windows`` (n, s)."""
    return Calibration(Layers(model), windows, processes)


def by_kind(scores: Scores, kind: str) -> list[Tensor]:
    """Those of the sublayers of ``kind`` in every layer."""
    return [units[kind] for units in scores.layers]
