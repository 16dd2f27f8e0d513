"""Makes vLLM know per-layer checkpoints; the entry point `vllm.general_plugins` names `register`.

vLLM calls it in every process that it starts, before CUDA may be touched. So the models are named
here and imported by vLLM when it builds one.
"""

from __future__ import annotations

MODEL = "fastprune.exporting.vllm_models:PerLayerForCausalLM"


def register() -> None:
    """Register the per-layer configs with transformers, and their models with vLLM."""
    from vllm import ModelRegistry

    from fastprune.models import modeling

    modeling.register()
    for family in map(modeling.family_classes, modeling.STOCK):
        ModelRegistry.register_model(family.causal_lm.__name__, MODEL)
