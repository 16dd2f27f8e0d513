"""Budgets: what is asked for in parameters, bytes or milliseconds is what comes out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from counting import less, sized
from tiny import FAMILIES, TEXT, tiny_checkpoint, tiny_model, tiny_tokenizer

from fastprune.errors import GateError, InputError
from fastprune.models.families import block_parameters, geometries
from fastprune.pruning import latency
from fastprune.pruning.allocators import allocate_budget
from fastprune.pruning.budget import Budget, budget_of, far_off, parse_bytes, saved_bytes
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.latency import CostTable
from fastprune.pruning.pipeline import prune, run_prune
from fastprune.pruning.sizes import BudgetError, Limits, Removal, removed_parameters

SIZE = sized(4, 100, 96, 10)


@pytest.fixture
def settings(tmp_path, monkeypatch) -> dict[str, object]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    small = {"calib": str(text), "calib_samples": 4, "calib_seq_len": 32, "quiet": True}
    return small | {"eval": str(text), "eval_seq_len": 32, "eval_windows": 2}


def table_of(model, attention: float = 0.1, mlp: float = 0.02, dense: float = 30.0) -> CostTable:
    """Costs that rise with every unit by the same number of milliseconds."""
    sizes = tuple(geometries(model))
    return CostTable(
        dense=dense,
        widths={
            "attention": ((0, 0.0), (4, 4 * attention)),
            "mlp": ((0, 0.0), (96, 96 * mlp)),
        },
        sizes=sizes,
        stack=(sizes[0], 4, 5.0),
        context=16,
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("200MB", 200_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("64KiB", 65536),
        ("3kb", 3000),
        ("12B", 12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "200 bananas", "1e9", "0", "1,5GB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("family", "tied"), [*((family, True) for family in FAMILIES), ("llama", False)]
)
def test_bytes_are_those_of_the_files(settings, tmp_path, family: str, tied: bool) -> None:
    source = tiny_checkpoint(tmp_path / "model", family, tied=tied)
    size = (source / "model.safetensors").stat().st_size
    requested = size - 100_000
    out = tmp_path / "out"
    config = PruneConfig(
        model=str(source),
        out=out,
        target_bytes=str(requested),
        importance="magnitude-l2",
        allocation="global",
        **settings,
    )
    run_prune(config)
    written = (out / "model.safetensors").stat().st_size
    metrics = json.loads((out / "fastprune/metrics.json").read_text())
    assert metrics["bytes"] == {"before": size, "after": written}
    assert metrics["budget"] == {"unit": "bytes", "requested": requested, "achieved": written}
    # at most what was asked for, and no more below than a channel (768 B) and a shorter header,
    # whose numbers lose a digit here and there
    assert requested - 768 - 200 <= written <= requested


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bytes_of_half_precision(settings, dtype: str) -> None:
    model = tiny_model("llama").to(getattr(__import__("torch"), dtype))
    requested = saved_bytes(model) - 50_000
    config = PruneConfig(
        target_bytes=str(requested), importance="magnitude-l2", dry_run=True, **settings
    )
    metrics = prune(model, tiny_tokenizer(), config).metrics
    assert requested - 384 - 200 <= metrics["bytes"]["after"] <= requested  # as above


def test_bytes_of_the_uniform_layout(settings) -> None:
    """A channel of every layer at once is the step, and the bound holds."""
    model = tiny_model("llama")
    before = saved_bytes(model)
    config = PruneConfig(
        target_bytes=str(before - 150_000),
        layout="uniform",
        structures=("mlp",),
        importance="magnitude-l2",
        dry_run=True,
        **settings,
    )
    after = prune(model, tiny_tokenizer(), config).metrics["bytes"]["after"]
    assert before - 150_000 - 4 * 768 - 500 <= after <= before - 150_000


@pytest.mark.parametrize("allocation", ["uniform", "search"])
def test_bytes_by_whole_sublayers(settings, allocation: str) -> None:
    """A sublayer too many is better than a byte too many."""
    model = tiny_model("mistral")
    before = saved_bytes(model)
    config = PruneConfig(
        target_bytes=str(before - 150_000),
        structures=("sublayer",),
        allocation=allocation,
        importance="magnitude-l2",
        dry_run=True,
        **settings,
    )
    after = prune(model, tiny_tokenizer(), config).metrics["bytes"]["after"]
    assert before - 150_000 - 4 * 24_640 - 500 <= after <= before - 150_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_bytes": "1KB"}, "--target-bytes 1000 cannot be reached: the weights take"),
        ({"target_bytes": "1GB"}, "--target-bytes 1000000000 cannot be reached"),
        ({"target_bytes": "1GB", "ratio": 0.2}, "exactly one of"),
        ({"target_params": 10**9}, "--target-params"),
        ({"target_latency": -1.0}, "--target-latency must be positive"),
        ({"ratio": 0.2, "alpha": math.nan}, "--alpha must be a finite number"),
        ({"ratio": 0.2, "allocation": "inverse", "alpha": 300.0}, "--alpha must lie between -10"),
        (
            {"ratio": 0.2, "allocation": "global", "alpha": -300.0},
            "--alpha must lie between 0 and 1",
        ),
        ({"target_latency": 5.0, "stream": True}, "--stream keeps the weights on disk"),
        ({"ratio": 0.2, "iterations": 0}, "--iterations must be at least 1"),
    ],
)
def test_refusals(settings, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        prune(tiny_model("llama"), tiny_tokenizer(), PruneConfig(**settings | change))


def test_parameters(settings) -> None:
    model = tiny_model("llama")
    params = sum(p.numel() for p in model.parameters())
    config = PruneConfig(target_params=params - 30_000, importance="magnitude-l2", **settings)
    metrics = prune(model, tiny_tokenizer(), config).metrics
    assert metrics["budget"]["unit"] == "parameters"
    assert metrics["budget"]["requested"] == params - 30_000
    assert metrics["budget"]["achieved"] == sum(p.numel() for p in model.parameters())
    assert abs(metrics["budget"]["achieved"] - (params - 30_000)) <= 96  # half a channel


def test_the_fewest_parameters_that_save_enough() -> None:
    """Against the same by trying every total; the allocator takes channels from layers in turn."""
    sizes = [SIZE] * 3

    def allocator(target: float) -> list[Removal]:
        channels = round(target / 10)
        return [less(0, channels // 3 + (i < channels % 3)) for i in range(3)]

    budget = Budget("bytes", 1.0, need=1234, at_least=True)
    found = removed_parameters(sizes, allocate_budget(budget, sizes, allocator, Limits()))
    assert found == 1240
    exact = replace(budget, at_least=False)
    assert removed_parameters(sizes, allocate_budget(exact, sizes, allocator, Limits())) == 1230


class TestLatency:
    """On costs that are given, so that nothing depends on the speed of the machine."""

    def test_what_a_removal_saves(self) -> None:
        table = table_of(tiny_model("llama"))
        assert table.saved(0, less(1, 10)) == pytest.approx(0.1 + 0.2)
        assert table.saved(0, less(attention=True)) == pytest.approx(0.4)
        assert table.saved(0, less(2, 0, mlp=True)) == pytest.approx(0.2 + 1.92)

    @pytest.mark.parametrize(
        ("allocation", "structures"),
        [
            ("uniform", ("attention", "mlp")),
            ("uniform", ("sublayer",)),
            ("inverse", ("attention", "mlp", "sublayer")),
            ("global", ("mlp",)),
            ("search", ("attention", "mlp")),
            ("search", ("sublayer",)),
            ("search", ("attention", "mlp", "sublayer")),
        ],
    )
    def test_every_allocation(self, settings, monkeypatch, allocation, structures) -> None:
        model = tiny_model("llama")
        table = table_of(model)
        monkeypatch.setattr(latency, "measure", lambda *_: table)
        config = PruneConfig(
            target_latency=28.0,
            allocation=allocation,
            structures=structures,
            importance="magnitude-l2",
            dry_run=True,
            **settings,
        )
        result = prune(model, tiny_tokenizer(), config)
        predicted = result.metrics["latency"]["predicted"]
        assert predicted <= 28.0 + 1e-9
        # The finest step: a level of channels (a 32nd) or of the whole, or a group's 0.1 ms with
        # the channels that go beside it.
        step = 1.92 if "sublayer" in structures else 0.2
        assert predicted >= 28.0 - step
        assert result.metrics["latency"]["after"] is None
        assert result.metrics["budget"] == {
            "unit": "ms/token",
            "requested": 28.0,
            "achieved": None,
        }

    def test_out_of_reach(self, settings, monkeypatch) -> None:
        model = tiny_model("llama")
        table = table_of(model)
        monkeypatch.setattr(latency, "measure", lambda *_: table)
        for allocation in ("uniform", "search"):
            config = PruneConfig(target_latency=5.0, allocation=allocation, **settings)
            with pytest.raises(InputError, match="5 ms a token cannot be reached: within"):
                prune(model, tiny_tokenizer(), config)
        with pytest.raises(InputError, match="takes only 30 ms a token as it is"):
            budget_of(PruneConfig(target_latency=31.0), model, table)


def test_unreachable_words() -> None:
    model = tiny_model("llama")
    block = block_parameters(model)
    budget = Budget("ratio", 0.9, need=0.9 * block)
    config = PruneConfig(ratio=0.9, structures=("attention", "mlp"))
    assert str(budget.unreachable(BudgetError(0, block / 2), model, config)).endswith(
        "90.0% of the block parameters cannot be reached: within these structures, layers and "
        "limits 0.0% to 50.0% can be removed"
    )


class TestRatioOfStructures:
    def test_is_of_what_may_go_in_the_selected_layers(self, settings) -> None:
        model = tiny_model("llama")
        config = PruneConfig(
            ratio=0.5, ratio_of="structures", structures=("attention",), layers="1:3",
            allocation="uniform", compensate="none", **settings,
        )  # fmt: skip
        result = prune(model, tiny_tokenizer(), config)
        assert [layer["kv_heads"] for layer in result.metrics["layers"]] == [4, 2, 2, 4]
        ratio = result.metrics["ratio"]
        assert ratio["requested"] == pytest.approx(ratio["achieved"], rel=1e-3)

    def test_is_offered_where_the_ratio_must_have_been_meant_of_them(self, settings) -> None:
        model = tiny_model("llama")
        config = PruneConfig(
            ratio=0.5, structures=("attention",), allocation="uniform", max_layer_ratio=0.6,
            **settings,
        )  # fmt: skip
        share = 4 * 4 * 64 * (2 + 2 + 2) * 16 / block_parameters(model)
        told = (
            rf"if 50% of the attention is meant, that is --ratio {share / 2:.2g}, or --ratio 0.5 "
        )
        with pytest.raises(InputError, match=told + "--ratio-of structures"):
            prune(model, tiny_tokenizer(), config)

    def test_needs_to_know_of_what(self) -> None:
        for given in ({"ratio": 0.2}, {"target_params": 9, "structures": ("mlp",)}):
            with pytest.raises(InputError, match="needs both --ratio and --structures"):
                PruneConfig(ratio_of="structures", **given).check()


@pytest.mark.parametrize("allocation", ["uniform", "global", "search"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_ratio_that_rounds_to_nothing_is_refused(settings, allocation, iterations) -> None:
    config = PruneConfig(
        ratio=1e-5, structures=("attention", "mlp"), allocation=allocation, iterations=iterations,
        **settings,
    )  # fmt: skip
    with pytest.raises(InputError, match="rounds to nothing: the smallest unit has 192 parameters"):
        prune(tiny_model("llama"), tiny_tokenizer(), config)


def test_processes_that_share_nothing_each_measure_the_latency(settings, monkeypatch) -> None:
    """As torchrun starts a script that calls `prune` by itself."""
    model = tiny_model("llama")
    monkeypatch.setattr(latency, "measure", lambda *_: table_of(model))
    monkeypatch.setattr(latency, "measure_again", lambda *_: 20.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    config = PruneConfig(
        target_latency=25.0, structures=("attention", "mlp"), allocation="uniform", **settings
    )
    found = prune(model, tiny_tokenizer(), config).metrics["latency"]
    assert found["predicted"] <= 25 and found["after"] == 20


def test_a_gate_says_that_the_model_in_memory_is_cut(settings) -> None:
    config = PruneConfig(
        ratio=0.5, structures=("attention", "mlp"), allocation="uniform", gate_ppl_ratio=0.5,
        **settings,
    )  # fmt: skip
    with pytest.raises(GateError, match="the model in memory is cut, so load it again"):
        prune(tiny_model("llama"), tiny_tokenizer(), config)


@pytest.mark.parametrize("choice", [
    {}, {"allocation": "global"}, {"allocation": "inverse"}, {"allocation": "search"},
    {"layout": "uniform"},
])  # fmt: skip
def test_a_ratio_that_align_cannot_meet_is_told(settings, caplog, choice):
    model = tiny_model("llama", layers=2)
    config = PruneConfig(ratio=0.1, align=64, dry_run=True, exchange_rounds=0, **choice, **settings)
    achieved = prune(model, tiny_tokenizer(), config).metrics["ratio"]["achieved"]
    assert achieved == pytest.approx(0.142, abs=1e-3)  # 32 of 96 channels in both layers
    (told,) = (r.message for r in caplog.records if r.levelname == "WARNING")
    assert told.startswith("asked to remove 10.0% of the block parameters, 14.2% go: --align 64")


def test_a_ratio_that_is_met_needs_no_word(settings, caplog):
    model = tiny_model("llama", layers=2)
    prune(model, tiny_tokenizer(), PruneConfig(ratio=0.15, align=16, dry_run=True, **settings))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(("choice", "removed", "told"), [
    ({}, 101, None),
    ({}, 120, "the limits of a layer"),
    ({"structures": ("attention",)}, 120, "go as a whole"),
    ({"layout": "uniform"}, 80, "--layout uniform takes the same"),
    ({"align": 8}, 80, "--align 8 keeps channels"),
])  # fmt: skip
def test_why_a_budget_is_missed(choice, removed, told):
    config = PruneConfig(ratio=0.1, **{"structures": ("attention", "mlp")} | choice)
    found = far_off(Budget("ratio", 0.1, 100), config, removed, 1000)
    assert found is None if told is None else told in found


def test_more_alignment_than_channels_is_refused(settings):
    model = tiny_model("llama", layers=2)
    for allocation in ("uniform", "global", "search"):
        config = PruneConfig(ratio=0.1, align=128, allocation=allocation, dry_run=True, **settings)
        with pytest.raises(InputError, match="layer 0 has 96 channels"):
            prune(model, tiny_tokenizer(), config)
