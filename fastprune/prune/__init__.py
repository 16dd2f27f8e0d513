"""Score, plan, cut, compensate. ``fastprune.prune(model, tokenizer, config)`` does it all."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fastprune.prune.config import PruneConfig
    from fastprune.prune.pipeline import PruneResult


class _Prune(ModuleType):
    """This package is also the function of its name: importing a part of it sets the attribute
    ``fastprune.prune`` to the package, which would hide a function put there."""

    def __call__(self, model: nn.Module, tokenizer: Any, config: PruneConfig) -> PruneResult:
        """Prune ``model`` in place; see `fastprune.prune.pipeline.prune`."""
        from fastprune.prune.pipeline import prune

        return prune(model, tokenizer, config)


sys.modules[__name__].__class__ = _Prune
