"""`hf-uniform`: padding changes the sizes and nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cutting import cut
from tiny import FAMILIES, tiny_model, tiny_tokenizer, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

from fastprune.errors import InputError
from fastprune.exporting import uniform
from fastprune.exporting.config import ExportConfig
from fastprune.models.families import geometries

OPTIONS = ExportConfig(model="tiny", format=("hf-uniform",), out=Path("unused"))
UNEVEN = [(6, 3, 50), (0, 0, 96), (8, 4, 0), (2, 1, 32)]
INDIVISIBLE = [(6, 3, 50), (0, 0, 40), (4, 2, 0), (2, 1, 32)]  # 64 is no multiple of 6 heads
WITHOUT_A_LAYER = [(4, 2, 50), (0, 0, 0), (8, 4, 96), (2, 1, 32)]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def export(model: nn.Module, path):
    uniform.check(model, OPTIONS)
    return uniform.write(model, tiny_tokenizer(), path, OPTIONS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_per_layer_model(tmp_path, family, tied):
    model = cut(tiny_model(family, tied=tied), UNEVEN)
    expected, before = logits(model), sum(p.numel() for p in model.parameters())
    written = export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], "auto_map" in config) == (family, False)
    assert "per_layer_config" not in config
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {(g.query_heads, g.kv_heads, g.channels) for g in geometries(read)} == {(8, 4, 96)}
    # Only the order of fp32 sums differs; logits are of order 10.
    torch.testing.assert_close(logits(read), expected, atol=1e-4, rtol=1e-4)
    assert written["padding_bytes"] == 4 * (sum(p.numel() for p in read.parameters()) - before)
    assert str(written["padding_bytes"]) in written["notes"][0]
    assert written["bytes"] == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert geometries(model)[1].kv_heads == 0  # the model itself stays as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_free_of_nan(tmp_path, family):
    # the usual spread of weights: rounding is not amplified beyond what real models show
    model = cut(tiny_model(family, initializer_range=0.02), UNEVEN).bfloat16()
    export(model, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.dtype == torch.bfloat16
    assert torch.isfinite(logits(read)).all()


@pytest.mark.parametrize(
    ("biases", "carrier"),
    [
        ({}, ("mistral", 6)),
        # Mistral has no biases, so a Llama with them takes the next count that divides.
        ({"attention_bias": True, "mlp_bias": True}, ("llama", 8)),
    ],
    ids=["no biases", "biases"],
)
def test_heads_that_do_not_divide_the_hidden_size(tmp_path, biases, carrier):
    model = cut(tiny_model("llama", **biases), INDIVISIBLE)
    expected = logits(model)
    export(model, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (read.config.model_type, read.config.num_attention_heads) == carrier
    torch.testing.assert_close(logits(read), expected, atol=1e-4, rtol=1e-4)


def test_the_folder_is_read_again_unless_it_is_not_to_be(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(uniform, "check_read_back", lambda model, path: read.append(path))
    for name, wanted in (("checked", True), ("unchecked", False)):
        (tmp_path / name).mkdir()
        options = replace(OPTIONS, read_back=wanted)
        uniform.write(cut(tiny_model("llama"), UNEVEN), tiny_tokenizer(), tmp_path / name, options)
    assert read == [tmp_path / "checked"]


def test_empty_layers_are_dropped(tmp_path):
    model = cut(tiny_model("qwen3"), WITHOUT_A_LAYER)
    expected = logits(model)
    written = export(model, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(read.model.layers) == 3
    assert written["notes"][1].endswith("nothing is left of them: 1")
    torch.testing.assert_close(logits(read), expected, atol=1e-4, rtol=1e-4)


def test_layers_keep_their_kind_of_attention(tmp_path):
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = cut(tiny_model("qwen2", **windows), WITHOUT_A_LAYER)
    expected = logits(model)
    export(model, tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-4, rtol=1e-4
    )


def test_a_model_of_one_size_costs_nothing(tmp_path):
    written = export(cut(tiny_model("llama"), [(4, 2, 48)] * 4), tmp_path)
    assert written["padding_bytes"] == 0
    assert "zeros" not in written["notes"][0]


def test_generation_settings_and_tokenizer_are_there(tmp_path):
    model = cut(tiny_model("llama"), UNEVEN)
    model.generation_config.max_new_tokens = 7
    export(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [([(0, 0, 96)] * 4, "has attention left"), ([(8, 4, 0)] * 4, "has feed-forward left")],
)
def test_a_kind_of_sublayer_that_is_gone_everywhere(tmp_path, sizes, words):
    with pytest.raises(InputError, match=words):
        uniform.check(cut(tiny_model("llama"), sizes), OPTIONS)


def test_other_families_are_refused():
    model = SimpleNamespace(config=SimpleNamespace(model_type="gpt2"))
    with pytest.raises(InputError, match="gpt2"):
        uniform.check(model, OPTIONS)
