"""Pruning in steps: each scores the model as it then is, and the plan alone repeats the result."""

from __future__ import annotations

import pytest
import torch
from counting import keeping
from tiny import TEXT, tiny_model, tiny_tokenizer, token_ids

from fastprune.models.families import geometries
from fastprune.models.layers import Layers
from fastprune.pruning import planning
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.pipeline import prune
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.surgery import apply_plan


@pytest.fixture
def settings(tmp_path, monkeypatch) -> dict[str, object]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    small = {"calib": str(text), "calib_samples": 4, "calib_seq_len": 32}
    return small | {"eval": str(text), "eval_seq_len": 32, "eval_windows": 2}


def uneven(model: torch.nn.Module) -> Plan:
    sizes = tuple(geometries(model))
    thinned = (
        keeping(0, (1, 3), tuple(range(0, 96, 2))),
        keeping(1, (), (5, 6)),
        keeping(2, (0,), ()),
    )
    return Plan(sizes, (*thinned, *keep_all(sizes).layers[3:]))


@pytest.mark.parametrize("windows", [None, token_ids(8, 32)], ids=["masked", "refitted"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_masked_model_computes_what_the_cut_one_does(family: str, windows) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = tiny_model(family, **biases)
    plan, ids = uneven(model), token_ids(2, 17, seed=1)
    layers = Layers(model)
    text = None if windows is None else Calibration(layers, windows)
    dense = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        with preserved(layers):
            mask(layers, plan, text)
            masked = model(ids).logits
        for name, p in model.state_dict().items():
            assert torch.equal(p, dense[name]), name
        mask(layers, plan, text)
        apply_plan(model, plan)
        # only the order of summation differs; logits are of order 10, fp32 has 1e-7 of that
        torch.testing.assert_close(model(ids).logits, masked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("allocation", "compensate"),
    [("uniform", "none"), ("global", "least-squares"), ("search", "least-squares")],
)
def test_the_plan_alone_repeats_the_result(settings, tmp_path, allocation, compensate) -> None:
    models = [tiny_model("qwen2") for _ in range(2)]
    settings = settings | {"compensate": compensate}
    config = PruneConfig(ratio=0.4, iterations=3, allocation=allocation, **settings)
    result = prune(models[0], tiny_tokenizer(), config)
    assert result.metrics["ratio"]["achieved"] == pytest.approx(0.4, abs=0.002)  # half a channel
    result.plan.save(tmp_path / "plan.json")
    prune(models[1], tiny_tokenizer(), PruneConfig(plan=tmp_path / "plan.json", **settings))
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        assert torch.equal(a, b), name


def test_each_step_scores_the_thinned_model(settings, monkeypatch) -> None:
    """Parts of the budget rise evenly; what is gone stays gone, and the weights differ by then."""
    seen, plans = [], []
    real = planning.score

    def score(calibration, *args, **options):
        parameters = calibration.layers.model.parameters()
        seen.append(float(sum(p.detach().double().abs().sum() for p in parameters)))
        return real(calibration, *args, **options)

    make = planning.make_plan

    def make_plan(*args, **options):
        made = make(*args, **options)
        plans.append(made.plan)
        return made

    monkeypatch.setattr(planning, "score", score)
    monkeypatch.setattr("fastprune.pruning.iterate.make_plan", make_plan)
    model = tiny_model("llama")
    config = PruneConfig(ratio=0.6, iterations=3, allocation="global", dry_run=True, **settings)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    prune(model, tiny_tokenizer(), config)
    assert seen[0] > seen[1] > seen[2]
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), name  # a dry run leaves the model alone
    kept = [[set(k.kept["mlp"]) for k in plan.layers] for plan in plans]
    for earlier, later in zip(kept, kept[1:]):
        assert all(b <= a for a, b in zip(earlier, later))
    left = [sum(map(len, layers)) for layers in kept]
    assert left[0] > left[1] > left[2]


def test_one_step_is_what_it_was(settings) -> None:
    plans = [
        prune(
            tiny_model("llama"), tiny_tokenizer(), PruneConfig(ratio=0.3, dry_run=True, **options)
        ).plan
        for options in (settings, settings | {"iterations": 1})
    ]
    assert plans[0] == plans[1]


def test_sublayers_that_are_gone_stay_gone(settings) -> None:
    config = PruneConfig(
        ratio=0.5,
        iterations=2,
        structures=("attention", "mlp", "sublayer"),
        compensate="least-squares",
        **settings,
    )
    model = tiny_model("mistral")
    result = prune(model, tiny_tokenizer(), config)
    left = [(g.kv_heads, g.channels) for g in geometries(model)]
    assert left == [(len(k.kept["attention"]), len(k.kept["mlp"])) for k in result.plan.layers]
    assert result.metrics["ratio"]["achieved"] == pytest.approx(0.5, abs=0.002)  # half a channel
