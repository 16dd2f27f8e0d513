"""The training loop on tensors: what a step computes, when it stops, what it keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, token_ids
from torch.nn import functional as F

from fastprune.data.training import Collator
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.evaluation import Samples
from fastprune.recover.loop import Hooks, Loop
from fastprune.recover.objective import Objective
from fastprune.recover.recipes import Stage


def samples(n, s=16, seed=0, masked=()):
    ids = token_ids(n, s, seed)
    return [
        {"input_ids": row, "labels": torch.full_like(row, -100) if i in masked else row.clone()}
        for i, row in enumerate(ids)
    ]


@pytest.fixture
def loop(tmp_path):
    """The loop of a tiny model; `lines` are those of its log."""

    def make(train, *, validation=None, model=None, config=None, hook=None, steps=None, **settings):
        stage = Stage(**{"schedule": "constant", "warmup_steps": 0, "lr": 1e-3} | settings)
        config = config or FinetuneConfig(log_steps=1)
        objective = Objective(model or tiny_model("llama", layers=2))
        data = Samples(train, Collator(0), validation)
        lines = []
        hooks = Hooks(line=lines.append, gradients=hook)
        hooks = replace(hooks, steps=steps) if steps else hooks
        made = Loop(objective, stage, config, data, tmp_path, hooks)
        made.lines = lines
        return made

    return make


def plain_loss(model, rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    labels = torch.stack([row["labels"] for row in rows])
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def test_a_step_is_that_of_the_whole_batch(loop):
    rows = samples(4)
    model, peer = tiny_model("llama", layers=2), tiny_model("llama", layers=2)
    seen = {}

    def look(step, trained):
        seen.update({n: p.grad.clone() for n, p in trained.named_parameters()})

    made = loop(rows, model=model, batch_size=2, grad_accum=2, max_steps=1, hook=look)
    made.run()
    loss = plain_loss(peer, rows)
    loss.backward()
    # fp32 sums over 60 tokens in another order
    assert made.lines[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_count_by_their_tokens(loop):
    """Padding in one micro-batch must not give its tokens more weight than those of the other."""
    rows = samples(3)
    short = samples(1, s=5, seed=1)
    made = loop(rows + short, batch_size=2, grad_accum=2, max_steps=1)
    made.run()
    peer = tiny_model("llama", layers=2)
    mean = (45 * plain_loss(peer, rows) + 4 * plain_loss(peer, short)) / 49
    assert made.lines[0]["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert made.lines[0]["tokens"] == 3 * 16 + 5


def test_masked_batches_change_nothing(loop, caplog):
    rows = samples(2, masked=(0, 1))
    model = tiny_model("llama", layers=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = loop(rows, model=model, batch_size=2, grad_accum=1, max_steps=2, weight_decay=0.5)
    made.run()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert made.state.masked_batches == 2
    assert caplog.text.count("all labels are masked") == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e7])
def test_a_bad_loss_is_logged_as_none_and_skipped(loop, value):
    made = loop(samples(8), batch_size=2, grad_accum=1, max_steps=4)
    usual = made.objective.within

    def within(inputs, items):
        loss = usual(inputs, items)
        return loss + value if made.state.step == 2 else loss

    made.objective.within = within
    made.run()
    assert [line["loss"] is None for line in made.lines] == [False, False, True, False]
    assert [line["skipped"] for line in made.lines] == [0, 0, 1, 1]


def test_early_stop_and_the_best_weights(loop):
    """Validation on other random tokens only gets worse: the first evaluation is the best one."""
    model = tiny_model("llama", layers=2)
    kept = {}

    def hook(step, trained):
        if step == 2:
            kept.update({n: p.detach().clone() for n, p in trained.named_parameters()})

    made = loop(
        samples(4), validation=samples(4, seed=9), model=model, hook=hook, lr=1e-2,
        batch_size=4, grad_accum=1, max_steps=50, eval_steps=2, early_stop=3,
    )  # fmt: skip
    made.run()
    made.finish()
    assert made.state.stopped == "no improvement in 3 evaluations"
    assert made.state.monitor.best_step == 2
    assert made.state.step == 8
    made.checkpoints.read_best()
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_validation_loss_is_the_mean_over_tokens(loop):
    rows, short = samples(3, seed=3), samples(2, s=5, seed=4)
    made = loop(samples(4), validation=rows + short, batch_size=2, max_steps=1, eval_steps=1)
    found = made.evaluate()["eval_loss"]
    peer = tiny_model("llama", layers=2)
    mean = (45 * plain_loss(peer, rows) + 8 * plain_loss(peer, short)) / 53
    assert found == pytest.approx(mean.item(), rel=1e-5)  # fp32 sums in another order


def test_nothing_to_measure_is_no_evaluation(loop):
    made = loop(samples(4), batch_size=2, grad_accum=1, max_steps=2, eval_steps=1)
    made.run()
    made.finish()
    assert [set(line) >= {"loss"} for line in made.lines] == [True, True]
    assert made.evaluated == {}


def test_stops_when_the_loss_is_low_enough(loop):
    made = loop(samples(2), batch_size=2, grad_accum=1, max_steps=200, lr=1e-2, stop_loss=2.0)
    made.run()
    assert made.state.stopped == "the mean loss is below 2"
    assert made.state.step < 200


def test_old_checkpoints_go(loop, tmp_path):
    made = loop(samples(8), batch_size=1, grad_accum=1, max_steps=7, save_steps=2, keep_last=2)
    made.run()
    made.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]


def test_recomputed_activations_give_the_same_gradients(loop):
    from fastprune.recover.stage import _recompute_activations

    found = []
    for recompute in (False, True):
        model = tiny_model("llama", layers=2)
        if recompute:
            _recompute_activations(model)

        def look(step, trained):
            found.append({n: p.grad.clone() for n, p in trained.named_parameters()})

        loop(samples(2), model=model, hook=look, batch_size=2, grad_accum=1, max_steps=1).run()
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one-cycle"])
@pytest.mark.parametrize("total", [6, 14])
def test_another_number_of_steps_on_the_way(loop, schedule, total):
    """From then on the rates are those of a run that was planned so from the first step."""

    def steps(step, seconds):
        return total if step == 4 else None

    common = {"batch_size": 2, "grad_accum": 1, "schedule": schedule, "warmup_steps": 2}
    first = loop(samples(30), max_steps=10, **common)
    first.run()
    changed = loop(samples(30), max_steps=10, steps=steps, **common)
    changed.run()
    planned = loop(samples(30), max_steps=total, **common)
    planned.run()
    rates, before, after = (
        [line["lr"] for line in made.lines] for made in (changed, first, planned)
    )
    assert len(rates) == changed.steps == total
    assert rates[:4] == before[:4]
    assert rates[4:] == pytest.approx(after[4:], rel=1e-9)
