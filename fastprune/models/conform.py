"""A model object becomes one whose layers differ in size, in place.

`fastprune.prune(model, ...)` changes the model that it is given, so the object stays and its class
changes: transformers writes the name of the class into every checkpoint as its architecture, and
engines choose by that name what they build. The stock class would say that all layers are alike. A
release of transformers whose stock models build their layers from `per_layer_config` makes this
file, and the classes of modeling.py, unnecessary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastprune.models.adopted import adopted_config
from fastprune.models.families import PRUNED_PREFIX, Geometry, decoder_layers, is_adopted
from fastprune.models.modeling import (
    ATTENTION,
    MLP,
    family_classes,
    per_layer_config,
    remove_sublayer,
    settle_experts,
    settle_heads,
)
from fastprune.models.quiet import quiet_libraries


def conform(model: nn.Module, sizes: Sequence[Geometry]) -> None:
    """Make everything around the weights of `model`, cut to `sizes`, agree with them, in place.

    Removes the sublayers of size zero, and turns the model into the class that builds layers of
    such sizes, with its config: it then trains, generates and saves like a model loaded from disk.
    A model of an adopted type keeps its class. Raises InputError for sizes that it cannot have.
    """
    if is_adopted(model.config):
        _conform_stock(model, sizes)
        return
    old, new = model.config, per_layer_config(model.config, sizes)
    family = new.model_type.removeprefix(PRUNED_PREFIX)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    for layer, size in zip(decoder_layers(model), sizes, strict=True):
        if size.query_heads:
            settle_heads(layer.self_attn, new, size.query_heads, size.kv_heads)
        else:
            remove_sublayer(layer, ATTENTION, family)
        if not size.channels:
            remove_sublayer(layer, MLP, family)
        elif size.experts:
            settle_experts(layer.mlp, size)
        elif hasattr(layer.mlp, "intermediate_size"):
            layer.mlp.intermediate_size = size.channels
    model.__class__ = family_classes(family).causal_lm


def _conform_stock(model: nn.Module, sizes: Sequence[Geometry]) -> None:
    """As `conform`, for layers of one size: the sizes that stock modules note are those of modules
    that are built with them.
    """
    old, new = model.config, adopted_config(model.config, sizes)
    with torch.device("meta"), quiet_libraries():
        like = type(model)(new)
    for own, fresh in zip(decoder_layers(model), decoder_layers(like), strict=True):
        for module, other in zip(own.modules(), fresh.modules(), strict=True):
            noted = {name: value for name, value in vars(other).items() if isinstance(value, int)}
            vars(module).update({k: v for k, v in noted.items() if k != "training"})
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
