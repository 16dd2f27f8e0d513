"""Estimates against what small real runs do, and dry runs without weights."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, TEXT, tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fastprune.errors import InputError
from fastprune.models.shards import ShardReader
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.pipeline import prune, run_prune
from fastprune.report.run import Clock

aten = torch.ops.aten
SETTINGS: dict[str, Any] = {
    "ratio": 0.2,
    "structures": ("attention", "mlp"),
    "allocation": "uniform",
    "calib_samples": 9,  # a full batch of eight, and one more
    "calib_seq_len": 256,
    "sensitivity_samples": 3,
    "eval_windows": 5,
    "eval_seq_len": 256,
}
CHOICES: dict[str, dict[str, Any]] = {
    "taylor": {"importance": "taylor-first"},
    "activation": {"importance": "activation-maw", "iterations": 2},
    "obs": {"importance": "obs", "structures": ("mlp",)},
    "magnitude": {"importance": "magnitude-l2", "compensate": "none"},
    "removal": {"importance": "magnitude-l2", "allocation": "inverse"},
    "changes": {
        "importance": "magnitude-l2",
        "allocation": "proportional",
        "layer_importance": "activation",
    },
    "search": {"allocation": "search", "exchange_rounds": 0},
    "search with sublayers": {
        "allocation": "search",
        "exchange_rounds": 0,
        "structures": ("attention", "mlp", "sublayer"),
    },
    "search without refits": {
        "allocation": "search",
        "exchange_rounds": 0,
        "compensate": "none",
        "search_samples": 5,
    },
}
CLOCKED = {
    "evaluate before": "evaluate",
    "score": "score",
    "sensitivity": "score",
    "search": "plan",
    "exchange": "plan",
    "compensate": "compensate",
    "evaluate after": "evaluate",
}
"""The part of a run's clock in which each stage runs."""
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
    aten.cholesky_inverse: lambda a, *_, **__: 2 * a[-1] ** 3 // 3,
}


class Alive(TorchDispatchMode):
    """The most bytes of new tensors that are alive at a time."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known = known

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


class Meter(Clock):
    """A clock that counts operations, and bytes beyond the weights, instead of seconds."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.flops: Counter[str] = Counter()
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        known = {p.untyped_storage()._cdata for p in self.model.parameters()}
        counter = FlopCounterMode(display=False, custom_mapping=MORE_FLOPS)
        with counter, Alive(known) as alive:
            yield
        self.flops[stage] += counter.get_total_flops()
        self.peaks[stage] = max(alive.peak, self.peaks.get(stage, 0))


@pytest.fixture
def text(tmp_path, monkeypatch) -> str:
    """Enough of it; and nothing is known of earlier measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 200)
    return str(file)


def wide_model(family: str = "llama") -> torch.nn.Module:
    return tiny_model(family, layers=2, hidden_size=128, intermediate_size=320)


def estimated(config: PruneConfig, family: str = "llama") -> list[dict[str, Any]]:
    """The stages of an in-memory run that a dry run says will run."""
    dry = replace(config, dry_run=True)
    stages = prune(wide_model(family), tiny_tokenizer(), dry).metrics["costs"]["memory"]
    return [stage for stage in stages if stage["runs"] and stage["name"] in CLOCKED]


def measured(config: PruneConfig, family: str = "llama") -> tuple[Meter, int]:
    """A run under the meter, and bytes of the uncut weights."""
    model = wide_model(family)
    meter = Meter(model)
    weights = sum(p.nbytes for p in model.parameters())
    prune(model, tiny_tokenizer(), config, clock=meter)
    return meter, weights


@pytest.mark.parametrize(
    ("name", "family"),
    [*((name, "llama") for name in CHOICES), *(("taylor", family) for family in FAMILIES[1:])],
)
def test_operations_and_peaks_of_a_run(text, name, family):
    config = PruneConfig(**SETTINGS | CHOICES[name], calib=text, eval=text)
    meter, weights = measured(config, family)
    flops: Counter[str] = Counter()
    peaks: dict[str, int] = {}
    for stage in estimated(config, family):
        clocked = CLOCKED[stage["name"]]
        flops[clocked] += stage["flops"]
        # Here the host is the device.
        peak = stage["device_bytes"] + stage["host_bytes"] - weights
        peaks[clocked] = max(peak, peaks.get(clocked, 0))
    if config.allocation == "search":  # which also measures how far the result diverges
        del flops["evaluate"]
    assert flops["score"] or name == "magnitude"
    for clocked, count in flops.items():
        assert meter.flops[clocked] == pytest.approx(count, rel=0.15), clocked
        assert meter.peaks[clocked] == pytest.approx(peaks[clocked], rel=0.3, abs=2**16), clocked


@pytest.mark.parametrize("compensate", ["none", "least-squares"])
def test_an_exchange_takes_no_more_than_is_said(text, compensate):
    choice = {"allocation": "search", "exchange_rounds": 2, "compensate": compensate}
    config = PruneConfig(**SETTINGS | choice, calib=text, eval=text)
    search, exchange = [s for s in estimated(config) if s["name"] in ("search", "exchange")]
    meter, weights = measured(config)
    bound = search["flops"] + exchange["flops"]
    assert bound / 5 < meter.flops["plan"] < bound
    peak = exchange["device_bytes"] + exchange["host_bytes"] - weights
    assert meter.peaks["plan"] == pytest.approx(peak, rel=0.3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("importance", ["taylor-first", "activation"])
def test_files_that_a_streamed_run_reads(text, tmp_path, monkeypatch, importance, tied):
    folder = str(tiny_checkpoint(tmp_path / "model", layers=2, tied=tied))
    read = 0
    whole = ShardReader.read

    def count(self: ShardReader, *args: Any) -> torch.Tensor:
        nonlocal read
        tensor = whole(self, *args)
        read += tensor.nbytes
        return tensor

    choice = {"importance": importance, "allocation": "inverse"}
    config = PruneConfig(model=folder, **SETTINGS | choice, calib=text, eval=text, stream=True)
    monkeypatch.setattr(ShardReader, "read", count)
    run_prune(replace(config, out=tmp_path / "out"))
    found = read
    stages = run_prune(replace(config, dry_run=True)).metrics["costs"]["stream"]
    read_by = [stage["read"] for stage in stages if stage["runs"]]
    assert found == pytest.approx(sum(read_by), rel=0.02)


def test_processes_share_what_they_can(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    choice = {"calib_samples": 48, "eval_windows": 24, "allocation": "search", "dry_run": True}
    config = PruneConfig(model=str(tmp_path), **SETTINGS | choice)
    one, three = (
        run_prune(replace(config, ranks=ranks)).metrics["costs"]["memory"] for ranks in (1, 3)
    )
    for alone, shared in zip(one, three, strict=True):
        if alone["name"] == "surgery":
            assert shared == alone
        elif alone["runs"]:
            assert alone["flops"] / 3 <= shared["flops"] < alone["flops"], alone["name"]


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_takes_less_of_the_device(family, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    costs = run_prune(PruneConfig(model=str(tmp_path), ratio=0.2, dry_run=True)).metrics["costs"]
    whole = {stage["name"]: stage for stage in costs["memory"]}
    for stage in costs["stream"]:
        assert stage["device_bytes"] < whole[stage["name"]]["device_bytes"]
        assert stage["flops"] >= whole[stage["name"]]["flops"]


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
        assert [stage["name"] for stage in metrics["costs"]["stream"]] == list(runs)

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
        with pytest.raises(InputError, match="has to run the model"):
            self.run(folder, **settings)

    def test_nothing_to_write(self, folder, tmp_path):
        with pytest.raises(InputError, match="no weights"):
            self.run(folder, ratio=0.2, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
