"""Llama-family models whose decoder layers differ in size.

This file is copied into every per-layer checkpoint, so it imports torch and transformers only. A
config carries what differs from the global settings, as the per-layer configurations of
transformers (5.15 and newer) describe it:

    "per_layer_config": {"3": {"num_attention_heads": 6, "num_key_value_heads": 2,
                               "intermediate_size": 1024},
                         "5": {"skip": ["attention"]}, ...}

Older checkpoints say zero heads or a zero intermediate size where a sublayer is removed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model
from transformers.utils import logging


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


ATTENTION, MLP = "attention", "mlp"
"""What a layer can skip, by the names that transformers uses."""
SUBLAYERS = {
    "num_attention_heads": ATTENTION,
    "num_key_value_heads": ATTENTION,
    "intermediate_size": MLP,
}
"""The sizes of a layer in a config, and the sublayer that each belongs to."""


class Removed(nn.Module):
    """Stands where a sublayer was: adds nothing to the residual stream."""


# Not a direct nn.Module: transformers reads this source, takes a class of that form for a real
# attention of its own making, and then refuses to switch attention implementations.
class RemovedAttention(Removed):
    """A removed attention. In a KV cache its layer holds one zero for each token.

    A cache is asked how many tokens it holds, and masks are sized, by its first layer (by the first
    of each kind where sliding-window and full layers mix), and that may be this one.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        cache: Any = None,
        past_key_values: Any = None,  # what older releases of transformers call the cache
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        cache = past_key_values if cache is None else cache
        if cache is not None:
            self._count_tokens(hidden_states, cache)
        return hidden_states.new_zeros(()), None

    def _count_tokens(self, hidden_states: torch.Tensor, cache: Any) -> None:
        heads = size = 1
        own = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if own is not None and own.is_initialized:  # perhaps in advance, at the size of the others
            _, heads, _, size = own.keys.shape
        batch, length, _ = hidden_states.shape
        zeros = hidden_states.new_zeros(()).expand(batch, heads, length, size)
        cache.update(zeros, zeros, self.layer_idx)


class RemovedMLP(Removed):
    """A removed MLP."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


def remove_attention(layer: nn.Module) -> None:
    """Take the attention out of `layer`, and the norm before it, which nothing reads then."""
    layer.self_attn = RemovedAttention(layer.self_attn.layer_idx)
    layer.input_layernorm = nn.Identity()


def remove_mlp(layer: nn.Module) -> None:
    """Take the MLP out of `layer`, and the norm before it, which nothing reads then."""
    layer.mlp = RemovedMLP()
    layer.post_attention_layernorm = nn.Identity()


class PerLayerModel:
    """Mixin before a stock model, with or without its head: each layer is built at its own size."""

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
        self.base_model.layers = nn.ModuleList(layers)
        self.post_init()

    def _build_layer(self, config: Any, index: int) -> nn.Module:
        own = copy.copy(config.per_layer_config[index])
        skipped = getattr(own, "skip", ())
        if ATTENTION in skipped:  # the smallest one that can be built; it is taken out below
            own.num_attention_heads = own.num_key_value_heads = 1
        if MLP in skipped:
            own.intermediate_size = 1
        layer = self.layer_class(own, index)
        # Sizes are in the weights now. The shared config is where a later choice of another
        # attention implementation is written, so that is the one to read from.
        layer.self_attn.config = layer.mlp.config = config
        if ATTENTION in skipped:
            remove_attention(layer)
        if MLP in skipped:
            remove_mlp(layer)
        return layer


class PerLayerConfig:
    """Mixin before a stock config: sizes layer by layer, as written now and by older releases.

    The global value of a size that layers override may be read. It is the dense model's, and no
    layer has more. Rotary embeddings (dynamic, yarn, longrope) and tools that size caches read the
    global number of heads.
    """

    allow_global_per_layer_attribute_access = True

    def __post_init__(self, per_layer_config: Any = None, **settings: Any) -> None:
        if per_layer_config is not None:
            layers = per_layer_config
            if not isinstance(layers, Mapping):
                layers = dict(enumerate(layers))
            per_layer_config = {index: with_skips(own) for index, own in layers.items()}
        super().__post_init__(  # type: ignore[misc]  # the stock config's
            per_layer_config=per_layer_config, **settings
        )


def with_skips(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of one layer with `skip` for sublayers that have no heads or channels.

    Raises ValueError when something else than the attention or the MLP is skipped.
    """
    own = dict(overrides)
    skipped = set(own.pop("skip", ()))
    if unknown := skipped - {ATTENTION, MLP}:
        raise ValueError(f"per_layer_config skips {sorted(unknown)}; layers have attention and mlp")
    for name, sublayer in SUBLAYERS.items():
        if own.get(name) == 0:
            skipped.add(sublayer)
            del own[name]
    return own | {"skip": sorted(skipped)} if skipped else own


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


class FastpruneLlamaModel(PerLayerModel, LlamaModel):
    config_class = FastpruneLlamaConfig
    layer_class = LlamaDecoderLayer


class FastpruneLlamaForCausalLM(PerLayerModel, LlamaForCausalLM):
    config_class = FastpruneLlamaConfig
    layer_class = LlamaDecoderLayer


class FastpruneMistralModel(PerLayerModel, MistralModel):
    config_class = FastpruneMistralConfig
    layer_class = MistralDecoderLayer


class FastpruneMistralForCausalLM(PerLayerModel, MistralForCausalLM):
    config_class = FastpruneMistralConfig
    layer_class = MistralDecoderLayer


class FastpruneQwen2Model(PerLayerModel, Qwen2Model):
    config_class = FastpruneQwen2Config
    layer_class = Qwen2DecoderLayer


class FastpruneQwen2ForCausalLM(PerLayerModel, Qwen2ForCausalLM):
    config_class = FastpruneQwen2Config
    layer_class = Qwen2DecoderLayer


class FastpruneQwen3Model(PerLayerModel, Qwen3Model):
    config_class = FastpruneQwen3Config
    layer_class = Qwen3DecoderLayer


class FastpruneQwen3ForCausalLM(PerLayerModel, Qwen3ForCausalLM):
    config_class = FastpruneQwen3Config
    layer_class = Qwen3DecoderLayer


class Family(NamedTuple):
    """The classes of one model type; the last base class of each is the stock one."""

    config: type
    model: type
    causal_lm: type


FAMILIES: dict[str, Family] = {
    "llama": Family(FastpruneLlamaConfig, FastpruneLlamaModel, FastpruneLlamaForCausalLM),
    "mistral": Family(FastpruneMistralConfig, FastpruneMistralModel, FastpruneMistralForCausalLM),
    "qwen2": Family(FastpruneQwen2Config, FastpruneQwen2Model, FastpruneQwen2ForCausalLM),
    "qwen3": Family(FastpruneQwen3Config, FastpruneQwen3Model, FastpruneQwen3ForCausalLM),
}


def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know the per-layer model types."""
    for family in FAMILIES.values():
        AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, family.model, exist_ok=True)
        AutoModelForCausalLM.register(family.config, family.causal_lm, exist_ok=True)


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
        values = {layer[name] for layer in fields if layer[name]}
        if len(values) == 1:
            settings[name] = values.pop()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the library's own checks read global sizes, and it warns of it
    try:
        result = FAMILIES[family].config(**settings, per_layer_config=fields)
    finally:
        logging.set_verbosity(level)
    result._attn_implementation = config._attn_implementation
    return result
