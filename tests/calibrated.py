"""A model in memory with the text that it is calibrated on."""

from __future__ import annotations

from torch import Tensor, nn

from fastprune.models.layers import Layers
from fastprune.pruning.calibration import Calibration


def calibrated(model: nn.Module, windows: Tensor) -> Calibration:
    """``model``, all of whose layers are resident, and token ``windows`` (n, s)."""
    return Calibration(Layers(model), windows)
