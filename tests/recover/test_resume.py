"""A run killed at any moment goes on where it was: the same losses, the same weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastprune.recover import pipeline

KILLED = """
import os, signal, sys
from fastprune import cli
from fastprune.recover import pipeline

def kill(step, model):
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

original = pipeline.Course
pipeline.Course = lambda *args, **options: original(*args, **options | {"gradient_hook": kill})
cli.main(sys.argv[2:])
"""


@pytest.fixture
def hooked(monkeypatch):
    """Put a gradient hook into the command."""

    def use(hook):
        original = pipeline.Course
        monkeypatch.setattr(
            pipeline, "Course", lambda *a, **o: original(*a, **o | {"gradient_hook": hook})
        )

    return use


def losses(out: Path):
    """What every logged training step says, but for the time it took."""
    lines = (out / "fastprune" / "train_log.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    return [{k: v for k, v in step.items() if k != "seconds"} for step in steps]


def assert_same(a: Path, b: Path):
    assert losses(a) == losses(b)
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_killed_run_ends_bit_for_bit_like_the_whole_one(finetune, tmp_path, monkeypatch):
    # 4 steps an epoch; the kill comes in the last one, two steps after a checkpoint
    flags = ["--samples", "16", "--epochs", "3", "--save-steps", "3", "--weight-decay", "0.1"]
    assert finetune(*flags, out="whole")[0] == 0
    args = finetune.arguments(*flags, out="killed")
    result = subprocess.run([sys.executable, "-c", KILLED, "8", *args], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    killed = tmp_path / "killed"
    assert not (killed / "config.json").exists()
    assert [c.name for c in (killed / "fastprune/state/stage-0").glob("checkpoint-*")]
    assert finetune(*flags, out="killed")[0] == 0
    assert_same(tmp_path / "whole", killed)


def test_interrupt_saves_the_state(finetune, hooked, tmp_path, monkeypatch):
    flags = ["--max-steps", "6", "--save-steps", "100"]
    assert finetune(*flags, out="whole")[0] == 0
    with monkeypatch.context():
        hooked(lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None)
        status, _, stderr = finetune(*flags)
    assert status == 130
    assert "the same command continues" in stderr
    out = tmp_path / "out"
    assert (out / "fastprune/state/stage-0/checkpoint-4").is_dir()
    hooked(None)
    assert finetune(*flags)[0] == 0
    assert_same(tmp_path / "whole", out)
