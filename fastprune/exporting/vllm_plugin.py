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
    for name, stock in modeling.STOCK.items():
        if stock.experts is None:  # its layers have an MLP, as those of MODEL
            ModelRegistry.register_model(modeling.family_classes(name).causal_lm.__name__, MODEL)
