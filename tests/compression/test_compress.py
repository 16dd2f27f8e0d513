"""`fastprune compress` on a tiny model: the whole way, stopped anywhere, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXT, tiny_checkpoint, tiny_model, tiny_tokenizer

import fastprune
from fastprune import cli, progress
from fastprune.compression import measure, pipeline
from fastprune.compression.config import CompressConfig
from fastprune.compression.schedule import (
    Pace,
    check_minutes,
    effort_for,
    is_hurried,
    least_minutes,
)
from fastprune.compression.steps import Steps
from fastprune.errors import InputError
from fastprune.inspect.record import Origin
from fastprune.models.families import geometries
from fastprune.models.load import load_model
from fastprune.pruning.plan import Plan
from fastprune.report.compare import compare
from fastprune.workplace import claimed

FLAGS = ["--ratio", "0.2", "--effort", "fast", "--calib-samples", "4", "--calib-seq-len", "32"]
FLAGS += ["--eval-windows", "2", "--eval-seq-len", "32", "--eval-also", "none", "--no-speed"]
FLAGS += ["--max-steps", "4", "--seq-len", "32", "--lr", "1e-3", "--lora-r", "2", "--quiet"]


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "SAMPLE_TOKENS", 2)
    monkeypatch.setattr(progress, "DELAY", 3600)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    return model, text


@pytest.fixture
def compress(files, tmp_path, capsys):
    model, text = files

    def run(*flags: str, out: Path | None = None) -> tuple[int, str]:
        texts = ["--calib", str(text), "--data", str(text), "--eval", str(text)]
        place = ["--out", str(out or tmp_path / "out")]
        status = cli.main(["compress", str(model), *place, *texts, *FLAGS, *flags])
        return status, capsys.readouterr().err

    return run


def metrics_of(out: Path) -> dict:
    return json.loads((out / "fastprune/metrics.json").read_text())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_it_leaves_one_small_model_and_its_records(compress, files, tmp_path):
    status, stderr = compress()
    assert status == 0, stderr
    out = tmp_path / "out"
    found = metrics_of(out)
    dense, _ = load_model(files[0])
    small, _ = load_model(out)
    assert found["dense"]["params"] == sum(p.numel() for p in dense.parameters())
    assert found["recovered"]["params"] == sum(p.numel() for p in small.parameters())
    assert found["prune"]["ratio"]["achieved"] == pytest.approx(0.2, abs=0.01)
    ppl = [found[m]["perplexity"][0]["perplexity"] for m in ("dense", "pruned", "recovered")]
    assert ppl[2] < ppl[1]  # it learnt something
    assert found["kept"] == "recovered"
    assert found["finetune"]["stages"][0]["steps"] == 4
    assert not (out / "fastprune/state").exists()
    origin = Origin.of(out)
    assert (origin.dense, origin.params.now) == (str(files[0]), found["recovered"]["params"])
    assert origin.figures((found["settings"]["eval"], 32, 2)).dense == ppl[0]
    (run,) = compare([out])["runs"]
    assert run["made_by"] == "compress"
    sizes = [found[m][key] for key in ("params", "block") for m in ("dense", "recovered")]
    assert list(run["params"].values()) == sizes
    assert run["ratio"]["achieved"] == pytest.approx(found["prune"]["ratio"]["achieved"])
    assert [run["perplexity"][0][when] for when in ("before", "after")] == [ppl[0], ppl[2]]
    assert run["seconds"] == found["seconds"]["total"]
    page = (out / "fastprune/report.html").read_text()
    assert "The capital of France is" in page
    assert "polyline" in page
    assert {"plan.json", "run.log", "train_log.jsonl"} <= {
        file.name for file in (out / "fastprune").iterdir()
    }


@pytest.mark.parametrize("step", ["figures", "run_finetune", "run_merge", "write_compress_report"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_stopped_anywhere_it_goes_on_to_the_same_weights(
    compress, tmp_path, monkeypatch, step, before
):
    whole = tmp_path / "whole"
    assert compress(out=whole)[0] == 0
    real = getattr(pipeline, step)

    def interrupted(*args, **kwargs):
        if not before:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, step, interrupted)
        assert compress()[0] == 130
    assert not (tmp_path / "out/config.json").exists()
    assert compress()[0] == 0
    one, other = weights(whole), weights(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_finished_steps_are_not_repeated_when_a_later_setting_changes(
    compress, tmp_path, monkeypatch
):
    def interrupted(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_merge", interrupted)
        assert compress()[0] == 130
    pruned = []
    real = pipeline.PruneRun
    monkeypatch.setattr(pipeline, "PruneRun", lambda *a: pruned.append(a) or real(*a))
    assert compress("--max-steps", "6")[0] == 0
    assert not pruned
    assert metrics_of(tmp_path / "out")["finetune"]["stages"][0]["steps"] == 6


def test_in_two_rounds_half_goes_each_time(compress, files, tmp_path):
    status, stderr = compress("--rounds", "2", "--max-steps", "2")
    assert status == 0, stderr
    out = tmp_path / "out"
    found = metrics_of(out)
    assert found["recovered"]["block"] / found["dense"]["block"] == pytest.approx(0.8, abs=0.01)
    assert found["prune"]["ratio"]["achieved"] == pytest.approx(1 - 0.8 / 0.9, abs=0.01)
    dense, small = load_model(files[0])[0], load_model(out)[0]
    plan = Plan.load(out / "fastprune/plan.json")
    plan.check_model(geometries(dense))
    assert plan.result() == geometries(small)
    assert {"pruned-1", "recovered-1", "merged-1", "pruned"} <= found["seconds"].keys()


def test_stopped_in_the_second_round_the_first_is_not_repeated(compress, tmp_path, monkeypatch):
    flags = ("--rounds", "2", "--max-steps", "2")
    assert compress(*flags, out=tmp_path / "whole")[0] == 0
    real, runs = pipeline.PruneRun, []

    def second_fails(*args, **options):
        runs.append(args)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(pipeline, "PruneRun", second_fails)
    assert compress(*flags)[0] == 130
    assert compress(*flags)[0] == 0
    assert len(runs) == 3
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_recovery_that_makes_it_worse_is_left_out(compress, tmp_path):
    status, stderr = compress("--lr", "10", "--guard-rollbacks", "50")
    assert status == 0, stderr
    found = metrics_of(tmp_path / "out")
    assert found["kept"] == "pruned"
    small = weights(tmp_path / "out")
    params = sum(t.numel() for t in small.values())
    assert params == found["pruned"]["params"]
    assert (
        found["recovered"]["perplexity"][0]["perplexity"]
        > (found["pruned"]["perplexity"][0]["perplexity"])
    )


def test_a_gate_that_is_not_met_writes_no_model(compress, tmp_path):
    status, stderr = compress("--gate-ppl-ratio", "0.01")
    assert status == 3
    assert "the gate is 0.01" in stderr
    assert not (tmp_path / "out/config.json").exists()
    assert compress("--gate-ppl-ratio", "100")[0] == 0  # the same command goes on


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--minutes", "0"], "--minutes must be positive"),
        (["--minutes", "-3"], "--minutes must be positive"),
        (["--minutes", "soon"], "is not a number"),
        (["--minutes", "inf"], "--minutes must be a finite number"),
        (["--minutes", "1e-6"], "is too short"),
        (["--dry-run"], "does not take --dry-run"),
        (["--stream"], "does not take --stream"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (
            ["--rounds", "2", "--ratio-of", "structures"],
            "--rounds removes an equal part of --ratio",
        ),
        (["--ratio", "1.5"], "--ratio must lie between 0 and 1"),
        (["--recipe", "nonsense"], "no recipe"),
        (["--eval", "nowhere.txt"], "nowhere.txt"),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_it_refuses(compress, tmp_path, flags, words):
    status, stderr = compress(*flags)
    assert status == 2
    assert words in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_out_that_holds_something_else_is_refused(compress, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    status, stderr = compress()
    assert status == 2
    assert "exists already" in stderr
    assert compress("--overwrite")[0] == 2
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_two_runs_do_not_share_an_output(compress, tmp_path):
    with claimed(tmp_path / "out"):
        status, stderr = compress()
    assert status == 2
    assert "another fastprune" in stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_what_continues(compress, tmp_path, monkeypatch):
    def stopped(self, dense, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.CompressRun, "prune", stopped)
    logged = tmp_path / "out/fastprune/state/run.log"
    assert compress()[0] == 130
    assert "the same command continues" in logged.read_text()


@pytest.mark.parametrize("content", ["", "[]", '{"command": "compress", "steps": {"dense": 3}}'])
def test_a_damaged_state_is_told_and_can_be_given_up(compress, tmp_path, content):
    state = tmp_path / "out/fastprune/state"
    state.mkdir(parents=True)
    (state / "run.json").write_text(content)
    (state / "run.log").write_text("said")
    status, stderr = compress()
    assert status == 2
    assert "damaged; the run cannot be continued: --resume never begins anew" in stderr
    config = CompressConfig(model="m", out=tmp_path / "out", ratio=0.2, resume="never")
    steps = Steps.open(config)
    steps.begin()
    assert json.loads((state / "run.json").read_text())["steps"] == {}


def test_a_disk_without_room_is_told_first(compress, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    status, stderr = compress()
    assert status == 2
    assert "this run takes about" in stderr
    assert not (tmp_path / "out").exists()


def test_from_python_the_model_in_memory_stays_as_it_is(files, tmp_path):
    model, text = tiny_model("qwen3"), str(files[1])
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = fastprune.CompressConfig(
        ratio=0.2, effort="fast", calib=text, data=text, eval=text, eval_also="none",
        calib_samples=4, calib_seq_len=32, eval_windows=2, eval_seq_len=32, speed=False,
        max_steps=2, seq_len=32, lora_r=2,
    )  # fmt: skip
    small, tokenizer, found = fastprune.compress(model, tiny_tokenizer(), config)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert sum(p.numel() for p in small.parameters()) == found["recovered"]["params"]
    assert tokenizer("the mill")["input_ids"]


def test_effort_follows_the_minutes():
    pace = Pace(unit=14, measuring=31)
    assert effort_for(None, pace) == "balanced"
    assert effort_for(30, pace) == "fast"
    assert effort_for(60, pace) == "balanced"
    assert effort_for(60, pace, rounds=2) == "fast"
    assert effort_for(120, pace) == "thorough"
    assert [is_hurried(minutes, pace) for minutes in (None, 10, 30)] == [False, True, False]
    check_minutes(least_minutes(pace), pace)
    with pytest.raises(InputError, match=r"give at least \d+\.\d"):
        check_minutes(least_minutes(pace) / 2, pace)
