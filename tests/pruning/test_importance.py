"""Scores against a plain computation from whole gradients, head by head."""

from __future__ import annotations

import math

import pytest
import torch
from calibrated import by_kind, calibrated
from tiny import FAMILIES, tiny_model, token_ids
from torch import Tensor, nn

from fastprune.errors import NumericalError
from fastprune.models.families import geometries
from fastprune.pruning.importance import METHODS, score
from fastprune.pruning.sensitivity import activation, removal

WINDOWS = token_ids(3, 16)


TERMS = {
    "taylor-first": lambda w, g: (w * g).abs(),
    "taylor-second": lambda w, g: (w * g).square(),
    "taylor-mix": lambda w, g: (w * g - 0.5 * (w * g).square()).abs(),
    "taylor-vector": lambda w, g: w * g,
}


def unit_sums(layer: nn.Module, terms: dict[str, Tensor], size) -> tuple[Tensor, Tensor]:
    """Per KV group and per channel sums of per-weight ``terms``, by head and channel numbers."""
    groups, channels = torch.zeros(size.kv_heads), torch.zeros(size.channels)
    dim, share = size.head_dim, size.query_heads // size.kv_heads
    for name, t in terms.items():
        if name.startswith("self_attn") and "norm" not in name:
            for head in range(size.query_heads):
                mine = slice(head * dim, (head + 1) * dim)
                if "q_proj" in name:
                    groups[head // share] += t[mine].sum()
                if "o_proj.weight" in name:
                    groups[head // share] += t[:, mine].sum()
            for head in range(size.kv_heads):
                if "k_proj" in name or "v_proj" in name:
                    groups[head] += t[head * dim : (head + 1) * dim].sum()
        for channel in range(size.channels):
            if "gate_proj" in name or "up_proj" in name:
                channels[channel] += t[channel].sum()
            if "down_proj.weight" in name:
                channels[channel] += t[:, channel].sum()
    return groups, channels


def expected_taylor(model: nn.Module, method: str) -> list[tuple[Tensor, Tensor]]:
    totals = [(torch.zeros(g.kv_heads), torch.zeros(g.channels)) for g in geometries(model)]
    for window in WINDOWS:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for layer, size, (groups, channels) in zip(model.model.layers, geometries(model), totals):
            terms = {
                n: TERMS[method](p.detach(), p.grad.detach()) for n, p in layer.named_parameters()
            }
            g, c = unit_sums(layer, terms, size)
            groups += g / len(WINDOWS)
            channels += c / len(WINDOWS)
    if method == "taylor-vector":
        totals = [(g.abs(), c.abs()) for g, c in totals]
    return totals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", TERMS)
def test_taylor_is_the_sum_over_the_unit(family: str, method: str) -> None:
    model = tiny_model(family, layers=2)
    scores = score(calibrated(model, WINDOWS), method)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for i, (groups, channels) in enumerate(expected_taylor(model, method)):
        # Two ways to the same fp32 gradient, then sums of signed terms in another order.
        scale = channels.abs().max().item()
        torch.testing.assert_close(
            by_kind(scores, "attention")[i].float(), groups, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            by_kind(scores, "mlp")[i].float(), channels, rtol=1e-3, atol=1e-3 * scale
        )


@pytest.mark.parametrize("method", ["magnitude-l1", "magnitude-l2"])
def test_magnitude(method: str) -> None:
    model = tiny_model("qwen2", layers=2)
    scores = score(calibrated(model, WINDOWS), method)
    term = torch.abs if method == "magnitude-l1" else torch.square
    for i, (layer, size) in enumerate(zip(model.model.layers, geometries(model))):
        terms = {n: term(p.detach()) for n, p in layer.named_parameters()}
        groups, channels = unit_sums(layer, terms, size)
        # fp32 sums of a few thousand positive terms in another order
        torch.testing.assert_close(
            by_kind(scores, "attention")[i].float(), groups, rtol=1e-5, atol=0
        )
        torch.testing.assert_close(by_kind(scores, "mlp")[i].float(), channels, rtol=1e-5, atol=0)


def test_activation_weighs_weights_by_their_inputs() -> None:
    model = tiny_model("llama", layers=1)
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda m, x, n=name: seen.setdefault(n, []).append(x[0].flatten(0, 1))
        )
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    layer = model.model.layers[0]
    terms = {
        f"{name}.weight": layer.get_submodule(name).weight.detach().abs() * torch.cat(x).norm(dim=0)
        for name, x in seen.items()
    }
    groups, channels = unit_sums(layer, terms, geometries(model)[0])
    scores = score(calibrated(model, WINDOWS), "activation")
    # fp32 sums of positive terms in another order
    torch.testing.assert_close(by_kind(scores, "attention")[0].float(), groups, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_kind(scores, "mlp")[0].float(), channels, rtol=1e-5, atol=0)


def test_maximum_weight_and_output_energy() -> None:
    model = tiny_model("llama", layers=1)
    layer, seen = model.model.layers[0], {}
    for module in (layer, layer.self_attn.o_proj, layer.mlp.down_proj):
        module.register_forward_pre_hook(
            lambda m, x: seen.setdefault(m, []).append(x[0].flatten(0, 1))
        )
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window[None], use_cache=False)
    norms = {m: torch.cat(x).norm(dim=0) for m, x in seen.items()}
    gate, up, down = (
        layer.mlp.gate_proj.weight,
        layer.mlp.up_proj.weight,
        layer.mlp.down_proj.weight.T,
    )
    parts = [w.max(1).values + w.min(1).values.abs() for w in (gate, up, down)]
    ranking = sum(p / p.max() for p in parts) * norms[layer.mlp.down_proj]
    scale = torch.cat(seen[layer]).square().sum(1).reciprocal().mean()
    energy = (down.norm(dim=1) * norms[layer.mlp.down_proj]).square()
    channels = energy.median() * (ranking / ranking.median()).square() * scale
    o = layer.self_attn.o_proj
    groups = (o.weight.norm(dim=0) * norms[o]).square().view(4, 32).sum(1) * scale
    scores = score(calibrated(model, WINDOWS), "activation-maw")
    # fp32 sums of positive terms in another order
    torch.testing.assert_close(by_kind(scores, "mlp")[0].float(), channels, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_kind(scores, "attention")[0].float(), groups, rtol=1e-5, atol=0)


def test_relative_energy_compares_layers_and_bears_dead_channels() -> None:
    """What does not depend on a layer's own scale: its hidden states', or one giant token's."""
    model = tiny_model("llama", layers=2)
    expected = score(calibrated(model, WINDOWS), "activation-maw")
    with torch.no_grad():
        # The norms give every layer the same input; what it adds is as much larger as the states.
        model.model.embed_tokens.weight *= 8
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 8
            layer.mlp.down_proj.weight *= 8
    scaled = score(calibrated(model, WINDOWS), "activation-maw")
    for a, b in zip(
        [*by_kind(scaled, "attention"), *by_kind(scaled, "mlp")],
        [*by_kind(expected, "attention"), *by_kind(expected, "mlp")],
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0)  # the norms' epsilon counts for less
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:60] = 0  # most of 96
        model.model.layers[1].mlp.up_proj.weight.zero_()
    dead = by_kind(score(calibrated(model, WINDOWS), "activation-maw"), "mlp")
    assert (dead[0][:60] == 0).all() and (dead[0][60:] > 0).all() and (dead[1] == 0).all()
    with torch.no_grad():
        model.model.embed_tokens.weight[WINDOWS[:, 0]] *= 1e4
    giant = by_kind(score(calibrated(model, WINDOWS), "activation-maw"), "attention")[0]
    ratio = giant / by_kind(scaled, "attention")[0]
    assert (ratio > 0.5).all() and (ratio < 2).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_method_and_dtype_repeats_exactly(method: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", layers=2).to(dtype)
    first, second = (
        score(calibrated(model, WINDOWS), method),
        score(calibrated(model, WINDOWS), method),
    )
    for a, b in zip(
        [*by_kind(first, "attention"), *by_kind(first, "mlp")],
        [*by_kind(second, "attention"), *by_kind(second, "mlp")],
    ):
        assert torch.equal(a, b)
        assert a.min() >= 0 and a.max() > 0


def test_half_precision_agrees_with_single() -> None:
    model = tiny_model("llama", layers=2)
    exact = score(calibrated(model, WINDOWS), "taylor-first")
    for dtype in (torch.bfloat16, torch.float16):
        half = score(calibrated(tiny_model("llama", layers=2).to(dtype), WINDOWS), "taylor-first")
        for a, b in zip(by_kind(half, "mlp"), by_kind(exact, "mlp")):
            # bf16 keeps 8 bits through two layers; the ranking needs no more
            assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98


def test_broken_weights_are_reported() -> None:
    model = tiny_model("llama", layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(NumericalError, match="scores came out as NaN or Inf: the weights hold"):
        score(calibrated(model, WINDOWS), "taylor-first")


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_is_what_each_layer_changes(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        states = model(input_ids=WINDOWS, output_hidden_states=True).hidden_states
        # the last state of these is normed; the last layer's own output is caught
        outputs = []
        hook = model.model.layers[-1].register_forward_hook(lambda *a: outputs.append(a[-1]))
        model(input_ids=WINDOWS)
        hook.remove()
    states = [*states[:-1], outputs[0]]
    changes = activation(calibrated(model, WINDOWS))
    for before, after, change in zip(states[:-1], states[1:], changes, strict=True):
        expected = ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()
        assert change == pytest.approx(expected, rel=1e-5)  # fp32 norms, other batches


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_equals_skipping_the_layer(family: str) -> None:
    model = tiny_model(family)
    increases, dense = removal(calibrated(model, WINDOWS))
    layers = model.model.layers

    def perplexity() -> float:
        with torch.no_grad():
            loss = model(input_ids=WINDOWS, labels=WINDOWS, use_cache=False).loss
        return math.exp(loss)

    assert dense == pytest.approx(perplexity(), rel=1e-5)  # fp32 mean against fp64 sum
    for skipped in range(len(layers)):
        model.model.layers = nn.ModuleList(x for i, x in enumerate(layers) if i != skipped)
        model.config.num_hidden_layers = len(layers) - 1
        assert increases[skipped] == pytest.approx(perplexity() - dense, rel=1e-4, abs=1e-4 * dense)
