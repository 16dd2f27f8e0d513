"""How long a step of a stage takes, and so how many fit into a given time."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastprune.progress import log as progress_log
from fastprune.recover.folder import RunFolder
from fastprune.recover.objective import Objective
from fastprune.recover.processes import is_first_process
from fastprune.recover.recipes import Stage
from fastprune.report.format import duration

WORTH_REPEATING = 30.0
"""Seconds. A first pass is slow, since its memory is new; a shorter one than this is done again."""
PASSES = 3
"""Timed after the first one where a number of steps depends on it; the median counts."""
BESIDE = 1.08
"""A step takes longer than its passes: the optimizer, the guard, the batches."""


def stage_within(
    objective: Objective, stage: Stage, batch: dict[str, Any], number: int, folder: RunFolder
) -> Stage:
    """`stage` with as many steps as `stage.minutes` have room for; a resumed run takes as many as
    it began with, so that it ends alike."""
    assert stage.minutes is not None
    decided = folder.record.setdefault("timed_steps", {})
    if str(number) not in decided:
        seconds = seconds_per_step(objective, stage, batch, passes=PASSES) * BESIDE
        steps = max(1, int(60 * stage.minutes / seconds))
        decided[str(number)] = steps
        progress_log.info(
            "%s: %d steps of %s in %g minutes", stage.name, steps, duration(seconds), stage.minutes
        )
        if is_first_process():
            folder.save()
    return replace(stage, max_steps=decided[str(number)])


def seconds_per_step(
    objective: Objective, stage: Stage, batch: dict[str, Any], passes: int = 1
) -> float:
    """Time of an optimizer step, by forward and backward passes whose gradients are thrown away.

    `batch` is one of the stage's; the random state and the weights stay as they are.
    """
    inputs = {k: v for k, v in batch.items() if k not in ("items", "tokens")}
    device = next(objective.model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        objective.model.train()
        first = _timed(objective, inputs)
        again = passes if first < WORTH_REPEATING else 0
        times = sorted(_timed(objective, inputs) for _ in range(again)) or [first]
    objective.model.zero_grad(set_to_none=True)
    return times[len(times) // 2] * stage.grad_accum


def _timed(objective: Objective, batch: dict[str, Any]) -> float:
    start = time.perf_counter()
    loss: Tensor = objective(batch)
    loss.backward()
    float(loss.detach())  # waits for the device
    return time.perf_counter() - start
