"""The model that is pruned, in memory or on disk: what a run does with either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprune.inspect.perplexity import Perplexity, evaluate, sound
from fastprune.models.streamed import StreamedModel
from fastprune.pruning import stream
from fastprune.pruning.compensation import compensate
from fastprune.pruning.plan import Plan
from fastprune.pruning.surgery import apply_plan
from fastprune.report.run import Clock


@dataclass
class Subject:
    """A model whose weights are in memory, or in files behind ``source``.

    ``model`` has sizes only where there is a ``source``; the result then goes to ``directory``.
    """

    model: nn.Module
    source: StreamedModel | None = None
    directory: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device if self.source is None else self.source.device

    def perplexity(self, windows: Tensor) -> Perplexity:
        """Of the model before it is cut. Raises NumericalError when it is not a number."""
        what = "the loss of the model"
        if self.source is None:
            return sound(evaluate(self.model, windows), self.model, what)
        return sound(stream.evaluate(self.source, windows), self.model, what)

    def cut(self, plan: Plan, calibration: Tensor | None, clock: Clock) -> None:
        """Apply ``plan``; what is kept is refitted on the windows ``calibration``, if given."""
        if self.source is not None:
            assert self.directory is not None  # run_prune has seen --out or --dry-run
            with clock("surgery"):
                stream.cut(self.source, plan, calibration, self.directory)
            return
        if calibration is not None:
            with clock("compensate"):
                compensate(self.model, plan, calibration)
        with clock("surgery"):
            apply_plan(self.model, plan)

    def perplexity_after(self, windows: Tensor) -> Perplexity:
        """Of what was cut. Raises NumericalError when it is not a number."""
        what = "the loss of the pruned model"
        if self.source is None:
            return sound(evaluate(self.model, windows), self.model, what)
        assert self.directory is not None
        written = StreamedModel(self.directory, device=str(self.device))
        return sound(stream.evaluate(written, windows), written.model, what)
