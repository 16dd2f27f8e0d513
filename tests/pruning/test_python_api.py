"""The Python face: `fastprune.prune` on a model in memory, and the kernels alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer

import fastprune
from fastprune.models.families import geometries


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    return {
        "calib": str(text),
        "calib_samples": 4,
        "calib_seq_len": 32,
        "eval": str(text),
        "eval_seq_len": 32,
        "eval_windows": 2,
    }


@pytest.mark.parametrize("compensate", ["none", "least-squares"])
def test_prune_in_memory(settings: dict, compensate: str) -> None:
    model = tiny_model("llama")
    config = fastprune.PruneConfig(ratio=0.3, compensate=compensate, **settings)
    result = fastprune.prune(model, tiny_tokenizer(), config)
    assert isinstance(result, fastprune.PruneResult)
    assert result.model is model
    assert geometries(model) == result.plan.result()
    assert result.metrics["ratio"]["achieved"] == pytest.approx(0.3, abs=0.002)  # half a channel
    params = result.metrics["params"]
    assert params["after"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("allocation", ["uniform", "inverse", "proportional", "global", "search"])
@pytest.mark.parametrize(
    "structures", [("attention",), ("mlp",), ("attention", "mlp")], ids="+".join
)
def test_every_allocation(
    settings: dict, tmp_path: Path, monkeypatch, allocation: str, structures: tuple[str, ...]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_model("mistral")
    attention, mlp = 4 * 6 * 16 * 64, 3 * 96 * 64  # 2 q, k, v, 2 o heads of 16; gate, up, down
    share = sum({"attention": attention, "mlp": mlp}[s] for s in structures) / (attention + mlp)
    config = fastprune.PruneConfig(
        ratio=0.3 * share, allocation=allocation, structures=structures, **settings
    )
    plan = fastprune.prune(model, tiny_tokenizer(), config).plan
    units = {"mlp": mlp // 96, "attention": attention // 4}
    finest = units["mlp" if "mlp" in structures else "attention"]
    removed = sum(
        units["mlp"] * (96 - len(k.kept["mlp"]))
        + units["attention"] * (4 - len(k.kept["attention"]))
        for k in plan.layers
    )
    block = sum(p.numel() for p in tiny_model("mistral").model.layers.parameters())
    assert abs(removed - 0.3 * share * block) <= finest / 2 + 1  # the target is a whole number
    for kept in plan.layers:
        assert kept.kept["attention"] and kept.kept["mlp"]
        assert "attention" in structures or len(kept.kept["attention"]) == 4
        assert "mlp" in structures or len(kept.kept["mlp"]) == 96


def test_alpha_evens_out_the_layers_of_global(settings: dict) -> None:
    """Layer 0 writes ten times as much as it did: its channels stay, unless layers are alike."""
    lost = {}
    for alpha in (1.0, 0.0):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(10)
        config = fastprune.PruneConfig(
            ratio=0.2,
            allocation="global",
            alpha=alpha,
            importance="magnitude-l2",
            structures=("mlp",),
            **settings,
        )
        plan = fastprune.prune(model, tiny_tokenizer(), config).plan
        sizes = zip(plan.geometries, plan.layers, strict=True)
        lost[alpha] = [size.channels - len(kept.kept["mlp"]) for size, kept in sizes]
    assert lost[1.0][0] == 0 < lost[1.0][1]
    assert lost[0.0][0] >= lost[0.0][1] / 2


def test_a_plan_reused_gives_the_same_model(settings: dict, tmp_path: Path) -> None:
    models = [tiny_model("qwen3") for _ in range(2)]
    config = fastprune.PruneConfig(ratio=0.25, compensate="least-squares", **settings)
    result = fastprune.prune(models[0], tiny_tokenizer(), config)
    result.plan.save(tmp_path / "plan.json")
    again = fastprune.PruneConfig(
        plan=tmp_path / "plan.json", compensate="least-squares", **settings
    )
    fastprune.prune(models[1], tiny_tokenizer(), again)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        assert torch.equal(a, b), name


def test_the_kernels_alone() -> None:
    w, g = torch.randn(6, 5), torch.randn(6, 5)
    rows, columns = fastprune.taylor_scores(w, g, kind="first")
    # fp32 sums of five and six terms
    torch.testing.assert_close(rows, (w * g).abs().sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(columns, (w * g).abs().sum(0), rtol=1e-6, atol=1e-6)
    weight = torch.nn.Parameter(w.clone())
    weight.grad = g
    fastprune.AdamW([weight], lr=0.1).step()
    assert not torch.equal(weight, w)


@pytest.mark.parametrize(
    "first", ["fastprune", "fastprune.pruning.config", "fastprune.pruning.pipeline"]
)
def test_prune_is_callable_whatever_was_imported_first(first: str) -> None:
    code = f"import {first}, fastprune; assert callable(fastprune.prune)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light() -> None:
    code = "import fastprune, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
