"""Reads `.gguf` files of the architecture `deci`: Llamas whose layers differ in size.

transformers does not know it. Zeros that stand in such a file only because llama.cpp's loader needs
them (see `fastprune.export.gguf_layout`) are sublayers that are gone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.models.checkpoint import LAYER_KEY, rebuild
from fastprune.models.families import DOWN, OUTPUT, QUERY
from fastprune.models.gguf import (
    BIASES,
    DECI,
    FREQUENCIES,
    LAYER_TENSORS,
    PAIRED,
    TENSORS,
    Header,
    check_settings,
    part_neighbours,
    rope_parameters,
)


def read_deci(header: Header) -> nn.Module:
    """The model in the file of `header`, in float32. Raises InputError, and whatever damaged bytes
    lead to."""
    check_settings(header)
    state = _state(header)
    settings = header.settings
    head_dim = settings["attention.key_length"]
    for name in ("attention.value_length", "rope.dimension_count"):
        if settings.get(name, head_dim) != head_dim:
            raise InputError(f"{header.path}: heads of {head_dim} and {settings[name]} values")
    return rebuild(
        {
            "model_type": "llama" if _is_llama(state) else "qwen2",
            "head_dim": head_dim,
            "vocab_size": len(state["model.embed_tokens.weight"]),
            "hidden_size": settings["embedding_length"],
            "num_attention_heads": max(settings["attention.head_count"]),
            "num_key_value_heads": max(settings["attention.head_count_kv"]),
            "intermediate_size": max(settings["feed_forward_length"]),
            "max_position_embeddings": settings["context_length"],
            "rms_norm_eps": settings["attention.layer_norm_rms_epsilon"],
            "rope_parameters": rope_parameters(header, head_dim),
            "tie_word_embeddings": "lm_head.weight" not in state,
            "bos_token_id": header.words.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": header.words.get("tokenizer.ggml.eos_token_id"),
            **{
                field: any(name.endswith(tuple(_module_names(names))) for name in state)
                for field, names in BIASES.items()
                if _is_llama(state)
            },
        },
        _without_zeros(state),
    )


def _state(header: Header) -> dict[str, Tensor]:
    """The weights by transformers' names."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    long = {short: name for name, short in LAYER_TENSORS.items()}
    ends = {short: name for name, short in TENSORS.items()}
    head_dim = header.settings["attention.key_length"]
    state = {}
    for tensor in GGUFReader(header.path).tensors:
        if tensor.name == FREQUENCIES:
            continue
        *layer, short, kind = tensor.name.split(".")
        if short not in (long if layer else ends) or layer[:1] not in ([], ["blk"]):
            raise InputError(
                f"{header.path}: the tensor {tensor.name} has no place in a Llama, and without it "
                "the model would be another one"
            )
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if short in PAIRED[DECI]:
            weight = part_neighbours(weight, head_dim)
        name = f"model.layers.{layer[1]}.{long[short]}" if layer else ends[short]
        state[f"{name}.{kind}"] = weight
    return state


def _module_names(short: tuple[str, ...]) -> list[str]:
    """The biases that a file calls `short`, by transformers' names."""
    long = {one: name for name, one in LAYER_TENSORS.items()}
    return [f"{long[name.removesuffix('.bias')]}.bias" for name in short]


def _is_llama(state: Mapping[str, Tensor]) -> bool:
    """Whether the biases are a Llama's: on all projections of the attention, or on none.

    A Qwen2 has them on queries, keys and values.
    """
    has = {name: any(key.endswith(f"{name}.bias") for key in state) for name in (QUERY, OUTPUT)}
    return has[QUERY] == has[OUTPUT]


def _without_zeros(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the sublayers whose result is always zero, and the norms before them."""
    gone = set()
    for name, weight in state.items():
        match = LAYER_KEY.fullmatch(name)
        if match is None or match[2] not in (f"{OUTPUT}.weight", f"{DOWN}.weight"):
            continue
        bias = state.get(name.replace(".weight", ".bias"))
        if not weight.any() and (bias is None or not bias.any()):
            attention = match[2].startswith(OUTPUT)
            inner = (
                ("self_attn.", "input_layernorm.")
                if attention
                else ("mlp.", "post_attention_layernorm.")
            )
            gone |= {f"model.layers.{match[1]}.{part}" for part in inner}
    return {name: weight for name, weight in state.items() if not name.startswith(tuple(gone))}
