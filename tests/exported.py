"""Tiny models and tokenizers of every kind that is exported, and the call that does it."""

from __future__ import annotations

from tiny import tiny_model, tiny_tokenizer
from tokenizers import Regex, pre_tokenizers

import fastprune
from fastprune.exporting.config import ExportConfig
from fastprune.models.conform import conform
from fastprune.models.families import geometries
from fastprune.models.modeling import remove_sublayer

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "long_factor": [float(1 + i) for i in range(8)],
    "short_factor": [1 + i / 10 for i in range(8)],
}


def export(model, path, quant="f32", tokenizer=None, **options):
    config = ExportConfig(model="tiny", format=("gguf",), out=path, quant=quant, **options)
    return fastprune.export(model, tokenizer or tiny_tokenizer(), config)["written"]["gguf"]


def llama(**options):
    return tiny_model("llama", **options)


def without(attention=(), mlp=(), family="llama", **options):
    """A tiny model without the attention and the MLP of these layers."""
    model = tiny_model(family, **options)
    for index in attention:
        remove_sublayer(model.model.layers[index], "attention", family)
    for index in mlp:
        remove_sublayer(model.model.layers[index], "mlp", family)
    conform(model, geometries(model))
    return model


def words_like(pre_tokenizer, ignore_merges=False):
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    return tokenizer


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


FULL = {"hidden_size": 128}
"""Makes eight heads of sixteen values fill the hidden size."""
CARRIED = {
    "llama": {},
    "mistral": {},
    "qwen2": FULL,
    "qwen3": {},
    "cohere": FULL,
    "cohere2": FULL,
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"layers": 7},  # one in six has full attention
    "granite": {},
    "olmo2": FULL,
    "phi3": FULL,
    "smollm3": {},
    "stablelm": FULL,
    "stablelm-parallel": FULL,
    "starcoder2": FULL,
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
}
"""Tiny models of every family, by the options with which llama.cpp's loaders take them."""


def carried(name, **options):
    return tiny_model(name, **CARRIED[name] | options)


DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
TRICKY = "I've told HE'S  123456 3.14\n\n  x= '½' <|end|> naïve  "
