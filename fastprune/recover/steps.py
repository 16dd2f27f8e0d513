"""How many optimizer steps a stage comes to, and what a step holds."""

from __future__ import annotations

import math

from fastprune.recover.processes import world_size
from fastprune.recover.recipes import Stage

USUAL_WARMUP, USUAL_BATCH = (0.10, 0.15), (64, 96)
"""Share of the steps, and samples a step, that supervised finetuning on answers usually takes."""


def batches_per_epoch(stage: Stage, samples: int) -> int:
    """Batches that each process takes in one pass over `samples` training samples."""
    return math.ceil(samples / (stage.batch_size * world_size()))


def steps_per_epoch(stage: Stage, samples: int) -> int:
    """Optimizer steps of one pass over `samples` training samples."""
    return max(1, math.ceil(batches_per_epoch(stage, samples) / stage.grad_accum))


def total_steps(stage: Stage, samples: int) -> int:
    """Optimizer steps of the stage."""
    return stage.max_steps or math.ceil(stage.epochs * steps_per_epoch(stage, samples))


def samples_per_step(stage: Stage) -> int:
    """Samples of one optimizer step, over all processes."""
    return stage.batch_size * stage.grad_accum * world_size()


def describe(stage: Stage) -> str:
    """The batch of one optimizer step in words."""
    parts = [f"{stage.batch_size} a pass", f"{stage.grad_accum} passes a step"]
    if world_size() > 1:
        parts.append(f"{world_size()} processes")
    return ", ".join([*parts, f"{samples_per_step(stage)} samples a step"])


def unusual_for_answers(stage: Stage, samples: int) -> list[str]:
    """Where `stage` differs from how answers are usually learnt, and the flags that change it."""
    found = []
    share = stage.warmup_ratio
    if stage.warmup_steps is not None:
        share = stage.warmup_steps / total_steps(stage, samples)
    least, most = USUAL_WARMUP
    if not least <= share <= most:
        found.append(
            f"a warm-up of {100 * least:.0f}–{100 * most:.0f} % of the steps, here "
            f"{100 * share:.0f} % (--warmup-ratio 0.12)"
        )
    fewest, largest = USUAL_BATCH
    if not fewest <= samples_per_step(stage) <= largest and samples >= fewest:
        passes = max(1, math.ceil(fewest / (stage.batch_size * world_size())))
        found.append(
            f"{fewest}–{largest} samples a step, here {samples_per_step(stage)} "
            f"(--grad-accum {passes})"
        )
    return found
