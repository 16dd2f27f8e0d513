"""What goes to TensorBoard, Weights & Biases and Trackio; theirs run where they are installed."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest

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
    validation = EventAccumulator(str(folders[0])).Reload().Scalars("eval/loss")
    assert [event.step for event in validation] == [2, 3]


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
    assert line in stderr
    assert stderr.count("\n") == 2  # and what is to be done
    assert not (tmp_path / "out/config.json").exists()
