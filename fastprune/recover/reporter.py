"""What people see of a stage while it trains: a bar, a line each tenth of the way and epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from fastprune.progress import log as progress_log
from fastprune.progress import track
from fastprune.report import format

TENTHS = 10  # progress lines of a stage
LARGEST_EXPONENT = 700.0  # beyond, exp is no number


class Reporter:
    """Speaks of the stage `name` of `steps` optimizer steps, which goes on after `step`.

    `skipped` steps had no effect before.
    """

    def __init__(self, name: str, steps: int, step: int, skipped: int) -> None:
        self.name = name
        self._skipped = skipped
        self._since: list[float] = []  # losses since the last line
        self._rate: float | None = None
        self._bar: Iterator[int] = iter(())
        self.plan(steps, step)

    def plan(self, steps: int, step: int) -> None:
        """There are `steps` in all, of which `step` are done."""
        self.close()
        self.steps = steps
        self._tenth = TENTHS * step // max(1, steps)
        self._bar = track(range(step, steps), self.name, steps, step)
        next(self._bar, None)

    def close(self) -> None:
        """Take the bar away."""
        if isinstance(self._bar, Generator):
            self._bar.close()

    def step(self) -> None:
        """A step is done."""
        next(self._bar, None)

    def logged(self, step: int, loss: float | None, rate: float, skipped: int) -> None:
        """A line each tenth of the way, with the mean loss since the last one.

        `loss` is that of the steps since the last call, None where no one was finite; `skipped`
        counts the steps without effect so far.
        """
        self._rate = rate
        if loss is not None and loss == loss:
            self._since.append(loss)
        tenth = TENTHS * step // max(1, self.steps)
        if tenth == self._tenth:
            return
        newly = skipped - self._skipped
        progress_log.log(
            logging.INFO if self._since else logging.WARNING,
            "%s: %d %%, step %d of %d, %s%s, lr %.3g",
            self.name,
            round(100 * step / max(1, self.steps)),
            step,
            self.steps,
            f"mean loss {sum(self._since) / len(self._since):.4f}"
            if self._since
            else "no finite loss since the last line",
            f", {newly} skipped for a non-finite loss or gradient" if newly else "",
            rate,
        )
        self._tenth, self._skipped, self._since = tenth, skipped, []

    def epoch(
        self, epoch: float, step: int, loss: float | None, measured: Mapping[str, Any]
    ) -> None:
        """What the epoch came to, as far as it is measured.

        `epoch` counts passes over the data, `loss` is the mean over the steps of this one, and
        `measured` may hold eval_loss, eval_perplexity, and bleu with the step it is of.
        """
        parts = ["no finite loss" if loss is None else f"mean loss {loss:.4f}"]
        if (found := measured.get("eval_loss")) is not None:
            perplexity = math.exp(found) if found < LARGEST_EXPONENT else math.inf
            shown = format.perplexity(perplexity)
            parts.append(f"validation loss {found:.4f} (perplexity {shown})")
        elif "eval_perplexity" in measured:
            parts.append(f"perplexity {format.perplexity(measured['eval_perplexity'])}")
        if bleu := measured.get("bleu"):
            of = "" if bleu["step"] == step else f" at step {bleu['step']}"
            parts.append(f"BLEU-4 {format.bleu(bleu['bleu'])}{of}")
        if self._rate is not None:
            parts.append(f"lr {self._rate:.3g}")
        whole = round(epoch, 6).is_integer()
        where = f"epoch {epoch:.0f} ends" if whole else f"it ends at epoch {epoch:.2g}"
        progress_log.info("%s: %s, step %d: %s", self.name, where, step, ", ".join(parts))
