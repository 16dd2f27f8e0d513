"""A run killed at any moment goes on where it was: the same losses, the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastprune.recover import checkpoints, pipeline, stage
from fastprune.recover.evaluation import Evaluation
from fastprune.recover.folder import RunFolder
from fastprune.recover.loop import Loop
from fastprune.recover.pace import BESIDE
from fastprune.workplace import claimed

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


PACES = ((1e-3, 4), (4e-4, 8))
"""Learning rates and numbers of steps, before and after."""


class Killed(BaseException):
    """What the command line does not catch: nothing is written after it."""


def killed(*args, **options):
    raise Killed


@pytest.fixture
def hooked(monkeypatch):
    """Put a gradient hook into the command."""

    original = pipeline.Course

    def use(hook):
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
    # A GPU does not repeat its sums; `auto` may differ between the tests' process and its own.
    flags += ["--device", "cpu", "--precision", "fp32"]
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


@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_run_by_the_minutes_goes_on_with_its_steps(
    finetune, hooked, tmp_path, monkeypatch, killed_at
):
    """The passes before the first step make it 20; steps of half that time make it 40 at step 3."""
    monkeypatch.setattr(stage, "seconds_per_step", lambda *a, **o: 6.0 / BESIDE)
    monkeypatch.setattr(Loop, "elapsed", lambda loop: 3.0 * loop.state.step)
    flags = ["--minutes", "2", "--save-steps", "100"]
    assert finetune(*flags, out="whole")[0] == 0
    assert len(losses(tmp_path / "whole")) == 40
    interrupt = {killed_at: lambda: os.kill(os.getpid(), signal.SIGINT)}
    hooked(lambda step, model: interrupt.get(step, int)())
    assert finetune(*flags)[0] == 130
    hooked(None)
    assert finetune(*flags)[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_an_evaluation_is_heeded_at_once(finetune, tmp_path, monkeypatch, number):
    """The run goes on with that evaluation; dropout shows whether random draws are the same."""
    flags = ["--method", "lora", "--lora-dropout", "0.3", "--max-steps", "4", "--log-steps", "1"]
    flags += ["--eval-steps", "2", "--save-steps", "100", "--val-size", "4"]
    assert finetune(*flags, out="whole")[0] == 0
    original = Evaluation.measure

    def interrupted(self):
        os.kill(os.getpid(), number)
        raise AssertionError("the evaluation goes on")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "measure", interrupted)
        status, _, stderr = finetune(*flags)
    assert status == 130
    assert "the same command continues" in stderr
    checkpoint = tmp_path / "out/fastprune/state/stage-0/checkpoint-2"
    assert json.loads((checkpoint / "fastprune.json").read_text())["unseen"]
    assert Evaluation.measure is original
    assert finetune(*flags)[0] == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")
    evaluated = [
        [line["eval_loss"] for line in map(json.loads, text.splitlines()) if "eval_loss" in line]
        for text in (
            (tmp_path / out / "fastprune/train_log.jsonl").read_text() for out in ("whole", "out")
        )
    ]
    assert evaluated[0] == evaluated[1]


def test_two_runs_do_not_share_an_output(finetune, tmp_path):
    with claimed(tmp_path / "out"):
        status, _, stderr = finetune("--max-steps", "2")
    assert status == 2
    assert f"another fastprune (process {os.getpid()}) is writing to it" in stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_state_before_it(finetune, tmp_path, monkeypatch):
    flags = ["--max-steps", "4", "--save-steps", "2"]
    assert finetune(*flags, out="whole")[0] == 0
    real = checkpoints._save

    def full(content, path):
        if path.parent.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        real(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_save", full)
        status, _, stderr = finetune(*flags)
    assert status == 2
    assert "No space left on device; make room and run the same command again" in stderr
    stage = tmp_path / "out/fastprune/state/stage-0"
    assert [path.name for path in stage.iterdir()] == ["checkpoint-2"]
    assert finetune(*flags)[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_checkpoints_that_a_kill_left_too_many_go(finetune, tmp_path, monkeypatch):
    flags = ["--max-steps", "4", "--save-steps", "2", "--keep-last", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.CheckpointFolder, "drop_oldest", lambda _: None)
        patch.setattr(RunFolder, "finish", killed)
        with pytest.raises(Killed):
            finetune(*flags)
    stage = tmp_path / "out/fastprune/state/stage-0"
    assert len(list(stage.iterdir())) == 2
    assert finetune(*flags)[0] == 0
    assert [path.name for path in stage.iterdir()] == ["checkpoint-4"]


def test_a_disk_without_room_is_told_before_the_first_step(finetune, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    status, _, stderr = finetune("--max-steps", "2")
    assert status == 2
    assert "and 1.05 MB are free on the disk of" in stderr
    assert not (tmp_path / "out").exists()


def test_an_interrupted_overwrite_goes_on(finetune, hooked, tmp_path):
    flags = ["--max-steps", "4", "--save-steps", "100"]
    assert finetune(*flags, out="whole")[0] == 0
    assert finetune("--max-steps", "1")[0] == 0
    before = load_file(tmp_path / "out/model.safetensors")
    hooked(lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    status, _, stderr = finetune(*flags, "--overwrite")
    assert status == 130
    state = tmp_path / "out/fastprune/state"
    assert f"the state is in {state}; the same command continues" in stderr
    assert state.is_dir()
    after = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps = []
    hooked(lambda step, model: steps.append(step))
    assert finetune(*flags, "--overwrite")[0] == 0
    assert len(steps) == 2
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_other_settings_do_not_continue_a_run(finetune, hooked, tmp_path):
    hooked(lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    assert finetune("--max-steps", "4")[0] == 130
    hooked(None)
    status, _, stderr = finetune("--max-steps", "4", "--weight-decay", "0.5")
    assert status == 2
    assert "--weight-decay None, not 0.5" in stderr
    # what does not change the result may change
    assert finetune("--max-steps", "4", "--keep-last", "1", "--quiet")[0] == 0


def test_never_begins_anew(finetune, hooked, tmp_path):
    hooked(lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    assert finetune("--max-steps", "4")[0] == 130
    hooked(None)
    assert finetune("--max-steps", "3", "--resume", "never")[0] == 0
    assert [line["step"] for line in losses(tmp_path / "out")] == [1, 2, 3]


def test_a_named_checkpoint_continues_in_another_folder(finetune, tmp_path):
    flags = ["--max-steps", "4", "--save-steps", "2"]
    assert finetune(*flags, out="whole")[0] == 0
    checkpoint = tmp_path / "whole/fastprune/state/stage-0/checkpoint-2"
    assert finetune(*flags, "--resume", str(checkpoint))[0] == 0
    one = load_file(tmp_path / "whole/model.safetensors")
    other = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_of_several_stages_goes_on_in_its_stage(finetune, hooked, tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        "stages:\n"
        "  - {name: all, max_steps: 3, lr: 1e-3, gate: 10}\n"
        "  - {name: mlp, freeze: attention, max_steps: 4, lr: 1e-3}\n"
    )
    flags = ["--recipe", str(recipe), "--save-steps", "2"]
    assert finetune(*flags, out="whole")[0] == 0
    steps = []

    def hook(step, model):
        steps.append(step)
        if len(steps) == 6:  # the third step of the second stage
            os.kill(os.getpid(), signal.SIGINT)

    hooked(hook)
    assert finetune(*flags)[0] == 130
    hooked(None)
    assert finetune(*flags)[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_lora_goes_on(finetune, hooked, tmp_path):
    """Dropout makes the losses depend on the random state too."""
    flags = ["--method", "lora", "--max-steps", "4", "--lora-dropout", "0.3"]
    assert finetune(*flags, out="whole")[0] == 0
    hooked(lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    assert finetune(*flags)[0] == 130
    hooked(None)
    assert finetune(*flags)[0] == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")


def test_random_weights_where_there_is_only_a_config(finetune, tmp_path, model):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json":
            (bare / file.name).write_bytes(file.read_bytes())
    status, _, stderr = finetune("--max-steps", "2", source=bare)
    assert status == 0, stderr
    assert "starts from random ones" in stderr


@pytest.mark.parametrize("stages", [1, 2])
def test_killed_between_the_last_step_and_the_model(finetune, tmp_path, monkeypatch, stages):
    """The last stage is done and the prompts are continued: run.json has been written since."""
    recipe = tmp_path / "recipe.yaml"
    stage = "  - {max_steps: 3, lr: 1e-3, gate: 10}\n"
    recipe.write_text("stages:\n" + stage * stages)
    flags = ["--recipe", str(recipe), "--prompt", "The river"]
    assert finetune(*flags, out="whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", killed)
        with pytest.raises(Killed):
            finetune(*flags)
    assert not (tmp_path / "out/config.json").exists()
    assert finetune(*flags)[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")
    a, b = (
        json.loads((tmp_path / d / "fastprune/metrics.json").read_text()) for d in ("whole", "out")
    )
    assert [s["perplexity"] for s in a["stages"]] == [s["perplexity"] for s in b["stages"]]
    assert len(a["stages"]) == stages


def test_a_named_checkpoint_continues_at_another_pace(finetune, tmp_path):
    """Another rate, or more steps, count from the checkpoint on, and the rate is what it says."""
    flags = ["--save-steps", "2", "--schedule", "linear", "--log-steps", "1"]
    assert finetune(*flags, "--max-steps", "4")[0] == 0
    checkpoint = tmp_path / "out/fastprune/state/stage-0/checkpoint-2"
    status, _, stderr = finetune(
        *flags, "--max-steps", "8", "--lr", "4e-4", "--resume", str(checkpoint)
    )
    assert status == 0, stderr
    assert f"continuing at step 2 from {checkpoint}" in stderr
    rates = {line["step"]: line["lr"] for line in losses(tmp_path / "out")}
    began, goes_on = ({n: lr * (1 - (n - 1) / steps) for n in range(1, 9)} for lr, steps in PACES)
    assert rates == pytest.approx({**began, **{n: goes_on[n] for n in range(3, 9)}}, abs=1e-12)


def test_the_log_of_a_run_stays_whatever_its_end(finetune, hooked, tmp_path):
    log = tmp_path / "out/fastprune/run.log"
    hooked(lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    assert finetune("--max-steps", "4")[0] == 130
    assert "the same command continues" in log.read_text()
    hooked(None)
    assert finetune("--max-steps", "4", "--gate-ppl-ratio", "1e-9")[0] == 3
    assert log.read_text().count("finetune") >= 2
    assert finetune("--max-steps", "4")[0] == 0
    assert "the same command continues" in log.read_text()
    assert log.read_text().count("save took") == 1


def test_a_wrong_flag_found_late_does_not_block_the_right_one(finetune, tmp_path):
    wrong = ["--method", "lora", "--lora-target-modules", "nothing_proj", "--max-steps", "1"]
    assert finetune(*wrong)[0] == 2
    wrong[3] = "q_proj"
    assert finetune(*wrong)[0] == 0


def test_what_an_evaluation_finds_is_printed(finetune):
    status, _, stderr = finetune("--max-steps", "4", "--val-size", "4", "--eval-steps", "2")
    assert status == 0
    assert "step 2, validation loss " in stderr
    assert ", the best so far" in stderr
