"""`nemotron-nas`: the folder that vLLM, SGLang, TensorRT-LLM, MLX-LM and ExLlamaV3 call DeciLM.

What each reader asks for, and so what is written for all of them:

- `ffn_mult` alone gives the feed-forward's width. MLX-LM refuses fields it does not know, and vLLM
  prefers `ffn_mult` where there is one, so no `intermediate_size` stands beside it.
- a field that `no_op` makes meaningless is null and not left out: TensorRT-LLM reads it.
- the first layer has an attention: vLLM and SGLang begin the residual stream there, and caches
  count tokens by it. One that was removed is written as zeros, with as many KV heads as others.
- a layer of which nothing is left is dropped.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastprune.errors import InputError
from fastprune.exporting.decilm.configuration_decilm import DeciLMConfig
from fastprune.exporting.decilm.modeling_decilm import DeciLMForCausalLM
from fastprune.exporting.padding import added_bytes, padded_state
from fastprune.models.checkpoint import (
    HEAD,
    Form,
    save_surroundings,
    settle_tie,
    weight_bytes,
    write_weights,
)
from fastprune.models.decilm import WIDTH_MULTIPLE, obstacle
from fastprune.models.families import Geometry, geometries
from fastprune.models.quiet import quiet_libraries
from fastprune.models.readback import check_same

if TYPE_CHECKING:
    from fastprune.exporting.config import ExportConfig

INSTEAD = "use --format gguf or hf-uniform"
CODE = Path(__file__).parent / "decilm"
AUTO_MAP = {
    "AutoConfig": "configuration_decilm.DeciLMConfig",
    "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
}


def check(model: nn.Module, config: ExportConfig) -> None:
    """InputError when `model` has no DeciLM form, or has one only with `config.pad`."""
    if reason := obstacle(model.config):
        raise InputError(f"nemotron-nas: {reason}; {INSTEAD}")
    sizes = geometries(model)
    if not any(size.kv_heads for size in sizes):
        raise InputError(
            "nemotron-nas: its readers need an attention, and no layer of this model has one left; "
            "use --format hf"
        )
    heads = _query_heads(model)
    for index, size in enumerate(sizes):
        if size.kv_heads and heads % size.queries_per_kv:
            raise InputError(
                f"nemotron-nas: layer {index} has {size.queries_per_kv} query heads to a KV head, "
                f"which is no divisor of {heads}; {INSTEAD}"
            )
        if config.pad:
            continue
        if size.query_heads not in (0, heads):
            raise InputError(
                f"nemotron-nas: every layer must have {heads} query heads and layer {index} has "
                f"{size.query_heads}; prune with --layout deci, or fill up with zeros: --pad"
            )
        if size.channels % WIDTH_MULTIPLE:
            raise InputError(
                f"nemotron-nas: the feed-forward must have a multiple of {WIDTH_MULTIPLE} channels "
                f"and that of layer {index} has {size.channels}; prune with --layout deci or "
                f"--align {WIDTH_MULTIPLE}, or fill up with zeros: --pad"
            )


@torch.no_grad()
def write(model: nn.Module, tokenizer: Any, path: Path, config: ExportConfig) -> dict[str, Any]:
    """Write `model` as a DeciLM into the folder `path`.

    transformers loads it too, by the code beside the weights. Returns "bytes" (of the weight
    files), "padding_bytes" (how many of them are zeros that were added) and "notes" (sentences).
    Raises ReadBackError when `config.read_back` asks for a comparison and the folder does not give
    the same logits. `model` has passed `check`.
    """
    settle_tie(model)
    kept = [i for i, size in enumerate(geometries(model)) if size.kv_heads or size.channels]
    sizes = _sizes(model, kept)
    own = _config(model, sizes)
    with torch.device("meta"), quiet_libraries():
        shapes = DeciLMForCausalLM(own).state_dict()
    if own.tie_word_embeddings:
        shapes.pop(HEAD, None)
    layers = {old: new for new, old in enumerate(kept)}
    form = Form(own, padded_state(model, shapes, layers), layers, False)
    with quiet_libraries():
        own.save_pretrained(path)
        write_weights(form, path)
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        shutil.copyfile(CODE / name, path / name)
    save_surroundings(model, tokenizer, path)
    if config.read_back:
        with quiet_libraries():
            read = DeciLMForCausalLM.from_pretrained(path, dtype=model.dtype).to(model.device)
        check_same(model, read.eval())
    written = weight_bytes(path)
    padding = added_bytes(model, form.state)
    return {"bytes": written, "padding_bytes": padding, "notes": _notes(model, sizes, padding)}


def _query_heads(model: nn.Module) -> int:
    """Query heads of every layer: as many as fill the hidden size."""
    head_dim = next(size.head_dim for size in geometries(model) if size.kv_heads)
    return model.config.hidden_size // head_dim


def _sizes(model: nn.Module, kept: Sequence[int]) -> list[Geometry]:
    """The sizes of the layers `kept` in their DeciLM form, zeros included."""
    heads, own = _query_heads(model), geometries(model)
    groups = max(heads // size.queries_per_kv for size in own if size.kv_heads)
    sizes: list[Geometry] = []
    for index in kept:
        size = own[index]
        if size.kv_heads:
            size = replace(size, query_heads=heads, kv_heads=heads // size.queries_per_kv)
        elif not sizes:
            size = replace(size, query_heads=heads, kv_heads=groups)
        width = -(-size.channels // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        sizes.append(replace(size, channels=width))
    return sizes


def _config(model: nn.Module, sizes: Sequence[Geometry]) -> DeciLMConfig:
    settings = model.config.to_dict()
    foreign = ("per_layer_config", "model_type", "architectures", "auto_map", "sliding_window")
    for key in foreign:
        settings.pop(key, None)
    heads = max(size.query_heads for size in sizes)
    settings |= {
        "num_hidden_layers": len(sizes),
        "num_attention_heads": heads,
        "num_key_value_heads": max(size.kv_heads for size in sizes),
        "intermediate_size": max(size.channels for size in sizes),
        "head_dim": model.config.hidden_size // heads,
        "block_configs": [_block(size, model.config.hidden_size) for size in sizes],
    }
    config = DeciLMConfig(**settings)
    config.architectures = [DeciLMForCausalLM.__name__]
    config.auto_map = AUTO_MAP
    config.dtype = model.dtype
    return config


def _block(size: Geometry, hidden: int) -> dict[str, dict[str, Any]]:
    return {
        "attention": {
            "no_op": not size.kv_heads,
            "replace_with_linear": False,
            "n_heads_in_group": size.queries_per_kv or None,
        },
        "ffn": {
            "no_op": not size.channels,
            "replace_with_linear": False,
            "ffn_mult": 3 * size.channels / (2 * hidden) or None,
        },
    }


def _notes(model: nn.Module, sizes: Sequence[Geometry], padding: int) -> list[str]:
    notes = ["engines and transformers read this folder with trust_remote_code"]
    if padding:
        notes.append(f"{padding} bytes of it are zeros")
    own = geometries(model)
    if dropped := len(own) - len(sizes):
        notes.append(f"layers dropped because nothing is left of them: {dropped}")
    first = next(size for size in own if size.kv_heads or size.channels)
    if not first.kv_heads:
        notes.append("the first layer, which has no attention, has one of zeros: engines need it")
    return notes
