"""What goes to TensorBoard, Weights & Biases and Trackio; theirs run where they are installed."""

import importlib.util
import json
import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from fastprune.recover import loggers, pipeline

LOGGERS = ("tensorboard", "wandb", "trackio")


def installed(name):
    return importlib.util.find_spec(name) is not None


@pytest.fixture
def two_stages(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(
        "stages:\n"
        "  - {name: all, max_steps: 3, lr: 1e-3, eval_steps: 2, val_size: 2}\n"
        "  - {name: mlp, freeze: attention, max_steps: 2, lr: 1e-3}\n"
    )
    return file


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_logger_is_told_before_the_start(finetune, tmp_path, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else found(n, *rest)
    )
    status, _, stderr = finetune("--max-steps", "1", "--log-to", name)
    assert status == 2
    assert f"pip install {name}" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not installed("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_gets_every_line_of_every_stage(finetune, two_stages, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    status, _, stderr = finetune("--recipe", str(two_stages), "--log-to", "tensorboard")
    assert status == 0, stderr
    records = tmp_path / "out/fastprune"
    lines = [json.loads(line) for line in (records / "train_log.jsonl").read_text().splitlines()]
    folders = sorted((records / "tensorboard").iterdir())
    assert [folder.name[:7] for folder in folders] == ["stage-0", "stage-1"]
    for stage, folder in enumerate(folders):
        events = EventAccumulator(str(folder)).Reload()
        logged = {event.step: event.value for event in events.Scalars("train/loss")}
        mine = [line for line in lines if line["stage"] == stage and "loss" in line]
        assert logged == {line["step"]: pytest.approx(line["loss"]) for line in mine}
    first = EventAccumulator(str(folders[0])).Reload()
    assert [event.step for event in first.Scalars("eval/loss")] == [2, 3]
    assert [event.step for event in first.Scalars("eval/eval_ppl")] == [2, 3]  # of eval.txt


@pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed")
def test_wandb_gets_a_run_a_stage(finetune, two_stages, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    status, _, stderr = finetune("--recipe", str(two_stages), "--log-to", "wandb")
    assert status == 0, stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.skipif(not installed("trackio"), reason="trackio is not installed")
def test_trackio_gets_a_run_a_stage(finetune, two_stages, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    status, stdout, stderr = finetune("--recipe", str(two_stages), "--log-to", "trackio")
    assert status == 0, stderr
    created = [line for line in stdout.splitlines() if line.startswith("* Created new run")]
    assert len(created) == 2


def test_every_figure_reaches_the_loggers(finetune, monkeypatch, tmp_path):
    """Whatever the logger is."""
    seen = []
    monkeypatch.setattr(loggers.Logger, "log", lambda self, figures, step: seen.append(figures))
    status, _, err = finetune("--max-steps", "2", "--eval-steps", "1", "--val-size", "2")
    assert status == 0, err
    assert sum("eval/eval_ppl" in logs and "eval/loss" in logs for logs in seen) == 2
    trained = [figures for figures in seen if "train/loss" in figures]
    assert len(trained) == 2 and {"train/learning_rate", "train/grad_norm"} <= trained[0].keys()


@pytest.mark.parametrize("name", ["none", "tensorboard"])
def test_a_project_needs_a_logger_that_has_some(finetune, name):
    status, _, err = finetune("--log-to", name, "--logger-project", "p")
    assert status == 2 and "--logger-project needs --log-to wandb or trackio" in err


class Package(ModuleType):
    """Stands for wandb or trackio: remembers runs, what they get, and that they end."""

    def __init__(self, name, error=None):
        super().__init__(name)
        self.error, self.runs = error, []

    def init(self, **options):
        if self.error is not None:
            raise self.error
        self.runs.append(SimpleNamespace(**options, lines=[], ended=False))
        return self

    def log(self, figures, step):
        self.runs[-1].lines.append((step, figures))

    def finish(self):
        self.runs[-1].ended = True


@pytest.fixture
def package(monkeypatch):
    def put(name, error=None):
        made = Package(name, error)
        monkeypatch.setitem(sys.modules, name, made)
        monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name, *rest: object())
        return made

    return put


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_each_stage_is_a_run_of_its_project(finetune, two_stages, tmp_path, package, name):
    theirs = package(name)
    flags = ["--recipe", str(two_stages), "--log-to", name, "--logger-project", "mine"]
    status, _, stderr = finetune(*flags)
    assert status == 0, stderr
    assert [run.project for run in theirs.runs] == ["mine", "mine"]
    assert [run.name[:11] for run in theirs.runs] == ["out-stage-0", "out-stage-1"]
    assert all(run.ended for run in theirs.runs)
    first = theirs.runs[0]
    assert first.config["stage"]["name"] == "all" and first.config["seed"] == 0
    assert [step for step, line in first.lines if "train/loss" in line] == [1, 2, 3]
    assert [step for step, line in first.lines if "eval/loss" in line] == [2, 3]
    assert all(line["train/global_step"] == step for step, line in first.lines)


@pytest.mark.parametrize(("name", "project"), [("wandb", "theirs"), ("trackio", loggers.PROJECT)])
def test_wandb_has_a_project_in_the_environment(finetune, monkeypatch, package, name, project):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    theirs = package(name)
    assert finetune("--max-steps", "1", "--log-to", name)[0] == 0
    assert [run.project for run in theirs.runs] == [project]


def test_an_interrupted_run_is_ended(finetune, monkeypatch, package):
    theirs = package("wandb")
    original = pipeline.Course

    def hooked(*args, **options):
        stop = lambda step, model: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        return original(*args, **options | {"gradient_hook": stop})

    monkeypatch.setattr(pipeline, "Course", hooked)
    assert finetune("--max-steps", "4", "--log-to", "wandb")[0] == 130
    assert [run.ended for run in theirs.runs] == [True]


def test_what_a_logger_refuses_is_one_line(finetune, tmp_path, package):
    """As wandb does where no one is logged in."""
    refusal = type("UsageError", (Exception,), {"__module__": "wandb.errors"})
    package("wandb", refusal("No API key configured."))
    status, _, stderr = finetune("--max-steps", "1", "--log-to", "wandb")
    assert status == 2
    line = "--log-to wandb: No API key configured. (WANDB_MODE=offline needs no account)"
    assert stderr.endswith(f"error: {line}\n")
    assert not (tmp_path / "out/config.json").exists()


def test_tensorboard_is_told_where_to_write(finetune, tmp_path, monkeypatch):
    theirs = ModuleType("torch.utils.tensorboard")
    places = []

    class SummaryWriter(SimpleNamespace):
        def __init__(self, place):
            places.append(place)
            nothing = lambda *args: None  # noqa: E731
            super().__init__(add_text=nothing, add_scalar=nothing, flush=nothing, close=nothing)

    theirs.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", theirs)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name, *rest: object())
    assert finetune("--max-steps", "1", "--log-to", "tensorboard")[0] == 0
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    assert finetune("--max-steps", "1", "--log-to", "tensorboard", out="other")[0] == 0
    assert places[0].parent == tmp_path / "out/fastprune/tensorboard"
    assert places[0].name.startswith("stage-0-")
    assert places[1] == tmp_path / "events"
