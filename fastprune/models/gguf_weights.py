"""Reads the weights of a `.gguf` file by itself, layers of different size (`deci`) included.

transformers does not know such layers. Zeros that stand in a file only because llama.cpp's loader
needs them (see `fastprune.exporting.gguf_layout`) are sublayers that are gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.models.checkpoint import LAYER_KEY, rebuild
from fastprune.models.experts import together
from fastprune.models.families import DOWN, GATE, KEY, LLAMA, OUTPUT, QUERY, UP, VALUE
from fastprune.models.gguf import (
    DECI,
    FACTORS,
    LAYER_TENSORS,
    LESS_ONE,
    PAIRED,
    ROW,
    TENSORS,
    Header,
    check_settings,
    model_names,
    part_neighbours,
    rope_parameters,
)
from fastprune.models.gguf_file import read_tensor

HEAD_DIM = "attention.key_length"
OWN_BIASES = (
    ("attention_bias", tuple(f"{name}.bias" for name in (QUERY, KEY, VALUE, OUTPUT))),
    ("mlp_bias", tuple(f"{name}.bias" for name in (GATE, UP, DOWN))),
)
"""A Llama's settings of biases, and how the names of those end."""


def read_weights(header: Header) -> nn.Module:
    """The model in the file of `header`, a Llama of any family of ours, in float32.

    Raises InputError, and whatever damaged bytes lead to.
    """
    check_settings(header)
    state = _state(header)
    settings = header.settings
    head_dim = settings[HEAD_DIM]
    for name in ("attention.value_length", "rope.dimension_count"):
        if settings.get(name, head_dim) != head_dim:
            raise InputError(f"{header.path}: heads of {head_dim} and {settings[name]} values")
    family = _family(header, state)
    config = {
        "model_type": family,
        "head_dim": head_dim,
        "vocab_size": len(state["model.embed_tokens.weight"]),
        "hidden_size": settings["embedding_length"],
        "num_attention_heads": _largest(settings["attention.head_count"]),
        "num_key_value_heads": _largest(settings["attention.head_count_kv"]),
        "intermediate_size": _largest(settings["feed_forward_length"]),
        "max_position_embeddings": settings["context_length"],
        "rms_norm_eps": settings["attention.layer_norm_rms_epsilon"],
        "rope_parameters": rope_parameters(header, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in state,
        "bos_token_id": header.words.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.words.get("tokenizer.ggml.eos_token_id"),
    }
    if family == "llama":
        config |= {name: any(key.endswith(ends) for key in state) for name, ends in OWN_BIASES}
    return rebuild(config, _without_zeros(state))


def _largest(sizes: int | list[int]) -> int:
    return max(sizes) if isinstance(sizes, list) else sizes


def _family(header: Header, state: Mapping[str, Tensor]) -> str:
    """The family of the model, which `deci` does not tell.

    A Llama has biases on all projections of the attention, or on none, a Qwen2 on three of them.
    """
    if header.architecture != DECI:
        return header.architecture
    has = [any(key.endswith(f"{name}.bias") for key in state) for name in (QUERY, OUTPUT)]
    return "llama" if has[0] == has[1] else "qwen2"


def _state(header: Header) -> dict[str, Tensor]:
    """The weights by transformers' names."""
    long = {short: name for name, short in LAYER_TENSORS.items()}
    ends = {short: name for name, short in TENSORS.items()}
    head_dim = header.settings[HEAD_DIM]
    state = {}
    for name, tensor in header.contents.tensors.items():
        if name in FACTORS:
            continue
        *layer, short, kind = name.split(".")
        if short not in (long if layer else ends) or layer[:1] not in ([], ["blk"]):
            raise InputError(
                f"{header.path}: the tensor {name} has no place in a Llama, and without it "
                "the model would be another one"
            )
        weight = read_tensor(header.path, tensor)
        if short in PAIRED[header.architecture]:
            weight = part_neighbours(weight, head_dim)
        module = f"model.layers.{layer[1]}.{long[short]}" if layer else ends[short]
        state[f"{module}.{kind}"] = weight
    return state


def read_state(header: Header, config: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of the model of `config`, whose parameters have the given names, in float32.

    Tensors that have no such name are left out. Raises whatever damaged bytes lead to.
    """
    short = model_names(header.architecture, config.num_hidden_layers, names)
    state = {}
    for name, tensor in header.contents.tensors.items():
        if name not in short:
            continue
        weight = read_tensor(header.path, tensor)
        if header.architecture in LESS_ONE and name.endswith("norm.weight"):
            weight -= 1
        if name.split(".")[-2] in PAIRED.get(header.architecture, ()):
            weight = part_neighbours(weight, header.settings.get(HEAD_DIM) or config.head_dim)
        state[short[name]] = weight[None] if name.endswith(ROW) else weight
    return state


def read_like(
    header: Header, config: Any, names: Sequence[str], layers: Sequence[int]
) -> nn.Module:
    """The model in the file of `header`, in float32, with the settings of `config`.

    `names` are those of its parameters, experts apart, with the layers numbered as in the file;
    `layers` are the numbers that they have in the model. Raises InputError where a weight is
    missing, and whatever damaged bytes lead to.
    """
    state = {}
    for name, weight in together(read_state(header, config, names)).items():
        if match := LAYER_KEY.fullmatch(name):
            name = f"{LLAMA.layers}.{layers[int(match[1])]}.{match[2]}"
        state[name] = weight
    return rebuild(config.to_dict(), state)


def _without_zeros(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the sublayers whose result is always zero, and the norms before them."""
    outputs = {f"{sublayer.output[0]}.weight": sublayer for sublayer in LLAMA.sublayers}
    gone = set()
    for name, weight in state.items():
        match = LAYER_KEY.fullmatch(name)
        sublayer = outputs.get(match[2]) if match else None
        if match is None or sublayer is None:
            continue
        bias = state.get(name.replace(".weight", ".bias"))
        if not weight.any() and (bias is None or not bias.any()):
            modules = (sublayer.module, *sublayer.norms)
            gone |= {f"{LLAMA.layers}.{match[1]}.{module}." for module in modules}
    return {name: weight for name, weight in state.items() if not name.startswith(tuple(gone))}
