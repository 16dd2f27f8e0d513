"""A streamed run against the run in memory: the same plan, weights and perplexities, bit for bit.

Both make the same operations on the same shapes in the same order, so every comparison is exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import keeping
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, TEXT, VOCABULARY, tiny_checkpoint, tiny_model, tiny_tokenizer, token_ids
from transformers import AutoModelForCausalLM

from fastprune.errors import GateError, InputError, NumericalError
from fastprune.inspect.perplexity import evaluate, evaluate_layers
from fastprune.models.families import decoder_layers, geometries
from fastprune.models.layers import Layers, OffloadedLayers
from fastprune.models.load import load_model
from fastprune.models.streamed import StreamedModel
from fastprune.pruning.budget import layer_size
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.curves import Search, measure_curves
from fastprune.pruning.importance import METHODS, Scores, score
from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.pipeline import PruneResult, carry_out, prune, run_prune
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.run import PruneRun
from fastprune.pruning.sensitivity import activation, removal
from fastprune.pruning.sublayers import mean_loss, sublayer_losses
from fastprune.report.run import Clock

WINDOWS = token_ids(3, 16)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 40)
    return str(file)


@pytest.fixture
def both(tmp_path, text):
    """Run `prune` on a folder in memory and streamed; returns both results."""

    def run(source: Path, **settings: Any) -> tuple[PruneResult, PruneResult]:
        small = {"calib": text, "calib_samples": 4, "calib_seq_len": 32, "sensitivity_samples": 2}
        small |= {"eval": text, "eval_seq_len": 32, "eval_windows": 3, "quiet": True}
        small |= {"model": str(source), "device": "cpu"} | settings
        return tuple(
            run_prune(PruneConfig(**small, stream=streamed, out=tmp_path / name))
            for name, streamed in (("memory", False), ("stream", True))
        )

    return run


def assert_same(one: PruneResult, other: PruneResult) -> None:
    """Plans, metrics and every file of the two checkpoints are equal."""
    assert one.plan == other.plan
    assert one.layer_importance == other.layer_importance
    for key in ("params", "ratio", "perplexity", "layers"):
        assert one.metrics[key] == other.metrics[key]
    assert one.out is not None and other.out is not None
    files = {file.relative_to(one.out) for file in one.out.rglob("*")}
    assert files == {file.relative_to(other.out) for file in other.out.rglob("*")}
    for name in ("config.json", "generation_config.json", "fastprune/plan.json"):
        assert (one.out / name).read_text() == (other.out / name).read_text()
    weights = [load_file(out / "model.safetensors") for out in (one.out, other.out)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.dtype == weights[1][name].dtype
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(both, tmp_path, family, tied):
    source = tiny_checkpoint(tmp_path / "model", family, tied=tied)
    memory, streamed = both(source, ratio=0.3, allocation="global")
    assert_same(memory, streamed)
    logits = [
        AutoModelForCausalLM.from_pretrained(result.out)(input_ids=WINDOWS).logits
        for result in (memory, streamed)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "inverse"},
        {"allocation": "proportional", "structures": ("mlp",), "layers": "1:3", "ratio": 0.15},
        {"importance": "activation", "layout": "uniform"},
        {"importance": "magnitude-l2", "dtype": "bfloat16"},
        {"importance": "random", "dtype": "float16", "seed": 3},
        {"compensate": "least-squares"},
        {"compensate": "least-squares", "dtype": "bfloat16"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_settings(both, tmp_path, settings):
    source = tiny_checkpoint(tmp_path / "model", "qwen2", tied=False)
    assert_same(*both(source, **{"ratio": 0.3} | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "search", "exchange_rounds": 2},
        {"allocation": "search", "exchange_rounds": 2, "compensate": "none", "align": 8},
        {"allocation": "search", "structures": ("attention", "mlp", "sublayer")},
        {"structures": ("sublayer",)},
        {"structures": ("attention", "mlp", "sublayer"), "allocation": "global", "ratio": 0.5},
        {"iterations": 2, "allocation": "global"},
        {"iterations": 2, "allocation": "search", "exchange_rounds": 1, "dtype": "bfloat16"},
        {"iterations": 2, "structures": ("mlp", "sublayer"), "importance": "taylor-first"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_plans_tried_out(both, tmp_path, monkeypatch, settings):
    """Thinned weights are laid over those on disk: the run decides what it does in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tiny_checkpoint(tmp_path / "model", "qwen2", tied=False)
    some = {"ratio": 0.3, "structures": ("attention", "mlp"), "calib_samples": 16}
    memory, streamed = both(source, **some | settings)
    assert_same(memory, streamed)
    assert memory.metrics["ratio"]["achieved"] > 0.2
    assert memory.metrics.get("divergence") == streamed.metrics.get("divergence")


def test_several_files_and_a_generation_config(both, tmp_path):
    model = tiny_model("llama", tied=False)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert_same(*both(tmp_path / "model", ratio=0.3))


@pytest.mark.parametrize("compensate", ["none", "least-squares"])
def test_removed_sublayers(both, tmp_path, compensate):
    """Uneven ones give a per-layer checkpoint, a whole layer a stock one with fewer layers."""
    source = tiny_checkpoint(tmp_path / "model", "qwen3")
    whole = keep_all(geometries(tiny_model("qwen3")))
    uneven = keeping(0, (), (1, 5)), keeping(1, (1, 2), ()), keeping(2, (), ())
    for changed in (uneven, (keeping(0, (), ()),)):
        layers = (*changed, *whole.layers[len(changed) :])
        Plan(whole.geometries, layers).save(tmp_path / "plan.json")
        settings = {"plan": tmp_path / "plan.json", "compensate": compensate, "overwrite": True}
        assert_same(*both(source, **settings))


def test_a_pruned_model_again(both, tmp_path):
    source = tiny_checkpoint(tmp_path / "model", "llama")
    first, _ = both(source, ratio=0.3, allocation="global")
    assert first.out is not None
    first.out.rename(tmp_path / "again")
    again = {"ratio": 0.2, "allocation": "uniform", "overwrite": True}
    assert_same(*both(tmp_path / "again", **again))


def sources(folder: Path, dtype: str = "auto") -> dict[str, Layers]:
    """The model in ``folder`` resident, on disk, and on the host beside its device."""
    resident, host = (load_model(folder, dtype=dtype, device="cpu")[0] for _ in range(2))
    return {
        "resident": Layers(resident),
        "disk": StreamedModel(folder, dtype=dtype),
        "offloaded": OffloadedLayers(host, torch.device("cpu")),
    }


def same_scores(one: Scores, other: Scores) -> bool:
    return all(
        torch.equal(units[kind], again[kind])
        for units, again in zip(one.layers, other.layers, strict=True)
        for kind in units
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_source_measures_the_same(tmp_path, dtype):
    folder = tiny_checkpoint(tmp_path / "model", "qwen3", tied=False)
    resident, *others = (Calibration(s, WINDOWS) for s in sources(folder, dtype).values())
    for method in METHODS:
        expected = score(resident, method)
        for other in others:
            assert same_scores(score(other, method), expected), method
    for measure in (removal, activation, sublayer_losses, mean_loss):
        expected = measure(resident)
        assert [measure(other) for other in others] == [expected] * len(others), measure
    expected = evaluate(resident.layers.model, WINDOWS).perplexity
    for calibration in (resident, *others):
        assert evaluate_layers(calibration.layers, WINDOWS).perplexity == expected


@pytest.mark.parametrize("refits", [True, False])
def test_a_plan_on_trial_is_laid_over_the_weights(tmp_path, refits):
    """Every source computes as the thinned model does inside, and as the dense one afterwards."""
    whole = keep_all(geometries(tiny_model("qwen2")))
    cut = keeping(1, (1, 2), (0, 7, 9)), keeping(2, (), (3,))
    plan = Plan(whole.geometries, (whole.layers[0], *cut, whole.layers[3]))
    found = []
    folder = tiny_checkpoint(tmp_path / "model", "qwen2", attention_bias=True)
    for layers in sources(folder).values():
        text = Calibration(layers, token_ids(8, 16))
        dense = mean_loss(text)
        with preserved(layers) as outputs:
            mask(layers, plan, text if refits else None)
            thinned, scores = mean_loss(text), score(text, "taylor-first")
            with preserved(layers):
                mask(layers, whole, None)  # what is thinned stays so
                mask(layers, keep_one(whole), None)
                assert mean_loss(text) != thinned
            assert mean_loss(text) == thinned
            outputs.restore()
            assert mean_loss(text) == dense
        found.append((dense, thinned, scores))
    for _, thinned, scores in found[1:]:
        assert thinned == found[0][1] != found[0][0]
        assert same_scores(scores, found[0][2])


def keep_one(whole: Plan) -> Plan:
    """One unit of every sublayer."""
    return Plan(whole.geometries, tuple(keeping(k.index, (0,), (0,)) for k in whole.layers))


def test_an_offloaded_model_is_cut_like_a_resident_one(tmp_path, text, monkeypatch):
    """Each layer is moved to the device for its turn: once a pass, and the weights stay behind."""
    moved: list[str] = []
    fetch = OffloadedLayers.fetch

    def counted(layers: OffloadedLayers, name: str) -> torch.Tensor:
        moved.append(name)
        return fetch(layers, name)

    monkeypatch.setattr(OffloadedLayers, "fetch", counted)
    small = {"calib": text, "calib_samples": 8, "calib_seq_len": 32, "sensitivity_samples": 2}
    small |= {"eval": text, "eval_seq_len": 32, "eval_windows": 3, "quiet": True, "ratio": 0.3}
    config = PruneConfig(**small, structures=("attention", "mlp"), allocation="global")
    resident, host = tiny_model("llama"), tiny_model("llama")
    layers = OffloadedLayers(host, torch.device("cpu"))
    place = {name: parameter.data_ptr() for name, parameter in host.named_parameters()}
    score(Calibration(layers, WINDOWS), "activation")
    names = [name for name, _ in host.named_parameters() if name != "model.norm.weight"]
    assert sorted(moved) == sorted(names)
    score(Calibration(layers, WINDOWS), "taylor-first")
    assert {name: p.data_ptr() for name, p in host.named_parameters()} == place
    one = prune(resident, tiny_tokenizer(), config)
    other = carry_out(PruneRun(layers, tiny_tokenizer(), config, Clock()))
    assert one.plan == other.plan and one.metrics["perplexity"] == other.metrics["perplexity"]
    for (name, a), b in zip(resident.named_parameters(), host.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_one_layer_at_a_time(tmp_path):
    """While scores are taken, and levels are measured and refitted for a search, only one layer, or
    the embeddings, or the head has values."""
    source = StreamedModel(tiny_checkpoint(tmp_path / "model", "llama", tied=False))
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        present = sum(p.numel() for p in source.model.parameters() if not p.is_meta)
        most = max(most, present)

    for module in source.model.modules():
        module.register_forward_pre_hook(look)
    score(Calibration(source, WINDOWS), "taylor-first")
    removal(Calibration(source, WINDOWS))
    sublayer_losses(Calibration(source, WINDOWS))
    sizes = [layer_size(layer, ("attention", "mlp")) for layer in decoder_layers(source.model)]
    text = Calibration(source, WINDOWS)
    measure_curves(Search(text, score(text, "magnitude-l2")), sizes)
    largest = max(
        VOCABULARY * 64, sum(p.numel() for p in decoder_layers(source.model)[0].parameters())
    )
    assert most == largest + 64  # the final norm stays
    assert all(p.is_meta for p in source.model.lm_head.parameters())
    assert all(p.is_meta for p in decoder_layers(source.model).parameters())


class TestRefusals:
    def run(self, folder: Path, out: Path, text: str, **settings: Any) -> PruneResult:
        config = {"ratio": 0.2, "stream": True, "calib": text, "calib_samples": 2} | settings
        small = {"calib_seq_len": 32, "eval": text, "eval_seq_len": 32, "eval_windows": 1}
        return run_prune(PruneConfig(model=str(folder), out=out, quiet=True, **small, **config))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("model.norm.weight"), "1 weights are missing, first model.norm"),
            (lambda w: w.update({"model.norm.weight": torch.ones(3)}), "shape"),
        ],
        ids=["missing", "shape"],
    )
    def test_weights(self, tmp_path, text, change, message):
        folder = tiny_checkpoint(tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            self.run(folder, tmp_path / "out", text)
        assert not (tmp_path / "out").exists()

    def test_other_formats(self, tmp_path, text):
        folder = tiny_checkpoint(tmp_path / "model")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(InputError, match="safetensors"):
            self.run(folder, tmp_path / "out", text)

    def test_a_gate_leaves_the_log_alone(self, tmp_path, text):
        folder = tiny_checkpoint(tmp_path / "model")
        with pytest.raises(GateError):
            self.run(folder, tmp_path / "out", text, gate_ppl_ratio=0.01)
        out = tmp_path / "out"
        assert set(tmp_path.iterdir()) == {folder, out}
        assert [p for p in out.rglob("*") if p.is_file()] == [out / "fastprune/run.log"]

    def test_weights_that_are_not_finite(self, tmp_path, text):
        folder = tiny_checkpoint(tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(NumericalError, match="came out as NaN or Inf"):
            self.run(folder, tmp_path / "out", text)

    def test_a_dry_run_writes_the_plan_alone(self, tmp_path, text):
        folder = tiny_checkpoint(tmp_path / "model")
        result = self.run(folder, tmp_path / "out", text, dry_run=True)
        assert not list((tmp_path / "out").glob("*.safetensors"))
        saved = json.loads((tmp_path / "out/fastprune/plan.json").read_text())
        assert saved == json.loads(json.dumps(result.plan.to_dict()))
