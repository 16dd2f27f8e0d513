"""Layers keep their numbers in every KV cache, whichever attentions are removed."""

import pytest
import torch
from per_layer import NO_ATTENTION, per_layer_model
from tiny import FAMILIES, tiny_model, token_ids
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

REMOVED = [[0], [2], [3], [0, 1, 3], [0, 1, 2, 3]]
NEW = 8
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this release of transformers calls it."""
MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
"""The first two layers of a Qwen2 attend to everything, the last two to a window."""


def without(family: str, removed: list[int], **options: object) -> nn.Module:
    """A tiny model without the attention of the layers `removed`."""
    return per_layer_model(family, dict.fromkeys(removed, NO_ATTENTION), **options)


def generated(model: nn.Module, ids: Tensor, **options: object) -> Tensor:
    """`ids` (n, s) and `NEW` tokens after them, the likeliest each."""
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, **settings | options)


@pytest.mark.parametrize(
    ("family", "removed"),
    [*(("llama", removed) for removed in REMOVED), *((family, [0, 3]) for family in FAMILIES)],
)
def test_a_dynamic_cache(family, removed):
    model, ids = without(family, removed), token_ids()
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(generated(model, ids), expected)
    assert torch.equal(generated(model, ids, **{CACHE: DynamicCache()}), expected)


@pytest.mark.parametrize("removed", REMOVED)
def test_a_static_cache(removed):
    model, ids = without("llama", removed), token_ids()
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(generated(model, ids, cache_implementation="static"), expected)


@pytest.mark.parametrize("removed", [[0], [2], [0, 2], [0, 1], [2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("cache", [None, "static"])
def test_layers_with_a_window_beside_layers_without(cache, removed):
    """Each kind has masks of its own, sized by the first layer of that kind."""
    model, ids = without("qwen2", removed, **MIXED), token_ids()
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(generated(model, ids, cache_implementation=cache), expected)


@pytest.mark.parametrize("removed", [[0], [3], [0, 1, 2, 3]])
def test_windows_in_every_layer(removed):
    model, ids = without("mistral", removed, sliding_window=8), token_ids()
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(generated(model, ids), expected)


@pytest.mark.parametrize("removed", [[0], [1], [0, 3]])
@pytest.mark.parametrize("cache", [None, "static"])
def test_padding_on_the_left(cache, removed):
    """Texts of unequal length in one batch continue as they do alone."""
    model, ids = without("llama", removed), token_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    batch = generated(model, ids, attention_mask=mask, cache_implementation=cache)
    alone = generated(model, ids[:1, 5:], use_cache=False)
    assert torch.equal(batch[:1, 5:], alone)
    assert torch.equal(batch[1:], generated(model, ids[1:], use_cache=False))


@pytest.mark.parametrize("removed", [[0], [1]])
def test_beams_reorder_the_cache(removed):
    model, ids = without("qwen3", removed), token_ids()
    expected = generated(model, ids, num_beams=3, use_cache=False)
    assert torch.equal(generated(model, ids, num_beams=3), expected)


@pytest.mark.parametrize("removed", [[0], [1]])
def test_a_pruned_model_drafts_for_the_dense_one(removed):
    """Rejected tokens are cut off the caches of both; a draft never changes what comes out."""
    dense, ids = tiny_model("llama"), token_ids(1)
    draft = without("llama", removed)
    expected = generated(dense, ids, use_cache=False)
    assert torch.equal(generated(dense, ids, assistant_model=draft), expected)
    assert torch.equal(
        generated(draft, ids, assistant_model=dense), generated(draft, ids, use_cache=False)
    )


def test_a_static_cache_allocated_in_advance():
    """Removed attentions then have room at the size of the others, and count in it as well."""
    model, ids = without("llama", [0, 2]), token_ids()
    cache = StaticCache(model.config, max_cache_len=32)
    cache.early_initialization(2, 4, 16, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        pieces = [model(part, **{CACHE: cache}).logits for part in ids.split(8, dim=1)]
        whole = model(ids, use_cache=False).logits
    # sums over a longer, masked row; logits are of size 1
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)


def test_layers_are_numbered_as_in_the_dense_model():
    """Engines look up the cache of a layer by this number."""
    for model in (without("llama", [0, 2]), without("qwen2", [1], **MIXED)):
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_a_removed_attention_takes_one_number_a_token_in_the_cache():
    model, ids = without("llama", [0]), token_ids()
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
    assert cache.get_seq_length() == 24
    assert cache.layers[0].keys.shape == (2, 1, 24, 1)
    assert cache.layers[1].keys.shape == (2, 4, 24, 16)
