"""Attention of transformers' models by the compiled kernel, where it computes what theirs would.

A model whose config asks for `fastprune` attention goes by its usual `sdpa` everywhere else: on
GPUs, in fp32, under a padding mask, while it generates token by token.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastprune.kernels.attention import attention_op, attention_serves

NAME = "fastprune"


def use_attention(model: nn.Module) -> None:
    """Let `model` compute its attention by the kernel where it can, in place.

    Nothing changes for a model that asks for other attention than `sdpa`, or on a processor without
    bf16 products. The choice is not saved with the model.
    """
    config: Any = getattr(model, "config", None)
    replaceable = getattr(config, "_attn_implementation", None) == "sdpa"
    if replaceable and not config.is_encoder_decoder and attention_serves(torch.device("cpu")):
        model.set_attn_implementation(NAME)


def cache_keyword(module: nn.Module) -> str:
    """What `module` calls its key-value cache: transformers 5.24 renamed it."""
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa` of transformers: query (batch, heads, n, d), key and value (batch, kv heads, m, d),
    to (batch, n, heads, d)."""
    autocast = query.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else query.dtype
    if (
        dtype == torch.bfloat16
        and attention_mask is None
        and dropout == 0
        and (module.is_causal if is_causal is None else is_causal)
        and query.shape[2] == key.shape[2] > 1
        and query.shape[3] == value.shape[3]
        and not kwargs.keys() & {"softcap", "position_bias"}
        and attention_serves(query.device, query.shape[3])
    ):
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        out, _ = attention_op(*(t.to(dtype) for t in (query, key, value)), scale)
        return out.transpose(1, 2), None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
