"""fastprune: structured pruning of grouped-query language models, without breaking them.

Names below are imported when they are first used, so that ``import fastprune`` is quick.
Importing the package also makes its per-layer checkpoints known to transformers'
``AutoModelForCausalLM``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastprune.models.lazy import register_on_first_use

if TYPE_CHECKING:
    from fastprune.compression.config import CompressConfig
    from fastprune.compression.pipeline import compress
    from fastprune.errors import FastpruneError, GateError, InputError, NumericalError
    from fastprune.exporting.config import ExportConfig
    from fastprune.exporting.pipeline import export
    from fastprune.kernels.ops import taylor as taylor_scores
    from fastprune.kernels.optim import AdamW
    from fastprune.pruning.config import PruneConfig
    from fastprune.pruning.pipeline import PruneResult, prune
    from fastprune.recover.config import FinetuneConfig
    from fastprune.recover.pipeline import FinetuneResult, finetune

_PUBLIC = {
    "CompressConfig": "fastprune.compression.config:CompressConfig",
    "compress": "fastprune.compression.pipeline:compress",
    "AdamW": "fastprune.kernels.optim:AdamW",
    "ExportConfig": "fastprune.exporting.config:ExportConfig",
    "FinetuneConfig": "fastprune.recover.config:FinetuneConfig",
    "FinetuneResult": "fastprune.recover.pipeline:FinetuneResult",
    "FastpruneError": "fastprune.errors:FastpruneError",
    "GateError": "fastprune.errors:GateError",
    "InputError": "fastprune.errors:InputError",
    "NumericalError": "fastprune.errors:NumericalError",
    "PruneConfig": "fastprune.pruning.config:PruneConfig",
    "PruneResult": "fastprune.pruning.pipeline:PruneResult",
    "export": "fastprune.exporting.pipeline:export",
    "finetune": "fastprune.recover.pipeline:finetune",
    "prune": "fastprune.pruning.pipeline:prune",
    "taylor_scores": "fastprune.kernels.ops:taylor",
}

__all__ = [
    "AdamW",
    "CompressConfig",
    "ExportConfig",
    "FastpruneError",
    "FinetuneConfig",
    "FinetuneResult",
    "GateError",
    "InputError",
    "NumericalError",
    "PruneConfig",
    "PruneResult",
    "compress",
    "export",
    "finetune",
    "prune",
    "taylor_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastprune' has no attribute '{name}'")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


register_on_first_use()
