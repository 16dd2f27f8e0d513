"""`nemotron-nas`: what every reader of the form asks for, and the same logits in transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cutting import cut
from safetensors import safe_open
from tiny import TEXT, tiny_model, tiny_tokenizer, token_ids
from torch import nn

from fastprune.errors import InputError
from fastprune.exporting import nemotron
from fastprune.exporting.config import ExportConfig
from fastprune.exporting.decilm.modeling_decilm import DeciLMForCausalLM, width
from fastprune.models.families import geometries

PLAIN, PAD = (
    ExportConfig(model="tiny", format=("nemotron-nas",), out=Path("unused"), pad=pad)
    for pad in (False, True)
)
# 4 query heads of 16 fill the hidden size of 64
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
DECI = [(4, 2, 512), (4, 2, 256), (0, 0, 256), (4, 2, 0)]
UNEVEN = [(2, 1, 512), (4, 2, 50), (0, 0, 300), (4, 2, 0)]

IN_ANOTHER_PROCESS = """
import sys, torch
sys.modules["fastprune"] = None  # importing it fails from here on
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.load(folder + "/ids.pt")
with torch.no_grad():
    torch.save(model(ids).logits, folder + "/logits.pt")
settings = {"max_new_tokens": 12, "do_sample": False}
cached = model.generate(ids[:1], use_cache=True, **settings)
assert torch.equal(cached, model.generate(ids[:1], use_cache=False, **settings))
"""


def dense(family: str = "llama", **settings) -> nn.Module:
    return tiny_model(family, **(HEADS | settings))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def export(model: nn.Module, path, options=PLAIN) -> tuple[dict, dict]:
    nemotron.check(model, options)
    written = nemotron.write(model, tiny_tokenizer(), path, options)
    return written, json.loads((path / "config.json").read_text())


def read(path) -> nn.Module:
    return DeciLMForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_logits_are_those_of_the_per_layer_model(tmp_path, family, tied):
    model = cut(dense(family, tied=tied), DECI)
    export(model, tmp_path)
    # the same weights in other files; only the order of fp32 sums may differ
    torch.testing.assert_close(logits(read(tmp_path)), logits(model), atol=1e-4, rtol=1e-4)


def test_transformers_loads_it_without_fastprune(tmp_path):
    model = cut(dense(), DECI)
    export(model, tmp_path)
    torch.save(token_ids(), tmp_path / "ids.pt")
    subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, tmp_path],
        check=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=1e-4)  # as above


def test_the_config_says_what_readers_ask_for(tmp_path):
    written, config = export(cut(dense(), DECI), tmp_path)
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert (config["num_attention_heads"], config["head_dim"], config["hidden_size"]) == (4, 16, 64)
    # transformers 4 and MLX-LM take the rotary base from here
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    blocks = config["block_configs"]
    groups = [block["attention"]["n_heads_in_group"] for block in blocks]
    factors = [block["ffn"]["ffn_mult"] for block in blocks]
    assert groups == [2, 2, None, 2]
    assert factors == [12.0, 6.0, 6.0, None]
    assert [block["attention"]["no_op"] for block in blocks] == [False, False, True, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, False, True]
    # MLX-LM builds its dataclasses from these entries and refuses others
    assert set(blocks[0]["attention"]) == {"no_op", "replace_with_linear", "n_heads_in_group"}
    assert set(blocks[0]["ffn"]) == {"no_op", "replace_with_linear", "ffn_mult"}
    assert written["padding_bytes"] == 0


def test_no_weights_of_removed_parts_are_written(tmp_path):
    export(cut(dense(), DECI), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    removed = ("layers.2.self_attn", "layers.2.input_layernorm", "layers.3.mlp")
    removed += ("layers.3.post_attention_layernorm", "lm_head")
    assert not [name for name in names if any(part in name for part in removed)]


@pytest.mark.parametrize("hidden", [64, 576, 2048, 3072, 4096, 5120, 8192, 16384])
def test_the_factor_gives_the_width_again(hidden):
    """MLX-LM rounds the factor to six digits before it computes with it."""
    for channels in range(256, 32768, 256):
        factor = 3 * channels / (2 * hidden)
        assert width(factor, hidden) == width(round(factor, 6), hidden) == channels


def test_padding_gives_the_same_logits(tmp_path):
    model = cut(dense(), UNEVEN)
    expected, before = logits(model), sum(p.numel() for p in model.parameters())
    written, _ = export(model, tmp_path, PAD)
    found = read(tmp_path)
    sizes = [(g.query_heads, g.kv_heads, g.channels) for g in geometries_of(found)]
    assert sizes == [(4, 2, 512), (4, 2, 256), (0, 0, 512), (4, 2, 0)]
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)
    added = 4 * (sum(p.numel() for p in found.parameters()) - before)
    assert written["padding_bytes"] == added > 0
    assert f"{added} bytes" in written["notes"][1]


def test_a_first_layer_without_attention_gets_one_of_zeros(tmp_path):
    model = cut(dense(), [(0, 0, 512), (4, 2, 256), (4, 2, 256), (4, 2, 0)])
    expected = logits(model)
    written, config = export(model, tmp_path)
    assert config["block_configs"][0]["attention"]["n_heads_in_group"] == 2
    found = read(tmp_path)
    assert not any(p.any() for p in found.model.layers[0].self_attn.parameters())
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)
    assert "attention" in written["notes"][-1]


def test_empty_layers_are_dropped(tmp_path):
    model = cut(dense(), [(0, 0, 0), (4, 2, 256), (0, 0, 0), (4, 2, 512)])
    expected = logits(model)
    written, config = export(model, tmp_path)
    assert "nothing is left of them: 2" in written["notes"][-1]
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 2
    torch.testing.assert_close(logits(read(tmp_path)), expected, atol=1e-4, rtol=1e-4)


def test_attention_implementations_can_be_switched(tmp_path):
    export(cut(dense(), DECI), tmp_path)
    model = read(tmp_path)
    before = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_is_there(tmp_path):
    export(cut(dense(), DECI), tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "tokenizer.json").stat().st_size > len(TEXT)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([(2, 1, 512), *DECI[1:]], "layer 0 has 2; .*--pad"),
        ([(4, 2, 500), *DECI[1:]], "layer 0 has 500; .*--align 256.*--pad"),
        ([(0, 0, 512)] * 4, "no layer of this model has one left"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(InputError, match=words):
        nemotron.check(cut(dense(), sizes), PLAIN)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_without_such_a_form_are_refused(family):
    with pytest.raises(InputError, match=r"nemotron-nas: .*--format gguf or hf-uniform"):
        nemotron.check(tiny_model(family), PAD)


def geometries_of(model: nn.Module):
    """As `geometries`, for a model of this form."""
    model.config.model_type = "llama"
    return geometries(model)
