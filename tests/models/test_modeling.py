"""Models whose layers differ in size compute, cache, train and register like stock ones."""

import subprocess
import sys

import pytest
import torch
from tiny import FAMILIES, compute_activations_twice, tiny_config, tiny_model, token_ids
from torch import nn

from fastprune.models import modeling
from fastprune.models.families import Geometry

SIZES = {
    0: {"num_attention_heads": 0, "num_key_value_heads": 0},
    1: {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50},
    3: {"intermediate_size": 0},
}


def per_layer_model(family: str, sizes: dict = SIZES, **options) -> nn.Module:
    config_class, model_class = modeling.FAMILIES[family]
    settings = tiny_config(family, **options).to_dict()
    settings.pop("model_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**settings, per_layer_config=sizes)).eval()


def greedy(model: nn.Module, ids: torch.Tensor, *, cache: bool) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
        eos_token_id=None,
    )


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
    modeling.remove_attention(removed.model.layers[1])
    modeling.remove_mlp(removed.model.layers[2])
    with torch.no_grad():
        assert torch.equal(full(token_ids()).logits, removed(token_ids()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("removed", [[0], [0, 1, 3], [1, 2], [0, 1, 2, 3]])
def test_cached_generation_equals_uncached(family, removed):
    none = {"num_attention_heads": 0, "num_key_value_heads": 0}
    model = per_layer_model(family, dict.fromkeys(removed, none))
    ids = token_ids()
    assert torch.equal(greedy(model, ids, cache=True), greedy(model, ids, cache=False))


@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_cached_generation_with_mixed_windows(removed):
    """Sliding-window and full layers have caches of their own kinds; neither may lose its first."""
    none = {"num_attention_heads": 0, "num_key_value_heads": 0}
    model = per_layer_model(
        "qwen2", {removed: none}, use_sliding_window=True, sliding_window=8, max_window_layers=2
    )
    ids = token_ids()
    assert torch.equal(greedy(model, ids, cache=True), greedy(model, ids, cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_conformed_model_equals_one_built_at_that_size(family):
    stock = tiny_model(family)
    built = per_layer_model(family, {1: {"num_attention_heads": 0, "num_key_value_heads": 0}})
    sizes = [Geometry(8, 4, 96, 16) for _ in range(4)]
    sizes[1] = Geometry(0, 0, 96, 16)
    modeling.conform(stock, sizes)
    assert type(stock) is type(built)
    assert stock.config.to_dict()["per_layer_config"] == built.config.to_dict()["per_layer_config"]
    built.load_state_dict(stock.state_dict())
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, built(ids).logits)
    assert torch.equal(greedy(stock, ids, cache=True), greedy(built, ids, cache=True))


def test_conformed_model_follows_a_change_of_attention():
    model = tiny_model("llama")
    modeling.conform(model, [Geometry(8, 4, 96, 16)] * 3 + [Geometry(0, 0, 96, 16)])
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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
