"""The vLLM plugin, on a stand-in for vLLM."""

import importlib
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import vllm_stand_in as vllm
from cutting import cut
from tiny import FAMILIES, tiny_model, token_ids
from transformers import AutoConfig

from fastprune.exporting import vllm_plugin
from fastprune.models import modeling

SIZES = {
    "no attention first, no MLP later": [(0, 0, 96), (6, 3, 50), (8, 4, 0), (2, 1, 32)],
    "an empty layer first": [(0, 0, 0), (6, 3, 50), (0, 0, 40), (2, 1, 0)],
}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def models(monkeypatch):
    """The module of the models, imported where the stand-in takes the place of vLLM."""
    for name, module in vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fastprune.exporting.vllm_models", raising=False)
    vllm.Attention.caches.clear()
    vllm.ModelRegistry.models.clear()
    yield importlib.import_module("fastprune.exporting.vllm_models")
    sys.modules.pop("fastprune.exporting.vllm_models", None)


def served(models, model):
    """`model` as vLLM would build and load it, and the names of the parameters that were loaded."""
    copy = models.PerLayerForCausalLM(vllm_config=vllm.config_of(model.config))
    return copy, copy.load_weights(model.state_dict().items())


def test_the_entry_point_names_a_function_that_registers_all_but_mixtures(models):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["vllm.general_plugins"]["fastprune"]
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)()
    dense = [name for name, stock in modeling.STOCK.items() if stock.experts is None]
    names = [modeling.family_classes(name).causal_lm.__name__ for name in dense]
    assert vllm.ModelRegistry.models == dict.fromkeys(names, vllm_plugin.MODEL)
    module, _, name = vllm_plugin.MODEL.partition(":")
    assert getattr(importlib.import_module(module), name) is models.PerLayerForCausalLM
    assert type(AutoConfig.for_model("fastprune_qwen2")) is modeling.FastpruneQwen2Config


def test_the_plugin_is_imported_without_vllm_and_torch():
    code = """
import sys
sys.modules["vllm"] = None  # importing it fails from here on
import fastprune.exporting.vllm_plugin
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits(models, family, shape):
    """Every parameter is loaded, under the stacked names, and the sums are the model's own."""
    model = cut(tiny_model(family), SIZES[shape])
    copy, loaded = served(models, model)
    assert loaded == {name for name, _ in copy.named_parameters()}
    ids = token_ids(1)
    with torch.no_grad():
        logits = copy.lm_head(copy(ids[0], torch.arange(ids.shape[1])))
        # sums in another order; logits are of size 1
        torch.testing.assert_close(logits, model(ids).logits[0], atol=1e-4, rtol=0)


def test_a_cache_for_the_attentions_that_are_left_alone(models):
    served(models, cut(tiny_model("llama"), SIZES["an empty layer first"]))
    assert vllm.Attention.caches == {
        "model.layers.1.self_attn.attn": 3,
        "model.layers.3.self_attn.attn": 1,
    }


def test_sizes_of_the_stacked_projections(models):
    model, _ = served(models, cut(tiny_model("qwen2"), SIZES["an empty layer first"]))
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert attention.qkv_proj.rows == [96, 48, 48]
    assert attention.qkv_proj.bias is not None and attention.o_proj.bias is None
    assert attention.o_proj.in_features == 96
    assert (mlp.gate_up_proj.rows, mlp.down_proj.in_features) == ([50, 50], 50)
    assert not list(model.model.layers[0].parameters())


def test_the_config_travels_to_worker_processes():
    config = cut(tiny_model("llama"), SIZES["an empty layer first"]).config
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
