"""The part of vLLM that the plugin builds on, for tests where vLLM is not installed.

Names, arguments and the names of parameters are those of vLLM's Llama (as of autumn 2026); the
arithmetic is plain torch, on one text without a KV cache.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

STACKED = {
    ".q_proj": (".qkv_proj", 0),
    ".k_proj": (".qkv_proj", 1),
    ".v_proj": (".qkv_proj", 2),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


class ModelRegistry:
    """What `register_model` was told."""

    models: ClassVar[dict[str, str]] = {}

    @classmethod
    def register_model(cls, name: str, model: str) -> None:
        cls.models[name] = model


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(hidden_size)), eps

    def forward(self, x: Tensor, residual: Tensor | None = None):
        total = x if residual is None else x + residual
        normed = nn.functional.rms_norm(total, self.weight.shape, self.weight, self.eps)
        return normed if residual is None else (normed, total)


class Linear(nn.Linear):
    """Rows of several matrices stacked; returns a pair as vLLM's linear layers do."""

    def __init__(self, inputs: int, rows: list[int], bias: bool) -> None:
        super().__init__(inputs, sum(rows), bias=bias)
        self.rows = rows

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Attention(nn.Module):
    """vLLM finds it by `prefix` and sets a KV cache aside for it."""

    caches: ClassVar[dict[str, int]] = {}

    def __init__(self, heads: int, head_size: int, scale: float, num_kv_heads: int, prefix: str):
        super().__init__()
        self.head_size, self.scale = head_size, scale
        self.caches[prefix] = num_kv_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_size)).transpose(0, 1)[None] for x in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1).flatten(-2)


class LlamaAttention(nn.Module):
    def __init__(
        self, config, hidden_size, num_heads, num_kv_heads, max_position_embeddings=8192,
        quant_config=None, bias=False, bias_o_proj=False, cache_config=None, prefix="",
        attn_type="decoder",
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_dim = config.head_dim or hidden_size // num_heads
        self.q_size, self.kv_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.qkv_proj = Linear(hidden_size, [self.q_size, self.kv_size, self.kv_size], bias)
        self.o_proj = Linear(self.q_size, [hidden_size], bias_o_proj)
        self.rope = [LlamaRotaryEmbedding(config)]  # in a list: no parameters or buffers
        self.attn = Attention(
            num_heads, self.head_dim, self.head_dim**-0.5, num_kv_heads, f"{prefix}.attn"
        )

    def rotary_emb(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope[0](q, positions[None])
        q, k = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None] for x in (q, k))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q[0].transpose(0, 1).flatten(-2), k[0].transpose(0, 1).flatten(-2)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class LlamaMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, [intermediate_size] * 2, bias)
        self.down_proj = Linear(intermediate_size, [hidden_size], bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)[0]


class LlamaDecoderLayer(nn.Module):
    def __init__(self, vllm_config, prefix="", config=None, attn_layer_type=LlamaAttention) -> None:
        super().__init__()
        config = config or vllm_config.model_config.hf_config
        bias = bias_o_proj = getattr(config, "attention_bias", False)
        if hasattr(config, "qkv_bias"):
            bias = config.qkv_bias
        self.self_attn = attn_layer_type(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=None,
            bias=bias,
            bias_o_proj=bias_o_proj,
            cache_config=None,
            prefix=f"{prefix}.self_attn",
            attn_type="decoder",
        )
        mlp_bias = getattr(config, "mlp_bias", False)
        self.mlp = LlamaMLP(config.hidden_size, config.intermediate_size, mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaModel(nn.Module):
    def __init__(self, *, vllm_config, prefix="", layer_type=LlamaDecoderLayer) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            layer_type(vllm_config=vllm_config, prefix=f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]


class LlamaForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix="", layer_type=LlamaDecoderLayer) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = LlamaModel(vllm_config=vllm_config, prefix="model", layer_type=layer_type)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.model(input_ids, positions)

    @torch.no_grad()
    def load_weights(self, weights) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            piece = next((part for part in STACKED if part in name), None)
            if piece is None:
                parameters[name].copy_(tensor)
            else:
                stacked, index = STACKED[piece]
                name = name.replace(piece, stacked)
                rows = self.get_submodule(name.rpartition(".")[0]).rows
                parameters[name].split(rows)[index].copy_(tensor)
            loaded.add(name)
        return loaded


def extract_layer_index(prefix: str) -> int:
    [index] = [int(part) for part in prefix.split(".") if part.isdigit()]
    return index


def config_of(config) -> SimpleNamespace:
    """The part of vLLM's config that models read."""
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=config))


def modules() -> dict[str, ModuleType]:
    """`sys.modules` as they are where vLLM is."""
    here = sys.modules[__name__]
    whole = ModuleType("vllm")
    whole.ModelRegistry = ModelRegistry
    inside = ("layers", "layers.layernorm", "models", "models.llama", "models.utils")
    names = ["vllm.model_executor", *(f"vllm.model_executor.{name}" for name in inside)]
    return {"vllm": whole, **dict.fromkeys(names, here)}
