"""How the minutes are spent: what each part takes, as a multiple of one measurement.

The unit is the time that the dense model takes to read 16,384 tokens in windows of 1,024, which is
measured first, with bf16 products where they are fast. The multiples were read off runs of
SmolLM2-135M on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastprune.errors import InputError

Effort = Literal["fast", "balanced", "thorough"]
PRUNING: dict[Effort, float] = {"fast": 10.0, "balanced": 70.0, "thorough": 120.0}
"""Scoring, planning and refitting, in units."""
HURRIED, HURRY = 64, 0.18
"""Calibration windows of `fast` where it would take more than HURRY of the minutes: half as many,
in half the time, which is worth more in training."""
SHARE = 0.36
"""Of the minutes, at most, for pruning beyond `fast`."""
LEAST_RECOVERY = 2.0
"""Units below which finetuning is not worth its loading."""
TOKENS: dict[Effort, int] = {"fast": 120_000, "balanced": 400_000, "thorough": 1_200_000}
"""That the recovery reads where no minutes are given."""
UNIT_TOKENS = 16_384
LOADING = 0.95
"""Of the time for the recovery, what is left to train."""


@dataclass(frozen=True)
class Pace:
    """What was measured on the dense model: seconds of a unit, and of the whole measurement."""

    unit: float
    measuring: float


def effort_for(minutes: float | None, pace: Pace, rounds: int = 1) -> Effort:
    """The most thorough pruning that leaves most of the minutes for the recovery."""
    if minutes is None:
        return "balanced"
    for effort in ("thorough", "balanced"):
        if rounds * PRUNING[effort] * pace.unit <= SHARE * 60 * minutes:
            return effort
    return "fast"


def is_hurried(minutes: float | None, pace: Pace, rounds: int = 1) -> bool:
    """Whether `minutes` are so few that even the quickest pruning should take less of them."""
    return minutes is not None and rounds * PRUNING["fast"] * pace.unit > HURRY * 60 * minutes


def least_minutes(pace: Pace, rounds: int = 1) -> float:
    """What the whole command takes with the quickest pruning and the shortest useful recovery."""
    # Measured are the dense, the pruned and the recovered model, the latter with its speed.
    each = pace.measuring + (PRUNING["fast"] / 2 + LEAST_RECOVERY) * pace.unit
    return (2 * pace.measuring + rounds * each) / 60


def check_minutes(minutes: float | None, pace: Pace, rounds: int = 1, *, sure: bool = True) -> None:
    """InputError where `minutes` are too few; by half at least where `pace` is a guess."""
    least = least_minutes(pace, rounds)
    if minutes is not None and minutes < (least if sure else least / 2):
        raise InputError(
            f"--minutes {minutes:g} is too short for this model on this machine; give at least "
            f"{least:.1f}"
        )


def afterwards(pace: Pace) -> float:
    """Seconds from the end of the training to the end of the command.

    Merging, and measuring the result; the dense model is loaded again to measure the speed of both.
    """
    return 1.4 * pace.measuring + 0.5 * pace.unit


def recovery_minutes(minutes: float, spent: float, after: float) -> float:
    """Minutes to train when `spent` seconds are gone and `after` seconds are yet to come.

    Less what loading and tokenising take before the first step.
    """
    return (60 * minutes - spent - after) / 60 * LOADING
