"""A model object becomes one whose layers differ in size, in place.

`fastprune.prune(model, ...)` changes the model that it is given, so the object stays and its class
changes: transformers writes the name of the class into every checkpoint as its architecture, and
engines choose by that name what they build. The stock class would say that all layers are alike. A
release of transformers whose stock models build their layers from `per_layer_config` makes this
file, and the classes of modeling.py, unnecessary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastprune.models.modeling import (
    FAMILIES,
    Sizes,
    per_layer_config,
    remove_attention,
    remove_mlp,
)


def conform(model: nn.Module, sizes: Sequence[Sizes]) -> None:
    """Make everything around the weights of `model`, cut to `sizes`, agree with them, in place.

    Removes the sublayers of size zero, and turns the model into the class that builds layers of
    such sizes, with its config: it then trains, generates and saves like a model loaded from disk.
    """
    old, new = model.config, per_layer_config(model.config, sizes)
    layers = model.model.layers
    for layer, size in zip(layers, sizes, strict=True):
        if not size.query_heads:
            remove_attention(layer)
        else:
            layer.self_attn.num_key_value_groups = size.query_heads // size.kv_heads
        if not size.channels:
            remove_mlp(layer)
        else:
            layer.mlp.intermediate_size = size.channels
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    model.__class__ = FAMILIES[new.model_type.removeprefix("fastprune_")].causal_lm
