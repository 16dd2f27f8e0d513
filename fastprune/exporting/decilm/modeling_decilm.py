"""A DeciLM in transformers: Llama's layers, each built at the size its block configuration says.

This file is copied beside configuration_decilm.py, so that the folder loads in transformers with
`trust_remote_code=True`; serving engines have a modelling of their own.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from .configuration_decilm import DeciLMConfig


class NoOp(nn.Module):
    """Stands where a layer has no attention or no feed-forward."""


# Not direct subclasses of nn.Module: transformers takes an attention of that form for one of its
# own making, and then refuses to switch attention implementations.
class NoAttention(NoOp):
    """Adds nothing to the residual stream and keeps no cache."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.new_zeros(()), None


class NoFeedForward(NoOp):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


class DeciLMForCausalLM(LlamaForCausalLM):
    """A causal language model; its first layer has an attention, by which caches count tokens."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        count = config.num_hidden_layers
        # The stock constructor builds layers of one size; let it build everything but them.
        config.num_hidden_layers = 0
        super().__init__(config)
        config.num_hidden_layers = count
        self.model.layers = nn.ModuleList([build_layer(config, index) for index in range(count)])
        self.post_init()


def build_layer(config: DeciLMConfig, index: int) -> nn.Module:
    """The decoder layer `index` at the size that its block configuration says."""
    attention, ffn = config.block_configs[index].attention, config.block_configs[index].ffn
    own = copy.copy(config)
    if attention.no_op:  # the smallest one that can be built; it is taken out below
        own.num_attention_heads = own.num_key_value_heads = 1
    else:
        own.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
    own.intermediate_size = 1 if ffn.no_op else width(ffn.ffn_mult, config.hidden_size)
    layer = LlamaDecoderLayer(own, index)
    # A later choice of another attention implementation is written into the shared config.
    layer.self_attn.config = layer.mlp.config = config
    if attention.no_op:
        layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
    if ffn.no_op:
        layer.mlp, layer.post_attention_layernorm = NoFeedForward(), nn.Identity()
    return layer


def width(ffn_mult: float, hidden_size: int) -> int:
    """Channels of a feed-forward: the rule that all readers of this form share."""
    channels = int(2 * ffn_mult * hidden_size / 3)
    return -(-channels // 256) * 256
