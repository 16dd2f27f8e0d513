"""Models whose layers differ in size compute, cache, train and register like stock ones."""

import logging
import subprocess
import sys

import pytest
import torch
from per_layer import NO_ATTENTION, per_layer_config, per_layer_model
from tiny import FAMILIES, compute_activations_twice, tiny_model, token_ids
from torch import nn
from transformers import AutoModel
from transformers.utils import logging as library

from fastprune.models import modeling
from fastprune.models.conform import conform
from fastprune.models.families import Geometry


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_built_at_their_own_size(family):
    layers = per_layer_model(family).model.layers
    assert not list(layers[0].self_attn.parameters())
    assert layers[1].self_attn.q_proj.weight.shape == (6 * 16, 64)
    assert layers[1].self_attn.k_proj.weight.shape == (3 * 16, 64)
    assert layers[1].mlp.down_proj.weight.shape == (64, 50)
    assert layers[2].self_attn.o_proj.weight.shape == (64, 8 * 16)
    assert not list(layers[3].mlp.parameters())
    assert not list(layers[3].post_attention_layernorm.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_sublayers_add_nothing(family):
    """A removed sublayer equals one whose output projection is zero."""
    full = tiny_model(family)
    removed = tiny_model(family)
    nn.init.zeros_(full.model.layers[1].self_attn.o_proj.weight)
    nn.init.zeros_(full.model.layers[2].mlp.down_proj.weight)
    modeling.remove_sublayer(removed.model.layers[1], "attention", "llama")
    modeling.remove_sublayer(removed.model.layers[2], "mlp", "llama")
    with torch.no_grad():
        assert torch.equal(full(token_ids()).logits, removed(token_ids()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_conformed_model_equals_one_built_at_that_size(family):
    stock = tiny_model(family)
    built = per_layer_model(family, {1: NO_ATTENTION})
    sizes = [Geometry(8, 4, 96, 16) for _ in range(4)]
    sizes[1] = Geometry(0, 0, 96, 16)
    conform(stock, sizes)
    assert type(stock) is type(built)
    assert stock.config.to_dict()["per_layer_config"] == built.config.to_dict()["per_layer_config"]
    built.load_state_dict(stock.state_dict())
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, built(ids).logits)
    tokens = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (stock, built)]
    assert torch.equal(*tokens)


def test_nothing_is_said_of_global_sizes_that_are_read():
    """The library warns once a process of what its own checks do."""
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    library.warning_once.cache_clear()
    library.add_handler(handler)
    try:
        conform(tiny_model("llama"), [Geometry(8, 4, 96, 16)] * 3 + [Geometry(2, 1, 8, 16)])
    finally:
        library.remove_handler(handler)
    assert not seen


def test_conformed_model_follows_a_change_of_attention():
    model = tiny_model("llama")
    conform(model, [Geometry(8, 4, 96, 16)] * 3 + [Geometry(0, 0, 96, 16)])
    ids = token_ids()
    with torch.no_grad():
        before = model(ids).logits
        model.set_attn_implementation("eager")
        after = model(ids, output_attentions=True)
    assert after.attentions[0] is not None
    # sdpa and eager differ in the order of fp32 sums only; logits are of size 1
    torch.testing.assert_close(before, after.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing_equal_those_without(family):
    gradients = []
    for checkpointing in (False, True):
        model = per_layer_model(family).train()
        if checkpointing:
            compute_activations_twice(model)
        model(token_ids(), labels=token_ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


OLD = [
    {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 96},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50},
    {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96},
    {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 0},
]


@pytest.mark.parametrize("old", [OLD, {str(index): layer for index, layer in enumerate(OLD)}])
def test_zeros_and_dense_lists_of_older_checkpoints_are_read(old):
    config = per_layer_config("llama", old)
    assert config.to_dict()["per_layer_config"] == {
        "0": {"skip": ["attention"]},
        "1": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50},
        "3": {"skip": ["mlp"]},
    }
    assert config.to_dict() == per_layer_config("llama").to_dict()


def test_a_sublayer_that_does_not_exist_cannot_be_skipped():
    with pytest.raises(ValueError, match=r"skips \['experts'\]"):
        per_layer_config("llama", {1: {"skip": ["experts"]}})


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_that_size_caches_read_the_global_settings(family):
    """They hold for every layer: no layer has more."""
    config = per_layer_config(family)
    text = config.get_text_config(decoder=True)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (8, 4, 16)
    assert (text.num_hidden_layers, text.intermediate_size) == (4, 96)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_without_its_head(family):
    """AutoModel builds it, with the weights of the whole model."""
    modeling.register()
    whole = per_layer_model(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        bare = AutoModel.from_config(whole.config).eval()
    assert type(bare) is modeling.family_classes(family).model
    bare.load_state_dict(whole.model.state_dict())
    ids = token_ids()
    with torch.no_grad():
        hidden = whole.model(ids).last_hidden_state
        assert torch.equal(bare(ids).last_hidden_state, hidden)


@pytest.mark.parametrize("first", ["", "import transformers.models.auto.configuration_auto"])
def test_importing_the_package_registers_without_importing_torch(first):
    """Neither order of imports may matter, and `fastprune --help` must not wait for torch."""
    code = f"""
{first}
import sys
loaded = "torch" in sys.modules
import fastprune
assert ("torch" in sys.modules) == loaded
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoConfig.from_pretrained("/nonexistent")
except OSError:
    pass
assert type(AutoConfig.for_model("fastprune_llama")).__name__ == "FastpruneLlamaConfig"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
