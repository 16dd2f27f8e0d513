"""`--structures sublayer`: what goes, what is saved, and that nothing else changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from calibrated import calibrated
from safetensors import safe_open
from tiny import FAMILIES, TEXT, tiny_checkpoint, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from fastprune.errors import InputError
from fastprune.inspect.perplexity import evaluate
from fastprune.models.families import block_parameters, decoder_layers, sublayers
from fastprune.models.modeling import remove_sublayer
from fastprune.models.streamed import StreamedModel
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.pipeline import PruneResult, run_prune
from fastprune.pruning.sublayers import mean_loss, sublayer_losses, without


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Prune the folder `model` (or another one) with small settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)

    def prune(source: Path, out: str = "out", **settings) -> PruneResult:
        small = {"calib": str(text), "calib_samples": 4, "calib_seq_len": 32}
        small |= {"eval": str(text), "eval_seq_len": 32, "eval_windows": 2, "quiet": True}
        return run_prune(PruneConfig(model=str(source), out=tmp_path / out, **small | settings))

    return prune


def saved_parameters(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_model_without_the_sublayer(family: str) -> None:
    windows = token_ids(2, 16)
    model = tiny_model(family)
    losses = sublayer_losses(calibrated(model, windows))
    dense = mean_loss(calibrated(model, windows))
    for index, own in enumerate(losses):
        for kind in ("attention", "mlp"):
            cut = copy.deepcopy(model)
            remove_sublayer(cut.model.layers[index], kind, "llama")
            # the same operations on the same shapes; only the sum over windows differs, in fp64
            assert mean_loss(calibrated(cut, windows)) - dense == pytest.approx(own[kind], abs=1e-9)


def test_the_model_is_whole_again() -> None:
    model = tiny_model("llama")
    before = model(token_ids()).logits
    sublayer_losses(calibrated(model, token_ids(1, 8)))
    layer = model.model.layers[0]
    with pytest.raises(RuntimeError, match="stop"), without(layer, sublayers(layer)[0]):
        raise RuntimeError("stop")
    assert torch.equal(model(token_ids()).logits, before)


def test_streamed_losses_are_the_same(tmp_path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "qwen2", tied=False)
    windows = token_ids(3, 16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sublayer_losses(calibrated(model, windows)) == sublayer_losses(
        Calibration(StreamedModel(folder), windows)
    )


@pytest.mark.parametrize(
    ("family", "allocation"), [*((family, "uniform") for family in FAMILIES), ("qwen2", "search")]
)
def test_depth_alone(run, tmp_path, family: str, allocation: str) -> None:
    """Whole sublayers go and nothing else; what metrics say is what the files hold."""
    source = tiny_checkpoint(tmp_path / "model", family)
    result = run(source, ratio=0.3, structures=("sublayer",), allocation=allocation)
    kept = [(len(k.kept["attention"]), len(k.kept["mlp"])) for k in result.plan.layers]
    assert {groups for groups, _ in kept} <= {0, 4} and {c for _, c in kept} <= {0, 96}
    assert sum(groups == 0 for groups, _ in kept) + sum(c == 0 for _, c in kept) > 0
    # an attention is 40 % of a tiny layer, a layer 25 % of the blocks
    assert result.metrics["ratio"]["achieved"] == pytest.approx(0.3, abs=0.2 * 0.25 + 0.01)
    params = result.metrics["params"]
    assert params["after"] == saved_parameters(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert block_parameters(loaded) == params["block_after"]
    windows = token_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, result.model.cpu()(windows).logits)


def test_biases_are_counted(run, tmp_path) -> None:
    """An o bias or a down bias belongs to no unit, and leaves with its sublayer."""
    source = tiny_checkpoint(tmp_path / "model", "llama", attention_bias=True, mlp_bias=True)
    result = run(source, ratio=0.4, structures=("sublayer",), compensate="least-squares")
    assert result.metrics["params"]["after"] == saved_parameters(tmp_path / "out")


@pytest.mark.parametrize(
    ("allocation", "structures"),
    [
        ("uniform", ("attention", "sublayer")),
        ("search", ("attention", "sublayer")),
        ("inverse", ("mlp", "sublayer")),
        ("proportional", ("attention", "mlp", "sublayer")),
        ("global", ("attention", "mlp", "sublayer")),
        ("search", ("attention", "mlp", "sublayer")),
    ],
)
def test_whole_and_thinned_meet_the_budget(run, tmp_path, allocation, structures) -> None:
    source = tiny_checkpoint(tmp_path / "model", "qwen3")
    result = run(source, ratio=0.45, structures=structures, allocation=allocation)
    block = result.metrics["params"]["block_before"]
    removed = block - result.metrics["params"]["block_after"]
    channel, group = 3 * 64, 6 * 16 * 64
    half = (channel if "mlp" in structures else group) / 2
    assert abs(removed - 0.45 * block) <= half + 1  # the target is a whole number
    assert result.metrics["params"]["after"] == saved_parameters(tmp_path / "out")
    for kept in result.plan.layers:
        assert "mlp" in structures or len(kept.kept["mlp"]) in (0, 96)


def test_more_than_thinning_can_do(run, tmp_path) -> None:
    """92 % are out of reach of thinning, which leaves a tenth; with sublayers they go."""
    source = tiny_checkpoint(tmp_path / "model", layers=8)
    with pytest.raises(InputError, match="cannot be reached"):
        run(source, ratio=0.92)
    result = run(source, ratio=0.92, structures=("attention", "mlp", "sublayer"))
    assert result.metrics["ratio"]["achieved"] == pytest.approx(0.92, abs=0.001)  # half a channel


def test_layers_outside_the_selection_stay(run, tmp_path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    result = run(source, ratio=0.2, structures=("sublayer",), layers="1:3")
    for index in (0, 3):
        kept = result.plan.layers[index]
        assert (len(kept.kept["attention"]), len(kept.kept["mlp"])) == (4, 96)


def test_a_depth_plan_streamed_is_the_same(run, tmp_path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "qwen2")
    settings = {"ratio": 0.3, "structures": ("sublayer",)}
    memory, streamed = run(source, "a", **settings), run(source, "b", stream=True, **settings)
    assert memory.plan == streamed.plan
    for key in ("params", "perplexity", "layers", "bytes"):
        assert memory.metrics[key] == streamed.metrics[key]


@pytest.mark.parametrize("compensate", ["none", "least-squares"])
def test_a_plan_reused_gives_the_identical_model(run, tmp_path, compensate: str) -> None:
    source = tiny_checkpoint(tmp_path / "model", "mistral")
    settings = {"compensate": compensate, "structures": ("attention", "mlp", "sublayer")}
    first = run(source, ratio=0.5, allocation="search", **settings)
    again = run(source, "again", plan=tmp_path / "out/fastprune/plan.json", **settings)
    assert again.plan == first.plan
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert first.metrics["perplexity"] == again.metrics["perplexity"]


def test_refusals(run, tmp_path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    both = {"structures": ("mlp", "sublayer"), "ratio": 0.2}
    for settings, words in (
        ({**both, "layout": "uniform"}, "--layout uniform"),
        ({"structures": ("sublayer",), "ratio": 0.97}, "cannot be reached"),
    ):
        with pytest.raises(InputError, match=words):
            run(source, **settings)
    assert not (tmp_path / "out").exists()


def test_the_perplexity_is_that_of_the_saved_model(run, tmp_path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    run(source, ratio=0.3, structures=("sublayer",))
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(decoder_layers(loaded)) <= 4
    assert metrics["perplexity"][0]["after"] > 1
    assert evaluate(loaded, token_ids(2, 16)).perplexity > 1
