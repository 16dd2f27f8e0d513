"""Forms that other engines load. ``fastprune.export(model, tokenizer, config)`` writes them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fastprune.export.config import ExportConfig


class _Export(ModuleType):
    """This package is also the function of its name, as `fastprune.prune` is."""

    def __call__(
        self, model: nn.Module, tokenizer: Any, config: ExportConfig, source: Path | None = None
    ) -> dict[str, Any]:
        """Write `model` to `config.out`; see `fastprune.export.pipeline.export`."""
        from fastprune.export.pipeline import export

        return export(model, tokenizer, config, source)


sys.modules[__name__].__class__ = _Export
