"""Compensation against the closed form, and its promise never to make a layer worse."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, tiny_model, token_ids

from fastprune.models.families import geometries
from fastprune.prune.compensation import Moments, compensate, solve
from fastprune.prune.plan import LayerPlan, Plan, keep_all

WINDOWS = token_ids(64, 32)


def half_plan(model: torch.nn.Module) -> Plan:
    """Layer 1 loses half of everything, layer 2 its MLP; the others stay whole."""
    sizes = tuple(geometries(model))
    layers = list(keep_all(sizes).layers)
    layers[1] = LayerPlan(1, (0, 3), tuple(range(0, 96, 2)))
    layers[2] = LayerPlan(2, (0, 1, 2, 3), ())
    return Plan(sizes, tuple(layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_shrink_and_removed_columns_are_zero(family: str) -> None:
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    refits = compensate(model, half_plan(model), WINDOWS)
    assert [(r.layer, r.sublayer) for r in refits] == [(1, "attention"), (1, "mlp")]
    assert all(r.error_after <= r.error_before for r in refits)
    assert any(r.error_after < 0.9 * r.error_before for r in refits)
    layers, before = model.model.layers, dense.model.layers
    assert not layers[1].mlp.down_proj.weight[:, 1::2].any()
    assert not layers[1].self_attn.o_proj.weight[:, 32:96].any()
    assert not layers[2].mlp.down_proj.weight.any()
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert torch.equal(
            layers[1].get_submodule(name).weight, before[1].get_submodule(name).weight
        )
    assert torch.equal(layers[3].mlp.down_proj.weight, before[3].mlp.down_proj.weight)


def test_first_cut_is_the_ridge_solution() -> None:
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    refits = compensate(model, half_plan(model), WINDOWS, batch_size=8)
    inputs = []
    linear = dense.model.layers[1].self_attn.o_proj
    linear.register_forward_pre_hook(lambda m, x: inputs.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in WINDOWS.split(8)[:7]:  # the eighth is held out
            dense(input_ids=batch, use_cache=False)
    x = torch.cat(inputs).double()
    kept = torch.cat([torch.arange(0, 32), torch.arange(96, 128)])
    w = linear.weight.detach().double()
    h = x[:, kept].T @ x[:, kept]
    ridge = refits[0].strength * h.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    target = x @ w.T
    expected = torch.linalg.solve(h + ridge, x[:, kept].T @ target + ridge @ w[:, kept].T).T
    got = model.model.layers[1].self_attn.o_proj.weight[:, kept].double()
    # bf16 matrix units may make the inputs: 8 bits, averaged over 1,800 tokens
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_bias_takes_the_mean() -> None:
    moments = Moments(3, torch.device("cpu"))
    x = torch.randn(50, 3) + 5
    moments.add(x[:20])
    moments.add(x[20:].view(2, 15, 3))
    centred = x - x.mean(0)
    # fp32 sums of squares of numbers around 5: cancellation costs three digits
    torch.testing.assert_close(moments.centred(), centred.T @ centred, rtol=1e-3, atol=1e-2)
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    refits = compensate(model, half_plan(model), WINDOWS)
    assert all(r.error_after <= r.error_before for r in refits)
    assert not model.model.layers[2].mlp.down_proj.bias.any()


def test_singular_moments_fall_back() -> None:
    x = torch.randn(2, 8)
    h = x.T @ x  # rank 2
    update = solve(h, torch.randn(3, 8), 1e-3)
    assert update is not None and update.isfinite().all()
    assert solve(torch.full((4, 4), torch.nan), torch.ones(1, 4), 0.1) is None
    assert solve(torch.zeros(4, 4), torch.ones(1, 4), 0.1) is None


def test_two_runs_are_identical() -> None:
    models = [tiny_model("qwen2") for _ in range(2)]
    for model in models:
        compensate(model, half_plan(model), WINDOWS)
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    refits = compensate(model, half_plan(model), WINDOWS)
    assert all(r.error_after <= r.error_before for r in refits)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
