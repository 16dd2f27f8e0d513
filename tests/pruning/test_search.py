"""Search: the cheapest mix is found, budgets hold, and measured curves mean what they say."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from calibrated import calibrated
from counting import less, sized
from tiny import tiny_model, tiny_tokenizer, token_ids

from fastprune.models.families import decoder_layers
from fastprune.pruning import divergence, pipeline, planning
from fastprune.pruning.budget import layer_size
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.curves import Search, judging, measure_curves
from fastprune.pruning.divergence import DenseTargets
from fastprune.pruning.importance import score
from fastprune.pruning.search import Curve, choose, predicted
from fastprune.pruning.sizes import Limits, removed_parameters
from fastprune.pruning.texts import run_windows, with_lengths
from fastprune.report.summary import divergence_line

SIZE = sized(groups=3, group_cost=300, channels=100, channel_cost=10)


def curves_of(steepness: list[float]) -> list[Curve]:
    """Quadratic channel curves and steep group curves of layers with the given steepness."""
    points = (0, 25, 50, 75)
    return [
        curve
        for i, s in enumerate(steepness)
        for curve in (
            Curve(i, "attention", (0, 1, 2), (0.0, 3 * s, 9 * s)),
            Curve(i, "mlp", points, tuple(s * (p / 100) ** 2 for p in points)),
        )
    ]


def test_a_curve_between_and_beyond_its_levels() -> None:
    curve = Curve(0, "mlp", (10, 20, 40), (0.0, 1.0, 2.0))
    expected = {10: 0.0, 15: 0.5, 30: 1.5, 40: 2.0, 50: 2.5, 9: math.inf}
    assert {n: curve.at(n) for n in expected} == pytest.approx(expected)
    single = Curve(0, "mlp", (10,), (0.0,))
    assert [single.at(n) for n in (9, 10, 11)] == [math.inf, 0.0, math.inf]


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.3])
def test_budget_is_met_to_half_a_channel(ratio: float) -> None:
    sizes = [SIZE] * 6
    target = round(ratio * sum(s.prunable for s in sizes))
    curves = curves_of([1.0, 0.2, 0.5, 2.0, 0.1, 1.5])
    removals, prediction = choose(curves, sizes, target, Limits())
    assert abs(removed_parameters(sizes, removals) - target) <= SIZE.finest.cost / 2
    assert prediction == predicted(curves, removals)
    flat, steep = removals[4], removals[3]
    assert flat.count("mlp") >= steep.count("mlp")


def test_no_mix_on_the_grid_is_cheaper() -> None:
    sizes = [SIZE] * 3
    curves = curves_of([1.0, 0.3, 0.05])
    target = 600
    _, prediction = choose(curves, sizes, target, Limits())
    levels = [less(g, c) for g in range(2) for c in range(0, 76, 5)]
    mixes = [
        list(mix)
        for mix in itertools.product(levels, repeat=3)
        if removed_parameters(sizes, list(mix)) >= target
    ]
    # The program's own levels are 3 channels apart: half a step of the flattest curve.
    assert prediction <= min(predicted(curves, mix) for mix in mixes) * 1.02


def test_limits_of_a_layer_hold() -> None:
    sizes = [SIZE] * 3
    target = round(0.25 * sum(s.prunable for s in sizes))
    removals, _ = choose(curves_of([1.0, 1.0, 1e-6]), sizes, target, Limits(highest=0.3))
    shares = [removed_parameters([SIZE], [r]) / SIZE.prunable for r in removals]
    assert max(shares) <= 0.3 + SIZE.finest.cost / SIZE.prunable


def test_divergence_is_kullback_leibler() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=False)  # fewer words than are kept: nothing is merged
    dense, changed = torch.randn(2, 2, 5, 16, generator=generator)
    targets = DenseTargets()
    targets.append(dense, head)
    with torch.no_grad():
        p, q = (torch.log_softmax(head(x), -1) for x in (dense, changed))
    expected = (p.exp() * (p - q)).sum()
    # logits may come from bf16 matrix units: 8 bits
    assert targets.divergence(0, changed, head) == pytest.approx(expected.item(), rel=0.03)
    assert targets.divergence(0, dense, head) == pytest.approx(
        0, abs=1e-5
    )  # fp32 rounding, 10 tokens


@pytest.fixture
def measured(tmp_path: Path):
    model = tiny_model("llama")
    windows = token_ids(16, 32)
    scores = score(calibrated(model, windows), "magnitude-l2")
    sizes = [layer_size(layer, ("attention", "mlp")) for layer in decoder_layers(model)]
    return model, Search(calibrated(model, windows), scores, cache=tmp_path / "levels"), sizes


def test_curves_rise_and_leave_the_model_alone(measured) -> None:
    model, search, sizes = measured
    before = {name: p.clone() for name, p in model.state_dict().items()}
    curves = measure_curves(search, sizes)
    assert [(c.layer, c.kind) for c in curves] == [
        (i, kind) for i in range(4) for kind in ("attention", "mlp")
    ]
    for curve in curves:
        assert curve.removed[0] == 0 and curve.divergence[0] == 0
        assert list(curve.divergence) == sorted(curve.divergence)
        assert curve.divergence[-1] > 0
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_curves_of_half_precision_weights(measured, dtype) -> None:
    model, search, sizes = measured
    text = calibrated(model.to(dtype), search.calibration.windows)
    for curve in measure_curves(Search(text, search.scores), sizes):
        assert all(0 <= value < 100 for value in curve.divergence)


def test_a_cached_search_measures_nothing_again(measured, monkeypatch) -> None:
    _, search, sizes = measured
    first = measure_curves(search, sizes)
    monkeypatch.setattr(
        DenseTargets, "divergence", lambda *_: pytest.fail("measured although it was cached")
    )
    assert measure_curves(search, sizes) == first


def test_a_cache_of_another_model_is_not_used(measured) -> None:
    model, search, sizes = measured
    first = measure_curves(search, sizes)
    model.model.layers[0].mlp.down_proj.weight.data *= 2
    assert measure_curves(search, sizes) != first


def test_the_run_says_what_was_foreseen_and_what_came(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(divergence, "TOP", 10**6)  # of the whole vocabulary
    monkeypatch.setattr(divergence, "EVERY", 1)  # at every token
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 400)
    settings = {
        "ratio": 0.3, "allocation": "search", "compensate": "least-squares",
        "calib": str(text), "eval": str(text), "calib_samples": 24, "search_samples": 16,
        "calib_seq_len": 32, "eval_seq_len": 32, "eval_windows": 2,
    }  # fmt: skip
    searched = []

    def measured(search, *args):
        searched.append(search.calibration.windows)
        return measure_curves(search, *args)

    monkeypatch.setattr(planning, "measure_curves", measured)
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    result = pipeline.prune(model, tiny_tokenizer(), PruneConfig(**settings))
    found = result.metrics["divergence"]
    assert 0 < found["predicted"] < math.inf
    _, windows = run_windows(
        with_lengths(PruneConfig(**settings), dense), dense, tiny_tokenizer(), calibrate=True
    )
    assert torch.equal(searched[0], windows[:16])
    with torch.no_grad():
        logs = [m(judging(windows[:16])).logits.double().log_softmax(-1) for m in (dense, model)]
    whole = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()
    assert found["actual"] == pytest.approx(whole, rel=2e-3)
    assert f"{found['actual']:.4f} measured" in divergence_line(result.metrics)
    repeated = PruneConfig(**settings | {"ratio": None}, plan=tmp_path / "plan.json")
    result.plan.save(repeated.plan)
    assert "divergence" not in pipeline.prune(dense, tiny_tokenizer(), repeated).metrics
