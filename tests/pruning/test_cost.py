"""Computed costs against what the same stages do on small models, and dry runs without weights."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrated
from counting import keeping, less
from tiny import FAMILIES, tiny_checkpoint, tiny_config, tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fastprune import distributed
from fastprune.errors import InputError
from fastprune.inspect.perplexity import evaluate, evaluate_layers
from fastprune.models.families import decoder_layers, geometries
from fastprune.models.modeling import per_layer_config
from fastprune.models.shards import ShardReader
from fastprune.models.streamed import StreamedModel, skeleton
from fastprune.pruning.budget import layer_size
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.compensation import compensate
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.cost import Costs, Stage
from fastprune.pruning.curves import Search, measure_curves
from fastprune.pruning.exchange import Problem, exchange
from fastprune.pruning.importance import score
from fastprune.pruning.pipeline import run_prune
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.planning import plan_of
from fastprune.pruning.products import ModelShape
from fastprune.pruning.sensitivity import activation, removal
from fastprune.pruning.sizes import Limits, Removal, removed_parameters
from fastprune.pruning.stream import write_cut

aten = torch.ops.aten
WINDOWS = token_ids(9, 256)  # a full batch of eight, and one more
SETTINGS = {
    "ratio": 0.2,
    "structures": ("attention", "mlp"),
    "exchange_rounds": 2,
    "compensate": "none",
    "calib_samples": 9,
    "calib_seq_len": 256,
    "sensitivity_samples": 3,
    "eval_windows": 5,
    "eval_seq_len": 256,
}
# what torch's own counter leaves out: attention on the CPU, products in place, linear algebra
MORE_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
    aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
    aten.linalg_cholesky_ex: lambda a, **__: a[-1] ** 3 // 3,
    aten.cholesky_solve: lambda b, _, **__: 2 * b[0] ** 2 * b[1],
}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, *MORE_FLOPS}


class Watch(TorchDispatchMode):
    """Bytes that matrix products touch, and the most bytes of new tensors alive at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.moved = self.alive = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for t in made:
            self._live(t.untyped_storage())
        if op._overloadpacket in PRODUCTS:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.moved += sum(t.nbytes for t in read + made if t.dtype.is_floating_point)
        return result

    def _live(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("llama", layers=2, hidden_size=128, intermediate_size=320)


def half(model: torch.nn.Module) -> Plan:
    """The first layer stays whole, the others lose every second unit."""
    whole = keep_all(geometries(model))
    layers = [
        keeping(i, layer.kept["attention"][::2], layer.kept["mlp"][::2]) if i else layer
        for i, layer in enumerate(whole.layers)
    ]
    return Plan(whole.geometries, tuple(layers))


def costs(model: torch.nn.Module, *, ranks: int = 1, stream: bool = False, **more: Any) -> Costs:
    shape = ModelShape.of(model)
    result = skeleton(per_layer_config(model.config, half(model).result()), model.dtype)
    return Costs(
        shape, ModelShape.of(result), PruneConfig(**SETTINGS | more), ranks=ranks, stream=stream
    )


def search(model: torch.nn.Module, refits: bool, windows: torch.Tensor = WINDOWS) -> None:
    sizes = [layer_size(layer, ("attention", "mlp")) for layer in decoder_layers(model)]
    scores = score(calibrated(model, WINDOWS), "magnitude-l2")
    measure_curves(Search(calibrated(model, windows), scores, refits), sizes)


STAGES: dict[str, tuple[Callable[[Costs], Stage], Callable[[Any], Any], dict[str, str]]] = {
    "taylor": (
        Costs.score,
        lambda m: score(calibrated(m, WINDOWS), "taylor-first"),
        {"importance": "taylor-first"},
    ),
    "activation": (
        Costs.score,
        lambda m: score(calibrated(m, WINDOWS), "activation-maw"),
        {},
    ),
    "sensitivity": (Costs.sensitivity, lambda m: removal(calibrated(m, WINDOWS[:3])), {}),
    "changes": (
        Costs.sensitivity,
        lambda m: activation(calibrated(m, WINDOWS[:3])),
        {"layer_importance": "activation"},
    ),
    "search": (Costs.search, lambda m: search(m, False), {}),
    "search, refitted": (
        Costs.search,
        lambda m: search(m, True),
        {"compensate": "least-squares"},
    ),
    "search, on a part": (
        Costs.search,
        lambda m: search(m, True, WINDOWS[:5]),
        {"compensate": "least-squares", "search_samples": 5},
    ),
    "compensate": (Costs.compensate, lambda m: compensate(calibrated(m, WINDOWS), half(m)), {}),
    "evaluate": (lambda c: c.evaluate("", c.model), lambda m: evaluate(m, WINDOWS[:5]), {}),
}


@pytest.mark.parametrize("compensate", ["none", "least-squares"])
def test_an_exchange_costs_no_more_than_is_said(model, compensate):
    sizes = [layer_size(layer, ("mlp",)) for layer in decoder_layers(model)]
    scores = score(calibrated(model, WINDOWS), "magnitude-l2")
    start = [less(channels=280), Removal()]
    target = removed_parameters(sizes, start)
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as flops:
        search = Search(calibrated(model, WINDOWS), scores, compensate != "none")
        problem = Problem(sizes, Limits(), target)
        exchange(search, problem, start, partial(plan_of, model, scores), 2)
    bound = costs(model, compensate=compensate, structures=("mlp",)).exchange().cost.flops
    assert bound / 5 < flops.get_total_flops() < bound


@pytest.mark.parametrize("name", STAGES)
def test_products_and_sums_are_exact_and_peaks_close(model, monkeypatch, name):
    formula, work, settings = STAGES[name]
    handed: list[int] = []
    monkeypatch.setattr(distributed, "sum_", lambda *ts: handed.extend(t.nbytes for t in ts))
    weights = {k: p.detach().clone() for k, p in model.named_parameters()}
    stage = formula(costs(model, **settings))
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as flops, Watch(model) as watch:
        work(model)
    model.load_state_dict(weights, strict=False)
    assert flops.get_total_flops() == stage.cost.flops == stage.cost.single
    shape = ModelShape.of(model)
    kernel = sum(shape.reduction(layer).moved for layer in shape.layers) * len(WINDOWS)
    assert watch.moved == stage.cost.moved - (kernel if name == "taylor" else 0)
    assert sum(handed) == formula(costs(model, ranks=2, **settings)).cost.reduced
    # Here the host is the device. Small tensors, masks and rotary tables are not in the formula.
    predicted = stage.device_bytes + stage.host_bytes - shape.bytes
    assert watch.peak == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_autograd_saves(family, dtype):
    model = tiny_model(family).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model(input_ids=token_ids(1, 8), use_cache=False)
    shape = ModelShape.of(model)
    found = sum(s.nbytes() for key, s in saved.items() if key not in weights)
    tables = 2 * 8 * 16 * shape.item  # cosines and sines, shared by all layers
    # The first layer's own norm sees nothing that needs a gradient; the final norm does.
    assert found == sum(shape.saved(layer, 8) for layer in shape.layers) + tables


def test_obs_is_near(model):
    """Its shrinking products are summed as integrals, and torch does not count its inverses."""
    stage = costs(model, importance="obs").score()
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as flops, Watch(model) as watch:
        score(calibrated(model, WINDOWS), "obs")
    assert flops.get_total_flops() == pytest.approx(stage.cost.flops, rel=0.05)
    predicted = stage.device_bytes + stage.host_bytes - ModelShape.of(model).bytes
    assert watch.peak == pytest.approx(predicted, rel=0.3)


@pytest.mark.parametrize("tied", [True, False])
def test_streamed_files_are_read_as_often_as_computed(tmp_path, monkeypatch, tied):
    source = StreamedModel(tiny_checkpoint(tmp_path / "model", layers=2, tied=tied))
    read = []
    whole = ShardReader.read

    def count(self: ShardReader, *args: Any) -> torch.Tensor:
        read.append(whole(self, *args))
        return read[-1]

    monkeypatch.setattr(ShardReader, "read", count)
    formula = costs(source.model, stream=True, importance="taylor-first")
    norm = source.model.model.norm.weight.nbytes
    for stage, work in (
        (formula.score(), lambda: score(Calibration(source, WINDOWS), "taylor-first")),
        (formula.sensitivity(), lambda: removal(Calibration(source, WINDOWS[:3]))),
        (formula.evaluate("", formula.model), lambda: evaluate_layers(source, WINDOWS[:5])),
    ):
        read.clear()
        work()
        assert sum(t.nbytes for t in read) == stage.cost.read
    read.clear()
    write_cut(source, half(source.model), Calibration(source, WINDOWS), tmp_path / "out")
    together = formula.surgery().cost.read + formula.compensate().cost.read
    assert sum(t.nbytes for t in read) == together + norm


def test_processes_share_what_they_can(model):
    windows = {"eval_windows": 24, "calib_samples": 48}
    one, three = (costs(model, ranks=ranks, **windows).stages() for ranks in (1, 3))
    for alone, shared in zip(one, three, strict=True):
        if alone.name == "surgery":
            assert shared.cost == alone.cost
        else:
            assert alone.cost.flops / 3 <= shared.cost.flops < alone.cost.flops, alone.name


class TestDryRun:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        tiny_config("llama").save_pretrained(tmp_path / "bare")
        return tmp_path / "bare"

    def run(self, folder: Path, **settings: Any) -> dict[str, Any]:
        return run_prune(PruneConfig(model=str(folder), dry_run=True, **settings)).metrics

    def test_sizes_are_those_of_the_run(self, folder, tmp_path):
        settings = {"ratio": 0.3, "layout": "uniform", "importance": "magnitude-l2"}
        settings["structures"] = ("attention", "mlp")
        metrics = self.run(folder, **settings)
        assert metrics["layout"] == {
            "kind": "uniform",
            "model_type": "mistral",  # 6 heads do not divide a hidden size of 64
            "architecture": "MistralForCausalLM",
        }
        tiny_checkpoint(tmp_path / "whole")
        out = tmp_path / "out"
        short = {"eval_seq_len": 64, "eval_windows": 1, "calib_seq_len": 64, "calib_samples": 2}
        done = run_prune(PruneConfig(model=str(tmp_path / "whole"), out=out, **settings, **short))
        assert done.metrics["layers"] == metrics["layers"]
        assert done.metrics["params"] == metrics["params"]
        saved = json.loads((out / "config.json").read_text())
        assert saved["model_type"] == metrics["layout"]["model_type"]
        assert (out / "model.safetensors").stat().st_size == metrics["bytes"]["after"]

    def test_layers_that_differ(self, folder):
        metrics = self.run(folder, ratio=0.2, layers="1:3")
        assert metrics["layout"]["kind"] == "per-layer"
        assert metrics["layout"]["architecture"] == "FastpruneLlamaForCausalLM"

    def test_what_needs_weights_is_said(self, folder, caplog):
        metrics = self.run(folder, ratio=0.2, allocation="search", ranks=4)
        assert "--allocation search cannot measure" in caplog.text
        assert metrics["costs"]["processes"] == 4
        runs = {stage["name"]: stage["runs"] for stage in metrics["costs"]["memory"]}
        assert runs["search"] and not runs["sensitivity"]
        assert "search" not in [stage["name"] for stage in metrics["costs"]["stream"]]

    def test_no_round_of_exchange_costs_nothing(self, folder):
        metrics = self.run(folder, ratio=0.2, allocation="search", exchange_rounds=0)
        stages = {stage["name"]: stage for stage in metrics["costs"]["memory"]}
        assert not stages["exchange"]["runs"] and stages["exchange"]["flops"] == 0

    def test_a_sensitivity_from_a_file(self, folder, tmp_path, caplog):
        file = tmp_path / "importance.json"
        file.write_text(json.dumps([1.0, 1.0, 8.0, 8.0]))
        layers = self.run(folder, ratio=0.2, allocation="inverse", layer_importance=str(file))[
            "layers"
        ]
        assert layers[0]["channels"] < layers[3]["channels"]
        assert "cannot measure" not in caplog.text

    @pytest.mark.parametrize(
        "settings", [{"target_latency": 1.0}, {"ratio": 0.2, "structures": ("sublayer",)}]
    )
    def test_what_only_a_measurement_decides(self, folder, settings):
        with pytest.raises(InputError, match="has to measure"):
            self.run(folder, **settings)

    def test_nothing_to_write(self, folder, tmp_path):
        with pytest.raises(InputError, match="no weights"):
            self.run(folder, ratio=0.2, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
