"""Training data from settings by name, as most tests want it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastprune.data import training
from fastprune.data.training import Reading, TrainingData


def training_data(spec: str | Path, tokenizer: Any, **settings: Any) -> TrainingData:
    """What `training.training_data` gives for a `Reading` of these settings."""
    return training.training_data(spec, tokenizer, Reading(**settings))
