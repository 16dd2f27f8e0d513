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
        remove_sublayer(model.model.layers[index], "attention", "llama")
    for index in mlp:
        remove_sublayer(model.model.layers[index], "mlp", "llama")
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


DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
TRICKY = "I've told HE'S  123456 3.14\n\n  x= '½' <|end|> naïve  "
