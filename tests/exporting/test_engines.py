"""Where llama.cpp is installed: it computes from a file what transformers does from the model."""

import importlib.util
from pathlib import Path

import pytest
import torch
from adapters import per_layer_model
from exported import (
    CARRIED,
    DIGITS,
    FULL,
    LONGROPE,
    ROPES,
    TRICKY,
    carried,
    export,
    split,
    without,
    words_like,
)
from sentencepiece_words import sentencepiece_tokenizer
from tiny import TEXT, tiny_model, tiny_tokenizer

from fastprune.models.gguf_words import LLAMA3, QWEN2

TOOL = Path(__file__).parents[2] / "tools" / "engine_llama_cpp.py"
spec = importlib.util.spec_from_file_location("engine_llama_cpp", TOOL)
engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)
if engine.installed() is None:
    pytest.skip(engine.MISSING, allow_module_level=True)

THETA = {"rope_theta": 10000.0}
MODELS = {
    **{name: lambda name=name: carried(name) for name in CARRIED},
    **{
        f"own-head-{name}": lambda name=name: carried(name, tied=False)
        for name in ("llama", "granite", "olmo2", "phi3", "qwen3_moe")
    },
    "qwen2-narrow": lambda: tiny_model("qwen2"),
    "gemma3-scaled": lambda: carried(
        "gemma3_text",
        final_logit_softcapping=5.0,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    ),
    "granite-biases": lambda: carried(
        "granite", attention_bias=True, mlp_bias=True, rope_parameters=ROPES["llama3"] | THETA
    ),
    "phi3-longrope": lambda: carried(
        "phi3",
        original_max_position_embeddings=128,
        rope_parameters=LONGROPE
        | THETA
        | {"partial_rotary_factor": 0.75}
        | {name: LONGROPE[name][:6] for name in ("long_factor", "short_factor")},
    ),
    "phi3-layer-gone": lambda: without([1], [1], "phi3", **FULL),
    "biases": lambda: tiny_model("llama", attention_bias=True, mlp_bias=True),
    "per-layer": lambda: per_layer_model("llama"),
    "per-layer-qwen2": lambda: per_layer_model("qwen2"),
    "per-layer-biases": lambda: per_layer_model("llama", attention_bias=True, mlp_bias=True),
    "first-attention-gone": lambda: without([0], [1]),
    "last-mlp-gone": lambda: without([2], [3]),
    "last-attention-gone": lambda: without([3], [0]),
    "layers-gone": lambda: without([0, 3], [0, 3]),
    **{
        kind: lambda rope=rope: tiny_model("llama", rope_parameters=rope | THETA)
        for kind, rope in ROPES.items()
    },
    "longrope": lambda: per_layer_model("llama", rope_parameters=LONGROPE | THETA),
}


LONG = ("longrope", "phi3-longrope")
"""Models that have other factors beyond the 128 tokens of their original context."""
ROUNDED = 3e-2
"""How far log-probabilities of a Gemma or a StarCoder2 may be: llama.cpp looks their activation up
in a table of f16."""


def log_probs(model, ids):
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return found[torch.arange(len(ids) - 1), ids[1:]].tolist()


def continuation(model, ids, count):
    found = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    found = found[0, len(ids) :].tolist()
    return found[:-1] if found[-1] == model.generation_config.eos_token_id else found


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_greedy_continuations(tmp_path, name):
    model = MODELS[name]()
    export(model, tmp_path / "m.gguf")
    # longer than the original context of longrope: its factors for long texts are in use then
    loaded = engine.load(tmp_path / "m.gguf", context=512)
    ids = tiny_tokenizer()(TEXT * (2 if name in LONG else 1))["input_ids"][:160]
    allowed = ROUNDED if name.startswith(("gemma", "starcoder2")) else 1e-3
    assert loaded.log_probs(ids) == pytest.approx(log_probs(model, ids), abs=allowed)
    assert loaded.greedy(ids, 8) == continuation(model, ids, 8)


def test_likeliest_tokens(tmp_path):
    model = tiny_model("llama")
    export(model, tmp_path / "m.gguf")
    ids = tiny_tokenizer()("The river")["input_ids"]
    with torch.no_grad():
        values, tokens = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
    found = engine.load(tmp_path / "m.gguf").likeliest(ids, 5)
    assert found == pytest.approx(dict(zip(tokens.tolist(), values.tolist())), abs=1e-3)


def test_a_padded_file_of_eight_bits(tmp_path):
    model = per_layer_model("llama")
    export(model, tmp_path / "m.gguf", "q8_0", pad=True)
    ids = tiny_tokenizer()("The river that runs past the old mill")["input_ids"]
    loaded = engine.load(tmp_path / "m.gguf")
    # q8_0 rounds weights by 1/256 of the largest of 32, and the engine activations likewise
    assert loaded.log_probs(ids) == pytest.approx(log_probs(model, ids), abs=0.5)


@pytest.mark.parametrize(
    "words",
    [
        tiny_tokenizer,
        lambda: words_like(DIGITS),
        lambda: words_like(split(LLAMA3), ignore_merges=True),
        lambda: words_like(split(QWEN2)),
        sentencepiece_tokenizer,
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2", "sentencepiece"],
)
def test_tokens(tmp_path, words):
    tokenizer = words()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    export(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    loaded = engine.load(tmp_path / "m.gguf")
    for text in (TEXT, TRICKY):
        assert loaded.tokens(text) == tokenizer(text)["input_ids"]
