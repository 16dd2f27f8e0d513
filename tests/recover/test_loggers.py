"""What goes to TensorBoard, Weights & Biases and Trackio; theirs run where they are installed."""

import importlib.util
import json
import os
import sys
from types import ModuleType

import pytest
import torch

from fastprune.recover import loggers

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
    """Whatever the logger: what the library's callbacks are given."""
    seen = []
    monkeypatch.setattr(
        "fastprune.recover.callbacks.Watch.on_log",
        lambda self, args, state, control, logs=None, **_: seen.append(dict(logs or {})),
    )
    status, _, err = finetune("--max-steps", "2", "--eval-steps", "1", "--val-size", "2")
    assert status == 0, err
    assert sum("eval_eval_ppl" in logs and "eval_loss" in logs for logs in seen) == 2


@pytest.mark.parametrize("name", ["none", "tensorboard"])
def test_a_project_needs_a_logger_that_has_some(finetune, name):
    status, _, err = finetune("--log-to", name, "--logger-project", "p")
    assert status == 2 and "--logger-project needs --log-to wandb or trackio" in err


def test_the_project_reaches_both_loggers(tmp_path, monkeypatch):
    from fastprune.recover.arguments import training_arguments
    from fastprune.recover.config import FinetuneConfig
    from fastprune.recover.recipes import Stage

    monkeypatch.setenv("WANDB_PROJECT", "before")
    config = FinetuneConfig(log_to="none", logger_project="mine")
    folder = tmp_path / "a/b/c"
    arguments = training_arguments(Stage(), config, folder, torch.device("cpu"), 8)
    assert arguments.project == os.environ["WANDB_PROJECT"] == "mine"


def test_what_a_logger_refuses_is_one_line(finetune, tmp_path, monkeypatch):
    """As wandb does where no one is logged in."""
    from transformers.integrations import WandbCallback

    theirs = ModuleType("wandb")
    theirs.UsageError = type("UsageError", (Exception,), {"__module__": "wandb.errors"})
    monkeypatch.setitem(sys.modules, "wandb", theirs)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name, *rest: object())

    def refuse(self, *args, **options):
        raise theirs.UsageError("No API key configured.")

    monkeypatch.setattr(WandbCallback, "__init__", lambda self: None)
    monkeypatch.setattr(WandbCallback, "on_train_begin", refuse)
    status, _, stderr = finetune("--max-steps", "1", "--log-to", "wandb")
    assert status == 2
    line = "--log-to wandb: No API key configured. (WANDB_MODE=offline needs no account)"
    assert stderr.endswith(f"error: {line}\n")
    assert not (tmp_path / "out/config.json").exists()
