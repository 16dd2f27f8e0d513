"""Llama-family models whose decoder layers differ in size.

This file is copied into every per-layer checkpoint, so it imports torch and transformers only. A
config carries the sizes that differ from the global ones:

    "per_layer_config": {"3": {"num_attention_heads": 6, "num_key_value_heads": 2,
                               "intermediate_size": 1024}, ...}

Zero heads mean that the layer has no attention, a zero intermediate size that it has no MLP.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM


class Sizes(Protocol):
    """Sizes of one decoder layer; zero heads or channels mean that the sublayer is removed."""

    @property
    def query_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Removed(nn.Module):
    """Stands where a sublayer was: adds nothing to the residual stream."""


# Not a direct nn.Module: transformers reads this source, takes a class of that form for a real
# attention of its own making, and then refuses to switch attention implementations.
class RemovedAttention(Removed):
    """A removed attention; it keeps no cache."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.new_zeros(()), None


class RemovedMLP(Removed):
    """A removed MLP."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


def remove_attention(layer: nn.Module) -> None:
    """Take the attention out of `layer`, and the norm before it, which nothing reads then."""
    layer.self_attn = RemovedAttention()
    layer.input_layernorm = nn.Identity()


def remove_mlp(layer: nn.Module) -> None:
    """Take the MLP out of `layer`, and the norm before it, which nothing reads then."""
    layer.mlp = RemovedMLP()
    layer.post_attention_layernorm = nn.Identity()


def assign_cache_slots(layers: nn.ModuleList, layer_types: list[str] | None = None) -> None:
    """Number the attentions that are left, so that the first slots of a KV cache are in use.

    A cache is asked how many tokens it holds, and masks are sized, by its first slot (the first of
    each kind where sliding-window and full layers mix): a removed attention must not own it.
    """
    kinds = layer_types or ["attention"] * len(layers)
    slots = {kind: iter([i for i, k in enumerate(kinds) if k == kind]) for kind in set(kinds)}
    for layer, kind in zip(layers, kinds, strict=True):
        if not isinstance(layer.self_attn, RemovedAttention):
            layer.self_attn.layer_idx = next(slots[kind])


class PerLayerModel:
    """Mixin before a stock causal language model: every decoder layer is built at its own size."""

    layer_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        count, sizes = config.num_hidden_layers, config.to_dict().get("per_layer_config")
        # The stock constructor builds layers of one size; let it build everything but them.
        config.per_layer_config = None
        config.num_hidden_layers = 0
        super().__init__(config)
        config.num_hidden_layers = count
        config.per_layer_config = sizes
        layers = [self._build_layer(config, index) for index in range(count)]
        self.model.layers = nn.ModuleList(layers)
        assign_cache_slots(self.model.layers, getattr(config, "layer_types", None))
        self.post_init()

    def _build_layer(self, config: Any, index: int) -> nn.Module:
        own = copy.copy(config.per_layer_config[index])
        has_attention, has_mlp = own.num_attention_heads > 0, own.intermediate_size > 0
        if not has_attention:  # the smallest one that can be built; it is taken out below
            own.num_attention_heads = own.num_key_value_heads = 1
        if not has_mlp:
            own.intermediate_size = 1
        layer = self.layer_class(own, index)
        # Sizes are in the weights now. The shared config is where a later choice of another
        # attention implementation is written, so that is the one to read from.
        layer.self_attn.config = layer.mlp.config = config
        if not has_attention:
            remove_attention(layer)
        if not has_mlp:
            remove_mlp(layer)
        return layer


class PerLayerConfig:
    """Mixin before a stock config: the global value of a size that layers override may be read.

    It is the dense model's, the largest that a layer can have. Rotary embeddings (dynamic, yarn,
    longrope) and tools that size caches read the global number of heads.
    """

    allow_global_per_layer_attribute_access = True


@strict  # collects the validators anew; without it the parent's would still run on saving
class FastpruneLlamaConfig(PerLayerConfig, LlamaConfig):
    model_type = "fastprune_llama"

    def validate_architecture(self) -> None:
        """Allow heads that do not divide the hidden size: the head size is explicit."""


class FastpruneMistralConfig(PerLayerConfig, MistralConfig):
    model_type = "fastprune_mistral"


class FastpruneQwen2Config(PerLayerConfig, Qwen2Config):
    model_type = "fastprune_qwen2"


class FastpruneQwen3Config(PerLayerConfig, Qwen3Config):
    model_type = "fastprune_qwen3"


class FastpruneLlamaForCausalLM(PerLayerModel, LlamaForCausalLM):
    config_class = FastpruneLlamaConfig
    layer_class = LlamaDecoderLayer


class FastpruneMistralForCausalLM(PerLayerModel, MistralForCausalLM):
    config_class = FastpruneMistralConfig
    layer_class = MistralDecoderLayer


class FastpruneQwen2ForCausalLM(PerLayerModel, Qwen2ForCausalLM):
    config_class = FastpruneQwen2Config
    layer_class = Qwen2DecoderLayer


class FastpruneQwen3ForCausalLM(PerLayerModel, Qwen3ForCausalLM):
    config_class = FastpruneQwen3Config
    layer_class = Qwen3DecoderLayer


FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (FastpruneLlamaConfig, FastpruneLlamaForCausalLM),
    "mistral": (FastpruneMistralConfig, FastpruneMistralForCausalLM),
    "qwen2": (FastpruneQwen2Config, FastpruneQwen2ForCausalLM),
    "qwen3": (FastpruneQwen3Config, FastpruneQwen3ForCausalLM),
}


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know the per-layer model types."""
    for config, model in FAMILIES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def per_layer_config(config: Any, sizes: Sequence[Sizes]) -> Any:
    """The config of a model like that of `config` whose decoder layers have `sizes`.

    A size that all layers share is a global setting; a field in which they differ keeps its global
    value, the dense model's, and is overridden layer by layer. Raises KeyError for a model type
    that has no per-layer form.
    """
    family = config.model_type.removeprefix("fastprune_")
    settings = config.to_dict()
    for key in ("per_layer_config", "model_type", "architectures", "auto_map"):
        settings.pop(key, None)
    settings["head_dim"] = settings.get("head_dim") or (
        settings["hidden_size"] // settings["num_attention_heads"]
    )
    fields = [
        {
            "num_attention_heads": size.query_heads,
            "num_key_value_heads": size.kv_heads,
            "intermediate_size": size.channels,
        }
        for size in sizes
    ]
    for name in fields[0]:
        values = {layer[name] for layer in fields}
        if len(values) == 1 and 0 not in values:
            settings[name] = values.pop()
    result = FAMILIES[family][0](**settings, per_layer_config=dict(enumerate(fields)))
    result._attn_implementation = config._attn_implementation
    return result


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
    assign_cache_slots(layers, getattr(new, "layer_types", None))
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    model.__class__ = FAMILIES[new.model_type.removeprefix("fastprune_")][1]
