"""Tiny models as `.gguf` files in fp32, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from tiny import tiny_tokenizer

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights of `model` by their names in a file, tied ones once."""
    state, config = model.state_dict(), model.config
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = {short: state[name].numpy() for name, short in OTHER_NAMES.items() if name in state}
    for index in range(config.num_hidden_layers):
        for name, short in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                weight = state.get(f"model.layers.{index}.{name}.{kind}")
                if weight is None:
                    continue
                if config.model_type in ("llama", "mistral") and short in ("attn_q", "attn_k"):
                    # llama.cpp pairs neighbours in its rotary embedding of these families
                    halves = weight.view(-1, 2, config.head_dim // 2, *weight.shape[1:])
                    weight = halves.transpose(1, 2).reshape(weight.shape)
                tensors[f"blk.{index}.{short}.{kind}"] = weight.contiguous().numpy()
    return tensors


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    *,
    name: str = "tiny",
    tensors: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, Any] | None = None,
    words: Mapping[str, str] | None = None,
) -> Path:
    """`model` as the file `path`, with other `tensors` than its own and more `settings` if given.

    Settings are named without their architecture, `words` without `tokenizer.ggml`; a Mistral is
    written as a Llama called mistral.
    """
    config = model.config
    mistral = config.model_type == "mistral"
    writer = GGUFWriter(path, "llama" if mistral else config.model_type)
    writer.add_name("mistral" if mistral else name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (settings or {}).items():
        add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
        add.get(type(value), writer.add_uint32)(f"{writer.arch}.{key}", value)
    _add_tokenizer(writer, config.vocab_size)
    for key, value in (words or {}).items():
        writer.add_string(f"tokenizer.ggml.{key}", value)
    for key, values in (gguf_tensors(model) if tensors is None else tensors).items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, size: int) -> None:
    settings = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(settings["vocab"], key=settings["vocab"].get))
    writer.add_token_types([3] + [1] * (size - 1))  # control, then normal ones
    writer.add_token_merges([" ".join(pair) for pair in settings["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
