"""Scores of experts against the formulas written out, and the guard against collapse."""

from __future__ import annotations

import pytest
import torch
from calibrated import calibrated
from tiny import tiny_model, token_ids
from torch import Tensor, nn
from torch.nn.functional import linear, softmax

from fastprune.distributed import ALONE
from fastprune.models.families import geometries
from fastprune.models.layers import Layers
from fastprune.pruning.allocation import allocate, allocate_same
from fastprune.pruning.compensation import compensate
from fastprune.pruning.importance import score
from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.mixtures import Shares, collapse
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.sizes import LayerSize, Limits, SublayerSize, removed_parameters
from fastprune.pruning.surgery import apply_plan

WINDOWS = token_ids(3, 16)


def tokens_of_experts(model: nn.Module) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """Of each layer, for each expert: its tokens, their gates, and what its down columns read."""
    inputs: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS)
    for hook in hooks:
        hook.remove()
    found = []
    for x, layer in zip(inputs, model.model.layers, strict=True):
        best = softmax(linear(x, layer.mlp.gate.weight), -1).topk(2, -1)
        gates = torch.zeros(len(x), 6).scatter(1, best.indices, best.values)
        gates = gates / gates.sum(1, keepdim=True)  # as Mixtral normalises
        own = []
        for expert in range(6):
            mine = gates[:, expert] > 0
            gate, up = linear(x[mine], layer.mlp.experts.gate_up_proj[expert]).chunk(2, -1)
            own.append((x[mine], gates[mine, expert, None], nn.functional.silu(gate) * up))
        found.append(own)
    return found


def test_routed_output_is_the_mean_over_routed_tokens_of_gate_times_norm():
    model = tiny_model("mixtral")
    scores = score(calibrated(model, WINDOWS), "routed-output")
    for layer, own, found in zip(model.model.layers, tokens_of_experts(model), scores.layers):
        for expert, (_, gates, inner) in enumerate(own):
            norms = (gates * (inner @ layer.mlp.experts.down_proj[expert].T)).norm(dim=1)
            assert found["experts"][expert].item() == pytest.approx(norms.mean().item(), rel=1e-4)


def test_activation_sums_weights_times_what_they_read():
    model = tiny_model("mixtral")
    scores = score(calibrated(model, WINDOWS), "activation")
    for layer, own, found in zip(model.model.layers, tokens_of_experts(model), scores.layers):
        for expert, (x, gates, inner) in enumerate(own):
            rows, down = (getattr(layer.mlp.experts, n)[expert].detach() for n in
                          ("gate_up_proj", "down_proj"))  # fmt: skip
            gate, up = (rows.abs() * x.norm(dim=0)).sum(1).chunk(2)
            channels = gate + up + (down.abs() * (gates * inner).norm(dim=0)).sum(0)
            torch.testing.assert_close(found["mlp"][expert].float(), channels, rtol=1e-3, atol=1e-3)
            total = found["experts"][expert].item()
            assert total == pytest.approx(channels.sum().item(), rel=1e-4)


def test_taylor_sums_the_terms_of_experts_and_of_their_channels():
    model = tiny_model("mixtral")
    scores = score(calibrated(model, WINDOWS), "taylor-first")
    expected = [{"experts": torch.zeros(6), "mlp": torch.zeros(6, 32)} for _ in model.model.layers]
    for window in WINDOWS:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for layer, total in zip(model.model.layers, expected, strict=True):
            mlp = layer.mlp
            router, rows, down = (
                (p * p.grad).abs().detach()
                for p in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj)
            )
            total["experts"] += router.sum(1) + rows.sum((1, 2)) + down.sum((1, 2))
            total["mlp"] += rows.sum(2)[:, :32] + rows.sum(2)[:, 32:] + down.sum(1)
    for total, found in zip(expected, scores.layers, strict=True):
        for kind, values in total.items():
            torch.testing.assert_close(found[kind].float(), values / 3, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["activation-maw", "magnitude-l2", "taylor-vector", "random"])
def test_other_criteria_score_experts_and_their_channels(method):
    scores = score(calibrated(tiny_model("qwen3_moe"), WINDOWS), method)
    for index, found in enumerate(scores.layers):
        experts = 0 if index == 1 else 6
        assert found["experts"].shape == (experts,)
        assert found["mlp"].shape == ((6, 32) if experts else (96,))
        assert all(float(values.std()) > 0 for values in found.values() if values.numel())


def test_scores_are_the_same_where_the_model_was_masked_and_shown_again():
    model = tiny_model("mixtral")
    layers = Layers(model)
    before = [p.clone() for p in model.parameters()]
    with preserved(layers), torch.no_grad():
        for _, parameter in layers.outputs(0):
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_shares_count_the_tokens_of_every_expert():
    model = tiny_model("mixtral")
    layers, shares = Layers(model), Shares(Layers(model))
    with shares.watching():
        list(layers.final([WINDOWS], "counting"))
    found, own = shares.complete(ALONE), tokens_of_experts(model)
    for index, counts in enumerate([[len(x) / 48 for x, _, _ in layer] for layer in own]):
        assert found[index] == pytest.approx(counts)


def routed(before: list[float], after: list[float]) -> list[dict[str, object]]:
    return [{"layer": 3, "experts": [0, 2, 5, 7, 8], "before": before, "after": after}]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ([0.3, 0.2, 0.2, 0.2, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2], []),
        ([0.3, 0.2, 0.2, 0.2, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1], ["expert 0 of layer 3 (30% before"]),
        ([0.6, 0.1, 0.1, 0.1, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1], []),  # so it was before
        ([0.3, 0.2, 0.2, 0.2, 0.1], [0.3, 0.3, 0.2, 0.2, 0.001], ["expert 8 of layer 3 (10%"]),
        ([0.001, 0.2, 0.3, 0.3, 0.2], [0.001, 0.2, 0.3, 0.3, 0.2], []),
    ],
)
def test_a_collapse_of_the_routing_is_told(before, after, told):
    found = collapse(routed(before, after))
    assert len(found) == len(told)
    assert all(words in sentence for words, sentence in zip(told, found, strict=True))


MIXTURE = LayerSize({"mlp": SublayerSize(32, 600)})
MLP = LayerSize({"mlp": SublayerSize(96, 100)})


def test_the_cheapest_units_fill_up_what_dear_ones_leave():
    sizes, limits = [MIXTURE, MLP, MIXTURE], Limits()
    for target in (1000, 5000, 12345, 30000):
        removals = allocate(sizes, [1.0] * 3, target, limits)
        assert abs(removed_parameters(sizes, removals) - target) <= 50
        assert abs(removals[0].count("mlp") - removals[2].count("mlp")) <= 1


def test_layers_that_lose_nothing_may_differ_in_the_uniform_layout():
    experts = LayerSize({"experts": SublayerSize(6, 1000, least=2)})
    removals = allocate_same([experts, LayerSize({}), experts], 5000, Limits())
    assert [r.count("experts") for r in removals] in ([2, 0, 2], [3, 0, 3])
    assert Limits().counts(experts, "experts") == range(5)


def test_channels_that_stay_in_an_expert_take_over_for_those_that_go():
    dense = tiny_model("mixtral", layers=1)
    keeps = tuple(tuple(range(expert % 2, 32, 2)) for expert in range(6))
    own = LayerPlan(0, {"attention": (0, 1), "experts": tuple(range(6))}, keeps)
    # few words: what the channels of an expert do on them is correlated
    text, other = (token_ids(24, 32, seed=seed) % 10 for seed in (1, 2))
    plan = Plan(tuple(geometries(dense)), (own,))

    def error(calibration: bool) -> float:
        model = tiny_model("mixtral", layers=1)
        given = calibrated(model, text)
        if calibration:
            compensate(given, plan, random=False)
        else:
            mask(given.layers, plan, None)
        down = model.model.layers[0].mlp.experts.down_proj
        assert not down[0][:, 1::2].any() and down[0][:, ::2].any()
        with torch.no_grad():
            inner = [m.model(input_ids=other).last_hidden_state
                     for m in (dense, model)]  # fmt: skip
        return (inner[0] - inner[1]).square().mean().item()

    assert error(True) < 0.8 * error(False)


def test_what_is_left_of_a_mixture_lets_its_attention_be_refitted():
    dense, model = tiny_model("qwen2_moe"), tiny_model("qwen2_moe")
    layers = []
    for index, size in enumerate(geometries(model)):
        kept = {"attention": (1,), "experts": (0, 2, 4)[: size.experts], "mlp": tuple(range(96))}
        if size.experts:
            kept["mlp"] = ()
        layers.append(LayerPlan(index, kept))
    plan = Plan(tuple(geometries(model)), tuple(layers))
    refits = compensate(calibrated(model, token_ids(16, 32, seed=1)), plan)
    assert [refit.sublayer for refit in refits] == ["attention"] * 4
    assert all(refit.error_after <= refit.error_before for refit in refits)
    apply_plan(model, plan)
    assert torch.isfinite(model(input_ids=WINDOWS).logits).all()
    assert not torch.equal(model(input_ids=WINDOWS).logits, dense(input_ids=WINDOWS).logits)
