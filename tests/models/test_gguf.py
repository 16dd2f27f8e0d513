"""Every tensor and setting of a `.gguf` file is read or refused; nothing is filled in at random."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import gguf_tensors, write_gguf
from tiny import FAMILIES, tiny_config, tiny_model, token_ids
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastprune.errors import InputError
from fastprune.models.gguf import Header, complete_config
from fastprune.models.gguf_file import Contents
from fastprune.models.load import load_model

NO_CONTENTS = Contents(3, {}, {}, {}, slice(0), 0)
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastprune"


def small(family="llama", **options):
    return tiny_model(family, layers=2, **({"head_dim": 16} | options))


def logits(model):
    with torch.no_grad():
        return model(token_ids(1, 96)).logits


def check_same(path, model):
    loaded, _ = load_model(path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    return loaded


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_read_whole(tmp_path, family, tied):
    model = small(family, tied=tied)
    loaded = check_same(write_gguf(tmp_path / "m.gguf", model), model)
    assert loaded.config.model_type == ("llama" if family == "mistral" else family)
    assert loaded.config.tie_word_embeddings == tied


def test_biases_are_read(tmp_path):
    model = small(attention_bias=True, mlp_bias=True)
    check_same(write_gguf(tmp_path / "m.gguf", model), model)


def test_some_biases_alone_are_refused(tmp_path):
    tensors = gguf_tensors(small(attention_bias=True))
    tensors = {key: value for key, value in tensors.items() if key[6:] != "attn_output.bias"}
    path = write_gguf(tmp_path / "m.gguf", small(), tensors=tensors)
    with pytest.raises(InputError, match=r"2 weights are missing, first .*o_proj\.bias"):
        load_model(path)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rotary_embeddings_are_read(tmp_path, kind, family):
    rope = ROPES[kind] | {"rope_theta": 500000.0}
    model = small(family, rope_parameters=dict(rope))
    tensors, settings = gguf_tensors(model), {}
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
        plain = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
        tensors["rope_freqs.weight"] = (plain / scaled).numpy().astype(np.float32)
    else:
        settings = {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        settings |= {
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.finetuned": True,
        }
    path = write_gguf(tmp_path / "m.gguf", model, tensors=tensors, settings=settings)
    loaded = check_same(path, model)
    assert loaded.config.rope_parameters["rope_type"] == kind


def test_a_factor_without_a_kind_is_linear(tmp_path):
    model = small(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    check_same(write_gguf(tmp_path / "m.gguf", model, settings={"rope.scale_linear": 2.0}), model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type is longrope"),
        ({"rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is yarn"),
        ({"rope.scaling.attn_factor": 2.0}, r"llama\.rope\.scaling\.attn_factor is 2\.0"),
        ({"attention.scale": 0.5}, r"llama\.attention\.scale is 0\.5"),
        ({"attention.causal": False}, r"llama\.attention\.causal is False"),
        ({"attention.sliding_window": 8}, r"llama\.attention\.sliding_window is 8"),
    ],
)
def test_settings_that_are_not_read_are_refused(tmp_path, cache, settings, message):
    with pytest.raises(InputError, match=message) as error:
        load_model(write_gguf(tmp_path / "m.gguf", small(), settings=settings))
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def without(name):
    return lambda tensors: tensors.pop(name)


def added(name, *shape):
    return lambda tensors: tensors.update({name: np.ones(shape, dtype=np.float32)})


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", without("blk.1.ffn_up.weight"), r"1 weights are missing, .*1\.mlp\.up_proj"),
        ("llama", without("output_norm.weight"), r"1 weights are missing, first model\.norm"),
        ("qwen2", without("blk.0.attn_k.bias"), r"missing, first .*0\.self_attn\.k_proj\.bias"),
        ("qwen3", without("blk.0.attn_q_norm.weight"), r"missing, first .*0\.self_attn\.q_norm"),
        ("llama", added("blk.0.attn_q_norm.weight", 16), r"1 tensors have no place .*attn_q_norm"),
        ("llama", added("blk.2.attn_norm.weight", 64), r"1 tensors have no place .*blk\.2"),
        ("qwen2", added("blk.0.attn_output.bias", 64), r"1 tensors have no place .*output\.bias"),
        ("llama", added("rope_factors_long.weight", 8), r"no place .*rope_factors_long"),
        ("llama", added("rope_freqs.weight", 8), None),
        ("llama", added("blk.1.ffn_up.weight", 95, 64), r"has the shape \(95, 64\), .*\(96, 64\)"),
    ],
)
def test_tensors_that_do_not_match_are_refused(tmp_path, cache, family, change, message):
    model = small(family)
    tensors = gguf_tensors(model)
    change(tensors)
    path = write_gguf(tmp_path / "m.gguf", model, tensors=tensors)
    if message is None:  # factors of one change nothing
        check_same(path, model)
        return
    with pytest.raises(InputError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_other_frequencies_than_those_of_llama_3_are_refused(tmp_path):
    model = small()
    tensors = gguf_tensors(model)
    tensors["rope_freqs.weight"] = np.linspace(1, 3, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, tensors=tensors)
    with pytest.raises(InputError, match="not the scaling of Llama 3"):
        load_model(path)


def test_code_beside_the_file_is_not_run(tmp_path, monkeypatch):
    model = small()
    path = write_gguf(tmp_path / "m.gguf", model)
    settings = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    check_same(path, model)


def test_rules_that_are_not_known_are_said_so(tmp_path, caplog):
    load_model(write_gguf(tmp_path / "m.gguf", small(), words={"pre": "poro-chat"}))
    assert "those of poro-chat are not known" in caplog.text


def test_texts_are_cut_by_the_rules_that_the_file_names(tmp_path):
    model = small()
    path = write_gguf(tmp_path / "m.gguf", model, words={"pre": "smollm"})
    _, tokenizer = load_model(path)
    assert tokenizer.tokenize("in  42") == ["in", "Ġ", "Ġ", "4", "2"]
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  42") == [
        ("a", (0, 1)),
        ("ĠĠ", (1, 3)),
        ("4", (3, 4)),
        ("2", (4, 5)),
    ]


def test_caps_of_a_file_are_those_of_the_model():
    settings = {"final_logit_softcapping": 7.0, "attn_logit_softcapping": 20.0}
    header = Header(Path("m.gguf"), "gemma2", settings, {}, {}, NO_CONTENTS)
    config = complete_config(tiny_config("gemma2"), header)
    assert config.final_logit_softcapping == 7.0
    assert config.attn_logit_softcapping == 20.0
    header = Header(Path("m.gguf"), "phi3", settings, {}, {}, NO_CONTENTS)
    with pytest.raises(InputError, match=r"phi3\.final_logit_softcapping is 7\.0"):
        complete_config(tiny_config("phi3"), header)


@pytest.mark.parametrize(
    ("family", "layers", "scalar"),
    # the published sizes: 9B and 27B of Gemma 2, 4B and 27B of Gemma 3
    [("gemma2", 42, 256), ("gemma2", 46, 144), ("gemma3_text", 34, 256), ("gemma3_text", 62, 168)],
)
def test_the_attention_of_the_largest_gemma_is_scaled_otherwise(family, layers, scalar):
    widths = {"gemma2": (4608, 32), "gemma3_text": (5376, 32)}
    hidden, heads = widths[family] if scalar != 256 else (3584, 16)
    config = tiny_config(
        family,
        layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=128 if scalar != 256 else 256,
    )
    config = complete_config(config, Header(Path("m.gguf"), family, {}, {}, {}, NO_CONTENTS))
    assert config.query_pre_attn_scalar == scalar
