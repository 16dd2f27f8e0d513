"""What the DeciLM form of a checkpoint (model type `nemotron-nas`) can carry.

Its readers (vLLM, SGLang, TensorRT-LLM, MLX-LM, ExLlamaV3) build a Llama whose layers differ in KV
heads and in the width of the feed-forward. The query heads are the same in every layer, and the
width is computed from a factor and rounded up to a multiple of 256.
"""

from __future__ import annotations

from typing import Any

from fastprune.models.families import family_of_config

WIDTH_MULTIPLE = 256
"""Feed-forward widths are multiples of this number."""


def obstacle(config: Any) -> str | None:
    """Why no model like that of `config` has a DeciLM form, as a sentence; None where it can.

    Raises InputError for a family that is not supported.
    """
    family, settings = family_of_config(config), config.to_dict()
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or hidden // heads
    queries_per_kv = heads // settings["num_key_value_heads"]
    if family == "qwen2":
        return "its readers have no biases of q, k and v, which Qwen2 has"
    if family == "qwen3":
        return "its readers have no norms of q and k, which Qwen3 has"
    if family not in ("llama", "mistral"):
        return f"its readers build a Llama, and a {family} computes something else"
    if settings.get("sliding_window"):
        return "its readers have no sliding window"
    if settings.get("attention_bias") or settings.get("mlp_bias"):
        return "not all of its readers have biases"
    if settings["hidden_act"] != "silu":
        return f"not all of its readers have the activation {settings['hidden_act']}, only silu"
    if hidden % head_dim or (hidden // head_dim) % queries_per_kv:
        return (
            f"its readers take as many query heads as fill the hidden size, and {hidden} is no "
            f"multiple of {head_dim * queries_per_kv}, the query heads of one KV head"
        )
    return None
