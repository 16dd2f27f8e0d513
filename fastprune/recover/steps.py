"""How many optimizer steps a stage comes to, and what a step holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastprune.distributed import ALONE, Processes
from fastprune.recover.recipes import Stage

USUAL_WARMUP, USUAL_BATCH = (0.10, 0.15), (64, 96)
"""Share of the steps, and samples a step, that supervised finetuning on answers usually takes."""


@dataclass(frozen=True)
class StepCounts:
    """What the steps of `stage` over so many training `samples` come to for all `processes`."""

    stage: Stage
    samples: int
    processes: Processes = ALONE

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each process takes in one pass over the samples."""
        return math.ceil(self.samples / self._samples_per_pass)

    @property
    def per_epoch(self) -> int:
        """Optimizer steps of one pass over the samples."""
        return max(1, math.ceil(self.batches_per_epoch / self.stage.grad_accum))

    @property
    def total(self) -> int:
        """Optimizer steps of the stage."""
        return self.stage.max_steps or math.ceil(self.stage.epochs * self.per_epoch)

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self._samples_per_pass * self.stage.grad_accum

    @property
    def _samples_per_pass(self) -> int:
        return self.stage.batch_size * self.processes.count

    def describe(self) -> str:
        """The batch of one optimizer step in words."""
        parts = [f"{self.stage.batch_size} a pass", f"{self.stage.grad_accum} passes a step"]
        if self.processes.several:
            parts.append(f"{self.processes.count} processes")
        return ", ".join([*parts, f"{self.samples_per_step} samples a step"])

    def unusual_for_answers(self) -> list[str]:
        """Where the stage differs from how answers are usually learnt, and flags that change it."""
        found = []
        share = self.stage.warmup_ratio
        if self.stage.warmup_steps is not None:
            share = self.stage.warmup_steps / self.total
        least, most = USUAL_WARMUP
        if not least <= share <= most:
            found.append(
                f"a warm-up of {100 * least:.0f}–{100 * most:.0f} % of the steps, here "
                f"{100 * share:.0f} % (--warmup-ratio 0.12)"
            )
        fewest, largest = USUAL_BATCH
        if not fewest <= self.samples_per_step <= largest and self.samples >= fewest:
            passes = max(1, math.ceil(fewest / self._samples_per_pass))
            found.append(
                f"{fewest}–{largest} samples a step, here {self.samples_per_step} "
                f"(--grad-accum {passes})"
            )
        return found
