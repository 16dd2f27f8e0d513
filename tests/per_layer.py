"""Tiny models whose layers differ in size, built from a config."""

import torch
from tiny import tiny_config
from torch import nn

from fastprune.models import modeling

NO_ATTENTION = {"skip": ["attention"]}
NO_MLP = {"skip": ["mlp"]}
SIZES = {
    0: NO_ATTENTION,
    1: {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50},
    3: NO_MLP,
}


def per_layer_config(family: str, sizes: dict = SIZES, **options):
    """A tiny config of `family` whose layers have the overrides `sizes`."""
    settings = tiny_config(family, **options).to_dict()
    settings.pop("model_type")
    return modeling.family_classes(family).config(**settings, per_layer_config=sizes)


def per_layer_model(family: str, sizes: dict = SIZES, **options) -> nn.Module:
    """A random fp32 model of `family` with those layers, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class = modeling.family_classes(family).causal_lm
        return model_class(per_layer_config(family, sizes, **options)).eval()
