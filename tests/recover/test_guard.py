"""Non-finite steps change nothing; several in a row bring back a good state; then it gives up."""

import json
import math
import re

import pytest
import torch
from tiny import saved, tiny_model

from fastprune.errors import NumericalError
from fastprune.kernels import AdamW
from fastprune.recover import loop
from fastprune.recover.batches import Counted
from fastprune.recover.freeze import make_schedule
from fastprune.recover.guard import LOSS_LIMIT, Guard, GuardState, bits, poison
from fastprune.recover.recipes import Stage


@pytest.mark.parametrize("value", [math.nan, math.inf, 2 * LOSS_LIMIT])
def test_a_bad_loss_poisons_every_gradient(value):
    w = torch.nn.Parameter(torch.ones(3))
    loss = w.sum() * 0 + value
    poison(loss).backward()
    assert not w.grad.isfinite().any()


def test_a_good_loss_is_left_alone():
    w = torch.nn.Parameter(torch.ones(3))
    poison(w.square().sum()).backward()
    assert torch.equal(w.grad, 2 * torch.ones(3))


class Training:
    """Two weights, an optimizer, a guard; `step` gives the gradient that it is told to."""

    def __init__(self, patience=3, rollbacks=2, delay=0, scale=None):
        self.model = torch.nn.Linear(2, 1, bias=False)
        pairs = list(self.model.named_parameters())
        self.optimizer = AdamW(pairs, lr=0.1, loss_scale=scale)
        self.schedule = make_schedule(
            Stage(schedule="constant", warmup_steps=0), self.optimizer, 99
        )
        self.guard = Guard(
            self.model, self.optimizer, self.schedule,
            patience=patience, rollbacks=rollbacks, delay=delay,
        )  # fmt: skip
        self.guard.keep(0)
        self.at = 0

    def step(self, gradient):
        self.at += 1
        self.model.weight.grad = torch.full((1, 2), gradient)
        self.optimizer.step()
        self.schedule.step()
        return self.guard.look(self.at)

    @property
    def weight(self):
        return self.model.weight.detach().clone()


def test_single_bad_steps_change_nothing_and_need_nothing():
    training = Training()
    for gradient in (1.0, 0.5):
        assert not training.step(gradient)
        before = training.weight
        assert not training.step(math.nan)
        assert not training.step(math.inf)
        assert torch.equal(training.weight, before)
    assert training.guard.state == GuardState(skipped=4, in_a_row=2)


def test_several_in_a_row_bring_back_the_good_state_at_half_the_rate():
    training = Training()
    training.step(1.0)
    training.guard.keep(1)
    good = training.weight
    moments = training.optimizer.state[training.model.weight]["exp_avg"].clone()
    training.step(1.0)
    assert [training.step(math.nan) for _ in range(3)] == [False, False, True]
    assert torch.equal(training.weight, good)
    assert torch.equal(training.optimizer.state[training.model.weight]["exp_avg"], moments)
    assert training.optimizer.param_groups[0]["lr"] == 0.05
    assert int(training.optimizer.skipped_steps) == 3  # the count is of the run, not of the state
    training.step(1.0)
    assert training.optimizer.param_groups[0]["lr"] == 0.05  # the schedule knows of it
    assert not torch.equal(training.weight, good)


def test_a_state_that_no_sound_pass_has_proved_is_not_brought_back():
    training = Training()
    training.step(1.0)
    proved = training.weight
    training.guard.keep(1)
    training.step(1.0)
    training.guard.keep(2)  # the weights from which on every pass is bad
    assert [training.step(math.nan) for _ in range(3)] == [False, False, True]
    assert torch.equal(training.weight, proved)
    assert [training.step(math.nan) for _ in range(3)] == [False, False, True]
    assert torch.equal(training.weight, proved)


def test_it_gives_up_with_the_good_state_in_place():
    training = Training(rollbacks=1)
    good = training.weight
    training.step(1.0)
    for _ in range(2):
        assert not training.step(math.nan)
    assert training.step(math.nan)
    training.step(1.0)
    training.step(math.nan), training.step(math.nan)
    with pytest.raises(NumericalError, match="Lower --lr"):
        training.step(math.nan)
    assert torch.equal(training.weight, good)


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("first", range(4))
def test_bad_steps_in_a_row_are_seen_as_late_as_the_reading(delay, first):
    """Wherever they begin, and however often."""
    training = Training(patience=3, delay=delay)
    good = training.weight
    for _ in range(first):
        assert not training.step(1.0)
    for returns in (1, 2):
        late = [training.step(math.nan) for _ in range(3 + delay)]
        assert late == [False] * (2 + delay) + [True]
        assert training.guard.state.rollbacks == returns
        assert torch.equal(training.weight, good)
    assert training.guard.state.skipped == 2 * (3 + delay)
    assert not any(training.step(math.nan) for _ in range(2))
    assert not any(training.step(1.0) for _ in range(4))  # not a third time: they were two


def test_a_sound_step_ends_what_a_late_reading_would_act_on():
    training = Training(patience=3, delay=1)
    for gradient in (1.0, math.nan, math.nan, math.nan):
        assert not training.step(gradient)
    before = training.weight
    assert not training.step(1.0)
    assert not torch.equal(training.weight, before)  # not brought back
    assert not any(training.step(gradient) for gradient in (math.nan, math.nan, 1.0))
    assert training.guard.state.rollbacks == 0


def test_a_late_reading_proves_no_state_kept_since():
    training = Training(patience=3, delay=1)
    training.step(1.0)
    proved = training.weight
    training.guard.keep(1)
    training.step(1.0)
    training.step(1.0)  # reads that the step after the state was sound
    training.guard.keep(3)
    assert [training.step(math.nan) for _ in range(4)] == [False, False, False, True]
    assert torch.equal(training.weight, proved)


def test_a_loss_scale_that_looks_for_its_place_is_no_trouble():
    training = Training(scale="dynamic")
    assert not any(training.step(math.inf) for _ in range(16))  # 65536 to 1
    assert any(training.step(math.inf) for _ in range(3))  # it cannot get any smaller


def test_a_return_brings_back_the_loss_scale_and_not_the_count():
    training = Training(patience=3, scale="dynamic")
    before = float(training.optimizer.loss_scale)
    steps = 0
    while not training.step(math.nan):  # halved at every step, down to 1, then three in a row
        steps += 1
        assert steps < 100
    assert float(training.optimizer.loss_scale) == before
    assert int(training.optimizer.skipped_steps) == steps + 1


# ---------------------------------------------------------------------------- in a run


@pytest.fixture
def gradients(monkeypatch):
    """Replace the gradients of some steps of the command's run by a value."""
    from fastprune.recover import pipeline

    original = pipeline.Course

    def use(value, steps):
        def hook(step, model):
            if step in steps:
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.fill_(value)

        monkeypatch.setattr(
            pipeline, "Course", lambda *a, **o: original(*a, **o | {"gradient_hook": hook})
        )

    return use


def test_faults_here_and_there(finetune, gradients, tmp_path):
    gradients(math.nan, {2, 5})
    status, table, stderr = finetune("--max-steps", "8", "--guard-steps", "2")
    assert status == 0, stderr
    assert re.search(r"steps +skipped", table) and re.search(r"finetune +0\.001 +8 +2 ", table)
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
    stage = metrics["stages"][0]
    assert (stage["skipped_steps"], stage["rollbacks"]) == (2, 0)
    assert metrics["perplexity"][0]["after"] < metrics["perplexity"][0]["before"]


@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_of_faults_is_survived(finetune, gradients, tmp_path, monkeypatch, delay):
    monkeypatch.setattr(
        loop, "Guard", lambda *args, **options: Guard(*args, **options | {"delay": delay})
    )
    gradients(math.inf, range(3, 6 + delay))
    status, _, stderr = finetune("--max-steps", "8", "--guard-steps", "3")
    assert status == 0, stderr
    assert "learning rate halved" in stderr
    stage = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())["stages"][0]
    assert (stage["rollbacks"], stage["lr_factor"]) == (1, 0.5)


def test_a_hopeless_run_stops_and_keeps_the_good_state(finetune, gradients, tmp_path):
    gradients(math.nan, range(4, 100))
    status, _, stderr = finetune(
        "--max-steps", "20", "--guard-steps", "2", "--guard-rollbacks", "1"
    )
    assert status == 4
    assert "halved" in stderr
    out = tmp_path / "out"
    assert not (out / "config.json").exists()
    assert list((out / "fastprune/state/stage-0").glob("checkpoint-*"))


def test_a_run_that_gave_up_says_so_and_goes_on_when_told(finetune, gradients, tmp_path):
    flags = ["--max-steps", "12", "--guard-steps", "2", "--guard-rollbacks", "1"]
    flags += ["--device", "cpu"]  # elsewhere the guard reads one step late
    gradients(math.nan, range(4, 100))
    assert finetune(*flags)[0] == 4
    (good,) = (tmp_path / "out/fastprune/state/stage-0").glob("checkpoint-*")
    gradients(math.nan, ())
    for change in ((), ("--weight-decay", "0.1")):
        status, _, stderr = finetune(*flags, *change)
        assert status == 4
        assert stderr.count("\n") == 1
        assert "holds a run that gave up at step 8: 2 steps in a row" in stderr
        assert "--resume never and a lower --lr" in stderr
        assert f"--resume {good}" in stderr
    gradients(math.nan, {8, 9})  # it may return once again
    status, _, stderr = finetune(*flags, "--resume", str(good))
    assert status == 0, stderr
    stage = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())["stages"][0]
    assert (stage["steps"], stage["rollbacks"], stage["lr_factor"]) == (12, 1, 0.25)


def test_a_run_that_gave_up_begins_anew(finetune, gradients, tmp_path):
    flags = ["--max-steps", "4", "--guard-steps", "1", "--guard-rollbacks", "0"]
    flags += ["--device", "cpu"]  # elsewhere a single bad step goes unnoticed
    gradients(math.nan, {2})
    assert finetune(*flags)[0] == 4
    gradients(math.nan, ())
    assert finetune(*flags, "--lr", "1e-4", "--resume", "never")[0] == 0
    assert (
        json.loads((tmp_path / "out/fastprune/metrics.json").read_text())["stages"][0]["lr"] == 1e-4
    )


def test_a_run_of_skipped_steps_alone_keeps_nothing(finetune, gradients, tmp_path):
    gradients(math.nan, range(100))
    status, _, stderr = finetune("--max-steps", "4", "--save-steps", "2", "--device", "cpu")
    assert status == 4
    assert "0 of 4 steps changed the weights: 4 had a non-finite loss or gradient" in stderr
    assert "step 4 of 4, mean loss" in stderr and "1 skipped for a non-finite" in stderr
    out = tmp_path / "out"
    assert not (out / "config.json").exists() and not (out / "fastprune/metrics.json").exists()
    again = finetune("--max-steps", "4", "--save-steps", "2", "--device", "cpu")
    assert again[0] == 4 and "0 of 4 steps" in again[2]  # not a finished run to be continued


def test_a_model_without_a_finite_loss_trains_nothing(finetune, tmp_path):
    model = tiny_model("llama", layers=2)
    with torch.no_grad():  # the product of the two is beyond fp32, and no weight is
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e15)
    source = saved(tmp_path / "overflowing", model)
    flags = ["--max-steps", "4", "--eval-windows", "0", "--precision", "fp32"]
    status, _, stderr = finetune(*flags, source=source)
    assert status == 4 and "0 of 4 steps changed the weights" in stderr
    assert "no finite loss since the last line" in stderr and "nan" not in stderr


@pytest.mark.parametrize(("dtype", "lr", "told"), [
    ("float32", "1e-30", "too small for the weights' precision"),
    ("bfloat16", "1e-8", "by as much as bfloat16 can hold"),
])  # fmt: skip
def test_steps_that_round_to_nothing_keep_nothing(finetune, tmp_path, dtype, lr, told):
    source = saved(tmp_path / "m", tiny_model("llama", layers=2).to(getattr(torch, dtype)))
    flags = ["--max-steps", "2", "--precision", "fp32", "--lr", lr]
    status, _, stderr = finetune(*flags, source=source)
    assert status == 4 and "0 of 2 steps" in stderr and told in stderr
    assert not (tmp_path / "out/config.json").exists()


def test_the_bits_tell_any_change():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.linspace(-3, 3, 35, dtype=torch.float32).to(dtype).reshape(5, 7).t()
        before = bits([weight])
        assert before == bits([weight.clone()])
        weight[2, 3] += weight[2, 3].abs() / 64
        assert bits([weight]) != before
    assert bits([torch.full((3,), 0.0)]) != bits([torch.full((3,), -0.0)])


def test_batches_without_labels_are_skipped(finetune, tmp_path):
    data = tmp_path / "long-prompts.jsonl"
    row = {"prompt": "a river " * 40, "response": "yes"}
    good = {"prompt": "q", "response": "the mill turns its wheel in spring"}
    data.write_text("".join(json.dumps(r | {"n": i}) + "\n" for i in range(4) for r in (row, good)))
    status, _, stderr = finetune("--max-steps", "3", data=data)
    assert status == 0, stderr


def test_masked_batches_change_nothing():
    def collate(samples):
        return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}

    ids = torch.arange(6)
    batch = Counted(collate)([{"input_ids": ids, "labels": torch.full((6,), -100)}] * 2)
    assert (batch["items"], batch["tokens"]) == (0, 12)
    first_only = torch.tensor([3, -100, -100, -100, -100, -100])  # never predicted
    assert Counted(collate)([{"input_ids": ids, "labels": first_only}])["items"] == 0
    assert Counted(collate, aligned=True)([{"input_ids": ids, "labels": first_only}])["items"] == 1


def test_weights_of_a_tiny_model_are_finite_whatever_the_rate():
    """fp16 weights at a rate where torch.optim.AdamW is NaN after one step (facts of its eps)."""
    from fastprune.recover.loss import next_token_loss

    model = tiny_model("llama", layers=2).half()
    optimizer = AdamW(list(model.named_parameters()), lr=1e-3, loss_scale="dynamic")
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        optimizer.scale(next_token_loss(hidden, model.lm_head, ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
