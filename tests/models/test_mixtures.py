"""Mixtures of experts go through every command on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import MIXTURES, TEXT, saved, tiny_checkpoint, tiny_model, tiny_tokenizer, token_ids
from transformers import AutoModelForCausalLM

from fastprune import ExportConfig, cli, export
from fastprune.errors import InputError
from fastprune.models.checkpoint import rebuild, save_checkpoint
from fastprune.models.families import decoder_layers, geometries, sublayers
from fastprune.models.layers import Layers
from fastprune.models.load import load_model
from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.surgery import apply_plan

IDS = token_ids(2, 24)
EVERY_CHANNEL = tuple(range(0, 32, 2)), tuple(range(1, 32, 2)), tuple(range(8, 24))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def walked(layers: Layers) -> torch.Tensor:
    """The logits of a model as its walk sees it, with experts that are absent on trial."""
    (final,) = layers.final([IDS], "logits")
    with torch.no_grad(), layers.headed() as head:
        return head(final)


def plan_for(model: torch.nn.Module, name: str) -> Plan:
    """A plan by which all layers lose the same of one kind, or each something else."""
    layers = []
    for index, size in enumerate(geometries(model)):
        groups, experts = (0, 1), tuple(range(size.experts))
        channels = () if size.experts else tuple(range(96))
        inside: tuple[tuple[int, ...], ...] = ()
        if name == "experts" and size.experts:
            experts = (0, 2, 3, 5)
        if name == "channels" and size.experts:
            inside = (*EVERY_CHANNEL, *EVERY_CHANNEL)
        if name == "groups":
            groups = (1,)
        if name == "mixed":
            groups = [(0, 1), (1,), (), (0,)][index]
            experts = experts and [(0, 2, 3), (), (1, 2, 4, 5), ()][index]
            channels = channels and tuple(range(40))
            inside = EVERY_CHANNEL if experts and index == 0 else ()
        kept = {"attention": groups, "experts": experts, "mlp": channels}
        layers.append(LayerPlan(index, kept, inside))
    return Plan(tuple(geometries(model)), tuple(layers))


@pytest.mark.parametrize("family", MIXTURES)
def test_every_parameter_of_a_layer_is_owned_shared_or_a_norm(family):
    for layer in decoder_layers(tiny_model(family)):
        parts = sublayers(layer)
        owned = {name for s in parts for name in s.owned}
        free = {name for name, _ in layer.named_parameters()} - owned
        assert all("norm" in n or n.endswith("bias") or "shared_expert" in n for n in free), free
        inside = sum(s.unit_cost(layer) * s.units for s in parts)
        assert inside == sum(layer.get_parameter(name).numel() for name in owned)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", ["experts", "channels", "mixed"])
def test_surgery_computes_what_masking_does(family, name):
    dense, cut = tiny_model(family), tiny_model(family)
    plan, layers, before = plan_for(dense, name), Layers(dense), logits(dense)
    if family == "olmoe":  # norms over all heads change with the heads that go
        kept = [{**own.kept, "attention": (0, 1)} for own in plan.layers]
        own = (LayerPlan(p.index, k, p.inside) for p, k in zip(plan.layers, kept, strict=True))
        plan = Plan(plan.geometries, tuple(own))
    with preserved(layers):
        mask(layers, plan, None)
        masked = walked(layers)
    apply_plan(cut, plan)
    assert [g.units for g in geometries(cut)] == [g.units for g in plan.result()]
    torch.testing.assert_close(logits(cut), masked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masked, before, atol=1e-2)
    assert torch.equal(logits(dense), before)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", ["experts", "channels", "groups", "mixed"])
def test_a_cut_model_is_read_again_by_transformers(family, name, tmp_path):
    model = tiny_model(family)
    apply_plan(model, plan_for(model, name))
    save_checkpoint(model, None, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    per_layer = name == "mixed" or (family, name) == ("olmoe", "groups")
    assert ("fastprune" in type(again).__name__.lower()) is per_layer
    assert geometries(again) == geometries(model)
    torch.testing.assert_close(logits(again), logits(model))
    cached = again.generate(IDS, max_new_tokens=6, do_sample=False)
    plain = again.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 40)
    return str(file)


def run(text: str, command: str, *words: str) -> int:
    """The exit status of a `command`, with what it measures and calibrates on."""
    more = ["--eval", text, "--eval-seq-len", "32", "--eval-windows", "2", "--keep-worse"]
    if command == "prune":
        more += ["--calib", text, "--calib-samples", "16", "--calib-seq-len", "32"]
    if command in ("merge", "diagnose"):
        more = []
    return cli.main([command, *words, *more, "--device", "cpu", "--quiet"])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("olmoe", ("--structures", "mlp", "--layout", "uniform")),
        ("qwen3_moe", ("--structures", "experts", "--importance", "routed-output")),
        ("qwen2_moe", ("--structures", "attention,experts,mlp", "--allocation", "global")),
    ],
)
def test_the_routed_shares_are_in_the_metrics(family, settings, text, tmp_path):
    dense = str(tiny_checkpoint(tmp_path / "dense", family, vocab_size=304))
    out = tmp_path / "small"
    assert run(text, "prune", dense, "--ratio", "0.25", "--out", str(out), *settings) == 0
    metrics = json.loads((out / "fastprune/metrics.json").read_text())
    assert 0.15 < metrics["ratio"]["achieved"] < 0.35
    for layer in metrics["routing"]["layers"]:
        for when in ("before", "after"):
            assert len(layer[when]) == len(layer["experts"])
        assert sum(layer["after"]) == pytest.approx(2)  # two experts a token
    report = (out / "fastprune/report.html").read_text()
    assert "<h2>Routing</h2>" in report
    lost = any(layer.get("experts", 0) < 6 for layer in metrics["layers"] if layer["index"] != 1)
    assert ("experts that went are not made up for" in report) is lost


def test_every_command_takes_a_mixture(text, tmp_path):
    dense = str(tiny_checkpoint(tmp_path / "dense", "mixtral", vocab_size=304))
    small, adapter, merged, full = (str(tmp_path / n) for n in ("small", "lora", "merged", "full"))
    learnt = ["--data", text, "--seq-len", "32", "--batch-size", "2", "--max-steps", "2"]
    assert run(text, "prune", dense, "--ratio", "0.25", "--dry-run") == 0
    assert run(text, "prune", dense, "--ratio", "0.25", "--out", small) == 0
    assert run(text, "finetune", small, "--out", adapter, "--method", "lora", *learnt) == 0
    assert run(text, "merge", small, "--adapter", adapter, "--out", merged) == 0
    assert run(text, "finetune", small, "--out", full, *learnt) == 0
    assert run(text, "diagnose", merged, "--dense", dense, "--text", text) == 0
    model, _ = load_model(full)
    assert torch.isfinite(logits(model)).all()


def test_whole_sublayers_and_steps(text, tmp_path):
    dense = str(tiny_checkpoint(tmp_path / "dense", "qwen2_moe", vocab_size=304))
    settings = ("--structures", "attention,experts,mlp,sublayer", "--iterations", "2")
    assert run(text, "prune", dense, "--ratio", "0.3", "--out", str(tmp_path / "a"), *settings) == 0
    layers = json.loads((tmp_path / "a/fastprune/metrics.json").read_text())["layers"]
    assert any(0 < layer.get("experts", 0) < 6 or not layer["channels"] for layer in layers)
    again = ("--plan", str(tmp_path / "a/fastprune/plan.json"), "--out", str(tmp_path / "b"))
    assert run(text, "prune", dense, *again) == 0
    first, second = (load_model(tmp_path / name)[0] for name in "ab")
    torch.testing.assert_close(logits(first), logits(second))


REFUSED = [
    ("mixtral", ("--ratio", "0.2", "--allocation", "search"), "use --allocation uniform or global"),
    ("mixtral", ("--ratio", "0.2", "--importance", "obs"), "use --importance routed-output"),
    ("mixtral", ("--ratio", "0.2", "--stream"), "without --stream"),
    ("mixtral", ("--target-latency", "0.001"), "use --ratio"),
    ("mixtral", ("--ratio", "0.2", "--structures", "mlp", "--align", "4"), "use --align 8"),
    ("mixtral", ("--ratio", "0.2", "--layout", "deci"), "use --layout per-layer"),
    ("mixtral", ("--ratio", "0.7", "--structures", "experts"), "can be removed"),
    ("qwen2", ("--ratio", "0.2", "--structures", "experts"), "no layer of this model has experts"),
    ("qwen2", ("--ratio", "0.2", "--importance", "routed-output"), "has experts"),
]


@pytest.mark.parametrize(("family", "settings", "told"), REFUSED)
def test_what_experts_cannot_do_is_one_line(family, settings, told, text, tmp_path, capsys):
    dense = str(tiny_checkpoint(tmp_path / "dense", family, vocab_size=304))
    assert run(text, "prune", dense, "--out", str(tmp_path / "out"), *settings) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kept", "inside", "told"),
    [((1,), (), "routed to 2"), ((1, 2), (range(12), range(12)), "multiples of 8")],
)
def test_a_plan_leaves_what_a_token_is_routed_to(kept, inside, told, text, tmp_path, capsys):
    model = tiny_model("mixtral", vocab_size=304)
    sizes = tuple(geometries(model))
    own = {"attention": (0, 1), "experts": kept}
    plan = Plan(sizes, tuple(LayerPlan(i, own, inside) for i in range(len(sizes))))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    dense, out = str(saved(tmp_path / "dense", model)), str(tmp_path / "out")
    assert run(text, "prune", dense, "--out", out, "--plan", str(tmp_path / "plan.json")) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "inside", [(range(8),), (range(8), range(16)), ((), ()), ((3, 1), (1, 3)), ((0, 40), (0, 1))]
)
def test_a_plan_keeps_as_many_channels_in_every_expert(inside):
    sizes = tuple(geometries(tiny_model("mixtral", layers=1)))
    with pytest.raises(InputError, match="channels of layer 0 are not"):
        Plan(sizes, (LayerPlan(0, {"attention": (0, 1), "experts": (0, 4)}, inside),))


def test_a_plan_after_a_plan_is_one_plan():
    sizes = tuple(geometries(tiny_model("mixtral", layers=1)))
    groups = {"attention": (0, 1)}
    first = LayerPlan(0, {**groups, "experts": (1, 3, 4)}, (range(0, 32, 2),) * 3)
    one = Plan(sizes, (first,))
    second = LayerPlan(0, {**groups, "experts": (0, 2)}, (range(8), range(8, 16)))
    both = one.then(Plan(tuple(one.result()), (second,)))
    assert both.layers[0].kept["experts"] == (1, 4)
    assert both.layers[0].inside == (tuple(range(0, 16, 2)), tuple(range(16, 32, 2)))
    assert both.result()[0].channels == 8 and both.result()[0].experts == 2


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("hf-uniform", "experts are not filled up with zeros"),
        ("nemotron-nas", "mixtral"),
    ],
)
def test_forms_that_hold_no_experts_are_refused(form, told, tmp_path):
    settings = ExportConfig(model="", format=(form,), out=tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match=told):
        export(tiny_model("mixtral"), tiny_tokenizer(), settings)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_files_name_every_expert_as_published_ones_do(family, tmp_path):
    model = tiny_model(family)
    apply_plan(model, plan_for(model, "experts"))
    save_checkpoint(model, None, tmp_path)
    reference = tmp_path / "reference"
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(reference)
    assert keys(tmp_path) == keys(reference)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_sizes_are_read_off_the_weights(family):
    model = tiny_model(family)
    settings = model.config.to_dict()
    apply_plan(model, plan_for(model, "experts"))
    again = rebuild(settings, model.state_dict()).eval()
    assert geometries(again) == geometries(model)
    torch.testing.assert_close(logits(again), logits(model))


def keys(folder: Path) -> set[str]:
    """The names of the weights in the files of a folder."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= set(weights.keys())
    return found
