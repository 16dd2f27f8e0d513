"""Surgery equals masking: cutting units gives the logits of zeroing them in the dense model."""

from __future__ import annotations

import copy

import pytest
import torch
from counting import keeping
from tiny import FAMILIES, tiny_model, token_ids

from fastprune.errors import InputError
from fastprune.models.families import decoder_layers, geometries
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.planning import parameters_removed
from fastprune.pruning.surgery import apply_plan

IDS = token_ids(2, 17, seed=1)


def uneven_plan(model: torch.nn.Module) -> Plan:
    """A different cut in every layer; the last one stays whole."""
    sizes = tuple(geometries(model))
    kept = [((1, 3), range(0, 96, 2)), ((0,), range(5, 96)), ((0, 1, 2), (7,))]
    whole = keep_all(sizes).layers[3:]
    thinned = tuple(keeping(i, g, tuple(c)) for i, (g, c) in enumerate(kept))
    return Plan(sizes, (*thinned, *whole))


def mask(model: torch.nn.Module, plan: Plan) -> torch.nn.Module:
    """The dense model with the o and down columns of the removed units set to zero.

    Written out by head and channel numbers, without the unit tables that surgery uses.
    """
    masked = copy.deepcopy(model)
    for layer, kept, size in zip(masked.model.layers, plan.layers, plan.geometries, strict=True):
        for head in range(size.query_heads):
            if head // (size.query_heads // size.kv_heads) not in kept.kept["attention"]:
                columns = slice(head * size.head_dim, (head + 1) * size.head_dim)
                layer.self_attn.o_proj.weight.data[:, columns] = 0
        for channel in range(size.channels):
            if channel not in kept.kept["mlp"]:
                layer.mlp.down_proj.weight.data[:, channel] = 0
    return masked


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_surgery_equals_masking(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    plan = uneven_plan(model)
    expected = logits(mask(model, plan))
    before = sum(p.numel() for p in model.parameters())
    removed = parameters_removed(model, plan)
    apply_plan(model, plan)
    # Only the order of summation differs; logits are of order 10, fp32 has 1e-7 of that.
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert geometries(model) == plan.result()
    assert sum(p.numel() for p in model.parameters()) == before - removed


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_keeps_its_ratio(family: str) -> None:
    model = tiny_model(family)
    apply_plan(model, uneven_plan(model))
    for layer in decoder_layers(model):
        attention = layer.self_attn
        queries = attention.q_proj.out_features // attention.head_dim
        keys = attention.k_proj.out_features // attention.head_dim
        assert queries == 2 * keys == 2 * (attention.v_proj.out_features // attention.head_dim)
        assert attention.num_key_value_groups == 2
        assert attention.o_proj.in_features == attention.q_proj.out_features


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_generates_and_trains(family: str) -> None:
    model = tiny_model(family)
    apply_plan(model, uneven_plan(model))
    cached = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, use_cache=True)
    plain = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    model.train()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_plan_of_another_model() -> None:
    plan = uneven_plan(tiny_model("llama"))
    with pytest.raises(InputError, match="another model"):
        apply_plan(tiny_model("llama", intermediate_size=64), plan)


def test_surgery_twice() -> None:
    model = tiny_model("qwen3")
    apply_plan(model, uneven_plan(model))
    sizes = geometries(model)
    first = sizes[0]
    again = Plan(
        tuple(sizes),
        (
            keeping(0, (1,), tuple(range(first.channels // 2))),
            *keep_all(sizes).layers[1:],
        ),
    )
    expected = logits(mask(model, again))
    apply_plan(model, again)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)  # as above
