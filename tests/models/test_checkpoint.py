"""What is saved is what is loaded: here, in a fresh process, and where fastprune is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cutting import cut
from tiny import FAMILIES, TEXT, tiny_model, tiny_tokenizer, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.families import geometries
from fastprune.models.load import load_model

UNEVEN = [(6, 3, 50), (0, 0, 96), (8, 4, 0), (2, 1, 32)]
EVEN = [(4, 2, 48)] * 4
INDIVISIBLE = [(6, 3, 48)] * 4  # 64 is no multiple of 6 heads
WITHOUT_A_LAYER = [(4, 2, 48), (0, 0, 0), (4, 2, 48), (4, 2, 48)]

FRESH = """
import sys, torch
kind, work, *folders = sys.argv[1:]
if kind == "remote":
    sys.modules["fastprune"] = None  # importing it fails from here on
else:
    from fastprune.models.lazy import register_on_first_use
    register_on_first_use()
from transformers import AutoModelForCausalLM
ids = torch.load(work + "/ids.pt")
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=kind == "remote" or None)
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/logits.pt")
"""


def save(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_checkpoint(model, tiny_tokenizer(), folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [UNEVEN, EVEN, INDIVISIBLE, WITHOUT_A_LAYER])
def test_reloads_identical(family, tied, sizes, tmp_path):
    model = cut(tiny_model(family, tied=tied), sizes)
    folder = save(model, tmp_path / "out")
    loaded, tokenizer = load_model(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    kept = [g for g in geometries(loaded) if g.query_heads or g.channels]
    assert [(g.query_heads, g.kv_heads, g.channels) for g in kept] == [
        size for size in sizes if any(size)
    ]


@pytest.mark.parametrize("kind", ["installed", "remote"])
def test_a_fresh_process_computes_the_same(kind, tmp_path):
    models = {f: cut(tiny_model(f), UNEVEN) for f in FAMILIES}
    folders = {f: save(model, tmp_path / f) for f, model in models.items()}
    torch.save(token_ids(), tmp_path / "ids.pt")
    subprocess.run(
        [sys.executable, "-c", FRESH, kind, str(tmp_path), *map(str, folders.values())],
        check=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    for family, model in models.items():
        assert torch.equal(torch.load(folders[family] / "logits.pt"), logits(model)), family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [EVEN, WITHOUT_A_LAYER])
def test_uniform_layers_give_a_stock_config(family, sizes, tmp_path):
    folder = save(cut(tiny_model(family), sizes), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == family
    assert config["num_hidden_layers"] == len([s for s in sizes if any(s)])
    assert "auto_map" not in config
    assert "per_layer_config" not in config
    assert not (folder / "modeling_fastprune.py").exists()


def test_heads_that_llama_refuses_are_carried_by_mistral(tmp_path):
    folder = save(cut(tiny_model("llama"), INDIVISIBLE), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("mistral", None)
    assert (config["num_attention_heads"], config["head_dim"]) == (6, 16)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock).__name__ == "MistralForCausalLM"


def test_a_llama_with_biases_stays_a_llama(tmp_path):
    model = cut(tiny_model("llama", attention_bias=True), INDIVISIBLE)
    folder = save(model, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "fastprune_llama"
    assert torch.equal(logits(load_model(folder)[0]), logits(model))


def test_tied_embeddings_are_written_once(tmp_path):
    from safetensors import safe_open

    names = {}
    for tied in (True, False):
        folder = save(cut(tiny_model("llama", tied=tied), UNEVEN), tmp_path / str(tied))
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names[tied] = set(file.keys())
    assert names[False] - names[True] == {"lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype, tmp_path):
    folder = save(cut(tiny_model("qwen3").to(dtype), UNEVEN), tmp_path / "out")
    loaded, _ = load_model(folder)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_a_loaded_checkpoint_can_be_cut_and_saved_again(tmp_path):
    first = save(cut(tiny_model("qwen2"), UNEVEN), tmp_path / "first")
    again = [(4, 2, 40), (0, 0, 50), (8, 4, 0), (2, 1, 32)]
    model = cut(load_model(first)[0], again)
    assert torch.equal(logits(load_model(save(model, tmp_path / "second"))[0]), logits(model))


def test_all_files_have_the_same_permissions(tmp_path):
    folder = save(cut(tiny_model("llama"), UNEVEN), tmp_path / "out")
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_other_architectures_are_saved_as_they_are(tmp_path):
    from transformers import GPT2Config

    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ).eval()
    loaded, _ = load_model(save(model, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(model))
