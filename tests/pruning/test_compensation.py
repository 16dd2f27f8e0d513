"""Compensation against the closed form, and its promise never to make a layer worse."""

from __future__ import annotations

import copy

import pytest
import torch
from calibrated import calibrated
from counting import keeping
from tiny import FAMILIES, VOCABULARY, tiny_model, token_ids

from fastprune.distributed import ALONE
from fastprune.models.families import geometries
from fastprune.models.layers import Layers
from fastprune.pruning import calibration, compensation
from fastprune.pruning.compensation import PROPAGATED, compensate, solve
from fastprune.pruning.moments import Moments, advance, collect, completed, outputs
from fastprune.pruning.plan import Plan, keep_all

WINDOWS = token_ids(64, 32)


def half_plan(model: torch.nn.Module) -> Plan:
    """Layer 1 loses half of everything, layer 2 its MLP; the others stay whole."""
    sizes = tuple(geometries(model))
    layers = list(keep_all(sizes).layers)
    layers[1] = keeping(1, (0, 3), tuple(range(0, 96, 2)))
    layers[2] = keeping(2, (0, 1, 2, 3), ())
    return Plan(sizes, tuple(layers))


def fitted(model: torch.nn.Module) -> list[torch.Tensor]:
    """The batches of 8 that enter a fit: the eighth of the text is held out."""
    return [*WINDOWS.split(8)[:7], *calibrated(model, WINDOWS).random_windows().split(8)]


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_shrink_and_removed_columns_are_zero(family: str) -> None:
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    refits = compensate(calibrated(model, WINDOWS), half_plan(model))
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
    refits = compensate(calibrated(model, WINDOWS), half_plan(model), batch_size=8)
    inputs = []
    linear = dense.model.layers[1].self_attn.o_proj
    linear.register_forward_pre_hook(lambda m, x: inputs.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in fitted(dense):
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


@pytest.mark.parametrize("bias", [False, True])
def test_a_later_sublayer_takes_in_a_share_of_the_propagated_error(bias: bool) -> None:
    model = tiny_model("llama", attention_bias=bias, mlp_bias=bias)
    dense = copy.deepcopy(model)
    refits = compensate(calibrated(model, WINDOWS), half_plan(model), batch_size=8)
    cut, whole = model.model.layers[1], dense.model.layers[1]
    # the dense model, and one with layer 1's attention as it became
    half = copy.deepcopy(dense)
    half.model.layers[1].self_attn.load_state_dict(cut.self_attn.state_dict())
    x, wanted, had = [], [], []
    half.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: x.append(a[0]))
    with torch.no_grad():
        for batch in fitted(dense):
            for states, one in ((wanted, dense), (had, half)):
                out = one.model(input_ids=batch, output_hidden_states=True, use_cache=False)
                states.append(out.hidden_states[2])
    x, wanted, had = (torch.cat(part).flatten(0, 1).double() for part in (x, wanted, had))
    w = whole.mlp.down_proj.weight.detach().double()
    target = x @ w.T + PROPAGATED * (wanted - had)
    kept = torch.arange(0, 96, 2)
    means = x.mean(0) * bias, target.mean(0) * bias
    inputs, goal = (x - means[0])[:, kept], target - means[1]
    h = inputs.T @ inputs
    ridge = refits[1].strength * h.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    expected = torch.linalg.solve(h + ridge, inputs.T @ goal + ridge @ w[:, kept].T).T
    got = cut.mlp.down_proj.weight[:, kept].detach().double()
    # bf16 matrix units may make the inputs: 8 bits, averaged over 1,800 tokens
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    assert not torch.allclose(got, w[:, kept], rtol=0.02, atol=0.02 * w.abs().max().item())
    if bias:
        output = x[:, kept] @ got.T + cut.mlp.down_proj.bias.detach().double()
        mean = (target + whole.mlp.down_proj.bias.detach().double()).mean(0)
        torch.testing.assert_close(
            output.mean(0), mean, rtol=0, atol=0.02 * mean.abs().max().item()
        )


def from_dense(windows: torch.Tensor) -> float:
    """How far a model that lost half of all channels is from the dense one, on unseen text."""
    dense, model = tiny_model("llama"), tiny_model("llama")
    half = [keeping(i, (0, 1, 2, 3), tuple(range(0, 96, 2))) for i in range(4)]
    compensate(calibrated(model, windows), Plan(tuple(geometries(model)), tuple(half)))
    unseen = token_ids(16, 32, seed=5)
    with torch.no_grad():
        states = [m.model(input_ids=unseen).last_hidden_state for m in (model, dense)]
    return (states[0] - states[1]).norm().item()


def test_the_propagated_error_in_the_target_brings_the_end_nearer(monkeypatch) -> None:
    with_it = from_dense(WINDOWS)
    monkeypatch.setattr(compensation, "PROPAGATED", 0.0)
    assert with_it < 0.99 * from_dense(WINDOWS)


def test_random_windows_are_beside_the_text_and_never_judge() -> None:
    model = tiny_model("llama")
    random = calibrated(model, WINDOWS).random_windows()
    assert random.shape == (16, 32)
    assert torch.equal(random, calibrated(model, WINDOWS).random_windows())
    assert 0.9 * VOCABULARY < random.max() + 1 <= VOCABULARY and random.unique().numel() > 200

    def fitting(windows: int, random: bool = True) -> list[tuple[torch.Tensor, bool]]:
        return calibrated(model, WINDOWS[:windows]).fitting(random=random, batch_size=4)

    random = calibrated(model, WINDOWS[:36]).random_windows()
    batches = fitting(36)
    assert torch.equal(torch.cat([ids for ids, _ in batches]), torch.cat([WINDOWS[:36], random]))
    assert [n for n, (_, held_out) in enumerate(batches) if held_out] == [7, 8]  # of 9 and 3
    assert [held_out for _, held_out in fitting(4)] == [True, True]
    assert [held_out for _, held_out in fitting(3)] == [True]
    assert not any(held_out for _, held_out in fitting(36, random=False)[:7])
    assert len(fitting(36, random=False)) == 9


def test_random_windows_begin_as_those_of_the_text() -> None:
    windows = WINDOWS.clone()
    windows[:, :2] = torch.tensor([7, 9])
    random = calibrated(tiny_model("llama"), windows).random_windows()
    assert random[:, :2].tolist() == len(random) * [[7, 9]]
    assert len(random[:, 2].unique()) > 1


def test_random_windows_hold_a_refit_where_the_text_says_nothing(monkeypatch) -> None:
    narrow = WINDOWS % 4  # text of four of the words
    with_them = from_dense(narrow)
    monkeypatch.setattr(calibration, "TEXT_PER_RANDOM", 10_000)
    assert with_them < 0.95 * from_dense(narrow)


def test_a_layer_that_does_more_than_add_has_no_targets() -> None:
    model = tiny_model("llama")
    layers = Layers(model)
    states = layers.embed([WINDOWS[:4]])
    layer = model.model.layers[0]
    both = [layer.self_attn.o_proj, layer.mlp.down_proj]
    assert list(advance(layers, 0, [states[0].clone()], both)) == both
    layer.mlp.register_forward_hook(lambda m, a, output: output / output.norm(dim=-1, keepdim=True))
    assert advance(layers, 0, states, both) == {}
    refits = compensate(calibrated(model, WINDOWS), half_plan(model))
    assert all(r.error_after <= r.error_before for r in refits)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_tokens_count_as_a_norm_behind_the_output_sees_them(family: str) -> None:
    """What a refit fits, put through the norm, is what the layer adds."""
    layers = Layers(tiny_model(family, layers=2))
    layer = layers.modules[0]
    for behind in outputs(layer):
        assert behind.added is not behind.linear and behind.gain is not None
        x = (
            torch.randn(3, 5, behind.linear.in_features)
            * torch.tensor([0.1, 1.0, 50.0])[:, None, None]
        )
        norm = behind.added(behind.linear(x))
        seen, target = behind.seen(x, norm)
        torch.testing.assert_close(behind.linear(seen) * behind.gain, norm, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(target * behind.gain, norm, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "llama"])
def test_the_dense_states_lack_nothing(family: str) -> None:
    """Where the hidden states are the dense model's, the target is the layer's own output."""
    layers = Layers(tiny_model(family, layers=2))
    linears = [behind.linear for behind in outputs(layers.modules[0])]
    states = layers.embed([WINDOWS[:8], WINDOWS[8:16]], torch.device("cpu"))
    after = advance(layers, 0, [hidden.clone() for hidden in states], linears)
    assert list(after) == linears
    found = completed(collect(layers, 0, linears, states, [False, True], after), ALONE)
    for linear, (moments, _) in found.items():
        lacking = moments.cross - linear.weight @ moments.squares
        assert lacking.norm() < 1e-3 * moments.cross.norm()


@pytest.mark.parametrize(("family", "scale"), [("llama", 1.0), ("granite", 0.6), ("cohere2", 1.0)])
def test_targets_lead_to_the_hidden_states_of_the_dense_model(family: str, scale: float) -> None:
    """One sublayer behind the other, both side by side, and outputs that are scaled."""
    model = tiny_model(family)
    layers = Layers(model)
    layer = model.model.layers[0]
    both = [layer.self_attn.o_proj, layer.mlp.down_proj]
    (dense,) = layers.embed([WINDOWS[:4]])
    changed = dense + torch.randn_like(dense) / 4
    after = advance(layers, 0, [dense.clone()], both)
    found = completed(collect(layers, 0, both, [changed], [False], after), ALONE)
    seen: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        m.register_forward_hook(lambda m, inputs, output: seen.update({m: (inputs[0], output)}))
        for m in both
    ]
    with torch.no_grad():
        end = layers.run(0, dense)
        middle = dense + scale * seen[both[0]][1]
        layers.run(0, changed)
    for handle in handles:
        handle.remove()
    start = changed
    for linear, goal in zip(both, (middle, end)):
        x, output = (t.flatten(0, 1) for t in seen[linear])
        target = ((goal - start) / scale).flatten(0, 1)
        cross = found[linear][0].cross
        # 128 products of order 1 to 100 in fp32
        torch.testing.assert_close(
            cross, target.T @ x, rtol=1e-4, atol=1e-5 * cross.abs().max().item()
        )
        start = start + scale * output.view_as(start)


@pytest.mark.parametrize("columns", [1, 3, 4, 10, 64])
def test_moments_are_whole_and_symmetric(columns: int) -> None:
    moments = Moments(torch.nn.Linear(columns, 2), targets=True)
    x, target = torch.randn(50, columns), torch.randn(50, 2)
    for some in (slice(20), slice(20, 50)):
        moments.add(x[some], target[some])
    moments.complete(ALONE)
    # 50 products of order 1 in fp32
    torch.testing.assert_close(moments.squares, x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.cross, target.T @ x, rtol=1e-5, atol=1e-4)


def test_bias_takes_the_mean() -> None:
    moments = Moments(torch.nn.Linear(3, 2))
    x = torch.randn(50, 3) + 5
    moments.add(x[:20])
    moments.add(x[20:].view(2, 15, 3))
    moments.complete(ALONE)
    centred = x - x.mean(0)
    # fp32 sums of squares of numbers around 5: cancellation costs three digits
    torch.testing.assert_close(moments.centred(), centred.T @ centred, rtol=1e-3, atol=1e-2)
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    refits = compensate(calibrated(model, WINDOWS), half_plan(model))
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
        compensate(calibrated(model, WINDOWS), half_plan(model))
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    refits = compensate(calibrated(model, WINDOWS), half_plan(model))
    assert all(r.error_after <= r.error_before for r in refits)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
