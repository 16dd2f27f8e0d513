"""How long a step of a stage takes, and so how many fit into a given time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastprune.distributed import ALONE, Processes
from fastprune.progress import log as progress_log
from fastprune.recover.objective import Objective
from fastprune.recover.recipes import Stage
from fastprune.report.format import duration

WORTH_REPEATING = 30.0
"""Seconds. A first pass is slow, since its memory is new; a shorter one than this is done again."""
PASSES = 3
"""Timed after the first one where a number of steps depends on it; the median counts."""
BESIDE = 1.08
"""A step takes longer than its passes: the optimizer, the guard, the batches."""
CORRECTED_AFTER = (0.15, 0.5)
"""Shares of the steps decided at first after which their number is decided again."""
FEWEST = 3
"""Steps from which on their mean is worth more than the passes before them."""
WORTH_CORRECTING = 0.03
"""Of the steps; smaller changes are left."""


class Timetable:
    """How many steps of a stage fit into its `minutes`.

    A few passes before the first step decide it. The steps themselves correct it on the way, since
    the machine may have been busier or idler during those passes. `decided` is what was decided so
    far, as (step, steps in all from then on, seconds of training until then). It belongs to the
    record of the run, which `save` writes, and a resumed run decides alike. The `processes` that
    train together go by the mean of their times.
    """

    def __init__(
        self,
        minutes: float,
        decided: list[list[float]],
        save: Callable[[], None],
        processes: Processes = ALONE,
    ) -> None:
        self.minutes, self.decided, self._save = minutes, decided, save
        self.processes = processes

    def begin(self, measure: Callable[[], float]) -> None:
        """Decide by the seconds of a step that `measure` returns, unless that was done before."""
        if not self.decided:
            seconds = self._mean(measure() * BESIDE)
            steps = max(1, int(60 * self.minutes / seconds))
            self._decide(0, steps, 0.0)
            progress_log.info(
                "%d steps of %s in %g minutes", steps, duration(seconds), self.minutes
            )

    def steps(self, step: int) -> int:
        """The steps of the stage, as decided when `step` of them were done."""
        return next(int(total) for at, total, _ in reversed(self.decided) if at <= step)

    def look(self, step: int, seconds: float) -> int | None:
        """The steps of the stage from now on, where `step` of them, done in `seconds`, change it.

        All processes must call it.
        """
        before = self.steps(step - 1)
        if step > self.decided[-1][0] and step in self._due():
            at, _, then = self.decided[-1]
            seconds = self._mean(seconds)
            each = (seconds - then) / (step - at)
            left = int((60 * self.minutes - seconds) / max(each, 1e-9))
            steps = step + max(1, left)
            if abs(steps - before) < WORTH_CORRECTING * before:
                steps = before
            self._decide(step, steps, seconds)
            if steps != before:
                message = "%d steps instead of %d fit into %g minutes: a step takes %s"
                progress_log.info(message, steps, before, self.minutes, duration(each))
        after = self.steps(step)
        return None if after == before else after

    def _due(self) -> list[int]:
        first = self.decided[0][1]
        return [round(share * first) for share in CORRECTED_AFTER if share * first >= FEWEST]

    def _decide(self, step: int, steps: int, seconds: float) -> None:
        self.decided.append([step, steps, seconds])
        self._save()

    def _mean(self, seconds: float) -> float:
        """The mean of `seconds` over the processes, who so decide alike."""
        return self.processes.sums([seconds])[0] / self.processes.count


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
