"""Which attention a loaded model computes by the kernel, and that it is the same attention."""

import json
from contextlib import nullcontext

import pytest
import torch
from tiny import (
    FAMILIES,
    compute_activations_twice,
    saved,
    tiny_checkpoint,
    tiny_gpt2,
    tiny_t5,
    token_ids,
)

from fastprune.kernels import attention as kernel
from fastprune.models.attention import NAME, use_attention
from fastprune.models.load import load_model


@pytest.fixture
def calls(monkeypatch):
    """The shapes of q that the kernel is given."""
    if not kernel.attention_serves(torch.device("cpu")):
        pytest.skip("this processor has no bf16 products")
    shapes = []

    def counted(q, k, v, scale):
        shapes.append(tuple(q.shape))
        return kernel.attention_op(q, k, v, scale)

    monkeypatch.setattr("fastprune.models.attention.attention_op", counted)
    return shapes


def products(dtype):
    return torch.autocast("cpu", dtype=dtype) if dtype else nullcontext()


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_same_attention(calls, tmp_path, family):
    model, _ = load_model(tiny_checkpoint(tmp_path, family))
    ids = token_ids(2, 70)
    with torch.no_grad():
        exact = model(ids).logits
        assert not calls  # fp32
        with products(torch.bfloat16):
            ours = model(ids).logits.float()
            assert calls == [(2, 8, 70, 16)] * 4
            model.set_attn_implementation("sdpa")
            theirs = model(ids).logits.float()
    assert len(calls) == 4
    assert not torch.equal(ours, theirs)
    # as far from fp32 as torch's own
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm()


def test_gradients_come_back(calls, tmp_path):
    model, _ = load_model(tiny_checkpoint(tmp_path))
    ids = token_ids(2, 70)

    def gradients(dtype):
        model.zero_grad()
        with products(dtype):
            model(ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, ours = gradients(None), gradients(torch.bfloat16)
    compute_activations_twice(model)
    model.train()
    assert torch.equal(gradients(torch.bfloat16), ours)
    model.set_attn_implementation("sdpa")
    assert len(calls) == 4 * 3  # once more for each layer that is computed again
    assert (ours - exact).norm() < 1.2 * (gradients(torch.bfloat16) - exact).norm()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_t5])
def test_other_families(calls, tmp_path, make):
    model, _ = load_model(saved(tmp_path, make()))
    ids = token_ids(1, 40)
    inputs = {"labels": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), products(torch.bfloat16):
        model(ids, **inputs)
    assert bool(calls) == (make is tiny_gpt2)


def test_a_mask_and_a_cache_are_left_to_torch(calls, tmp_path):
    model, _ = load_model(tiny_checkpoint(tmp_path))
    ids = token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad(), products(torch.bfloat16):
        padded = model(ids, attention_mask=mask).logits
        assert not calls
        alone = model(ids[:1, 5:]).logits
        assert len(calls) == 4
        made = model.generate(ids, max_new_tokens=5, do_sample=False)
    torch.testing.assert_close(padded[:1, 5:], alone, atol=0.1, rtol=0.05)  # bf16 logits up to 10
    assert made.shape == (2, 25)
    assert len(calls) == 8  # the prompt, and no token after it


def test_nothing_of_it_is_saved(tmp_path):
    model, _ = load_model(tiny_checkpoint(tmp_path / "a"))
    if kernel.attention_serves(torch.device("cpu")):
        assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert not [key for key in config if "attn_impl" in key]


def test_other_attention_stays_as_it_is(monkeypatch, tmp_path):
    model, _ = load_model(tiny_checkpoint(tmp_path))
    model.set_attn_implementation("eager")
    use_attention(model)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr("fastprune.models.attention.attention_serves", lambda *_: False)
    use_attention(model)
    assert model.config._attn_implementation == "sdpa"
