"""The format `hf`: a Hugging Face folder, as `prune` writes it.

Layers of one size become a stock model that any engine loads, layers of different sizes one with
`per_layer_config` and the modelling file that reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastprune.exporting.formats import size_of
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.readback import check_read_back

if TYPE_CHECKING:
    from fastprune.exporting.config import ExportConfig


def check(model: nn.Module, config: ExportConfig) -> None:
    """Every model that was loaded can be written as such a folder."""


def write(model: nn.Module, tokenizer: Any, path: Path, config: ExportConfig) -> dict[str, Any]:
    """Write `model` and `tokenizer` into the empty folder `path`.

    Raises ReadBackError when `config.read_back` asks for a comparison and the folder does not give
    the same logits.
    """
    save_checkpoint(model, tokenizer, path)
    if config.read_back:
        check_read_back(model, path)
    return {"bytes": size_of(path), "notes": []}
