"""What a loss curve says: flat, jumping, oscillating, overfitting. Pure arithmetic on numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean, pstdev
from typing import Any

from fastprune.messages import Message
from fastprune.report import format

SMOOTHING = 0.9  # weight of the past in the running mean of the loss
WINDOW = 20  # logged losses that flatness and oscillation are judged by
JUMP = 1.5  # times the running mean
JUMP_LEAST = 0.5  # nats: below, a jump is noise however large its factor
FLAT = 0.005  # relative change between the halves of the window
HIGH = 3.0  # nats: a flat loss above this is not a finished one (perplexity 20)
OSCILLATION = 0.15  # spread around the trend, relative to the mean
BROKEN = 2.0  # times the lowest running mean: not a state to come back to

NAMES = {
    "flat": Message("flat"),
    "jump": Message("jump"),
    "oscillation": Message("oscillation"),
    "overfitting": Message("overfitting"),
}
ADVICE = {
    "flat": Message(
        "the loss is flat and high: raise --lr, shorten the warm-up, or use a smaller batch"
    ),
    "jump": Message("the loss jumped: lower --lr or --max-grad-norm, or lengthen the warm-up"),
    "oscillation": Message(
        "the loss oscillates: use a larger batch (--grad-accum) or a lower --lr"
    ),
    "overfitting": Message(
        "validation gets worse while training gets better: the best weights are kept; train fewer "
        "steps, or on more data"
    ),
}


@dataclass
class Monitor:
    """Reads the losses as they are logged; `finding` is what it has to say, each kind once.

    All of it is plain data, saved with a checkpoint, so a resumed run says what the uninterrupted
    one would have said.
    """

    losses: list[float] = field(default_factory=list)
    """the last WINDOW logged training losses"""
    smooth: float | None = None
    lowest: float | None = None
    best: float | None = None
    """best validation figure so far"""
    best_step: int = 0
    since_best: int = 0
    """evaluations since then"""
    train_at_best: float | None = None
    lowest_loss: float | None = None
    """lowest validation loss so far"""
    since_lowest: int = 0
    """evaluations since then"""
    said: dict[str, int] = field(default_factory=dict)
    """findings so far, with the step of the first of each kind"""

    def train(self, step: int, loss: float | None) -> str | None:
        """Take a logged training loss, None where no step of it was sound; a new finding's name."""
        if loss is None or not math.isfinite(loss):
            return None
        found = None
        if self.smooth is not None and loss > max(JUMP * self.smooth, self.smooth + JUMP_LEAST):
            found = "jump"
        self.smooth = (
            loss if self.smooth is None else (SMOOTHING * self.smooth + (1 - SMOOTHING) * loss)
        )
        self.lowest = self.smooth if self.lowest is None else min(self.lowest, self.smooth)
        self.losses = [*self.losses, loss][-WINDOW:]
        if found is None and len(self.losses) == WINDOW:
            found = self._shape()
        return self._say(found, step)

    def _shape(self) -> str | None:
        """Flat or oscillating, by the last WINDOW losses."""
        half = WINDOW // 2
        first, second = mean(self.losses[:half]), mean(self.losses[half:])
        center = mean(self.losses)
        slope = (second - first) / half
        residues = [x - slope * i for i, x in enumerate(self.losses)]
        if pstdev(residues) > OSCILLATION * center:
            return "oscillation"
        if center > HIGH and abs(second - first) < FLAT * center:
            return "flat"
        return None

    def validation(self, step: int, figure: float, loss: float | None = None) -> str | None:
        """Take a validation figure, of which lower is better; a new finding's name.

        `loss` is the validation loss where the figure is another one. It is overfitting when both
        have got worse twice while the training loss fell: a loss alone may rise while answers get
        better, and answers may be as bad as before while the loss falls.
        """
        loss = figure if loss is None else loss
        if math.isfinite(loss) and (self.lowest_loss is None or loss < self.lowest_loss):
            self.lowest_loss, self.since_lowest = loss, 0
        else:
            self.since_lowest += 1
        if math.isfinite(figure) and (self.best is None or figure < self.best):
            self.best, self.best_step, self.since_best = figure, step, 0
            self.train_at_best = self.smooth
            return None
        self.since_best += 1
        learning = (
            self.smooth is not None
            and self.train_at_best is not None
            and self.smooth < self.train_at_best
        )
        worse = min(self.since_best, self.since_lowest) >= 2
        return self._say("overfitting" if learning and worse else None, step)

    def evaluation(self, step: int, line: Mapping[str, Any]) -> str:
        """What to say of the evaluation `line` of a step, as train_log.jsonl has it."""
        loss, bleu = line.get("eval_loss"), line.get("eval_bleu")
        perplexity = line.get("eval_perplexity")
        found = [
            f"step {step}",
            "" if loss is None else f"validation loss {loss:.4f}",
            "" if perplexity is None else f"perplexity {perplexity:.4f}",
            "" if bleu is None else f"BLEU-4 {format.bleu(bleu)}",
            "the best so far" if self.best_step == step else "",
        ]
        return ", ".join(filter(None, found))

    def sound(self) -> bool:
        """Whether the training is in a state worth coming back to."""
        if self.smooth is None or self.lowest is None:
            return True
        return self.smooth <= max(BROKEN * self.lowest, self.lowest + JUMP_LEAST)

    def _say(self, finding: str | None, step: int) -> str | None:
        if finding is None or finding in self.said:
            return None
        self.said[finding] = step
        return finding
