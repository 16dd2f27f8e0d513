"""Per-layer models in vLLM: its Llama, with each layer at the size that the config gives it.

vLLM alone imports this file (see vllm_plugin.py). Stacked loading of q, k, v and of gate and up,
LoRA, tensor and pipeline parallelism are those of its Llama. The other families differ from that in
the attention: Qwen2 has biases on q, k and v, Qwen3 a norm on each query and key head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from fastprune.models.modeling import ATTENTION, MLP


class HeadNormAttention(LlamaAttention):
    """Qwen3's attention: queries and keys are normalised head by head."""

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config=config, **options)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class NoAttention(nn.Module):
    """Built in place of a removed attention, so that no KV cache is set aside for it."""

    def __init__(self, **_: Any) -> None:
        super().__init__()


class PerLayerDecoderLayer(LlamaDecoderLayer):
    """One decoder layer at its own size; a removed sublayer takes no weights, cache or time."""

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        own = copy.copy(config.per_layer_config[extract_layer_index(prefix)])
        skipped = getattr(own, "skip", ())
        attention = HeadNormAttention if config.model_type.endswith("qwen3") else LlamaAttention
        if config.model_type.endswith("qwen2"):
            own.qkv_bias = True
        if ATTENTION in skipped:
            attention = NoAttention
        super().__init__(vllm_config, prefix, config=own, attn_layer_type=attention)
        if ATTENTION in skipped:
            self.self_attn = self.input_layernorm = None
        if MLP in skipped:
            self.mlp = self.post_attention_layernorm = None

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.self_attn is not None:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            norm = self.post_attention_layernorm
            hidden_states, residual = _normed(norm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        if residual is None:  # nothing is left of the first layer
            residual = torch.zeros_like(hidden_states)
        return hidden_states, residual


class PerLayerForCausalLM(LlamaForCausalLM):
    """A per-layer checkpoint of any family as vLLM builds it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=PerLayerDecoderLayer)


def _normed(norm: nn.Module, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of `hidden` and `residual`, normalised, and the sum itself."""
    return (norm(hidden), hidden) if residual is None else norm(hidden, residual)
