"""What a stage is measured by while it trains: validation loss, BLEU, perplexity of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprune.inspect.perplexity import evaluate
from fastprune.recover.batches import Counted, load_batches
from fastprune.recover.held_out import bleu_of
from fastprune.recover.objective import Objective
from fastprune.recover.processes import total
from fastprune.recover.recipes import Stage


@dataclass(frozen=True)
class Samples:
    """What a stage learns from and is measured on; data sets are map-style, of {input_ids, labels}.

    `collate` makes batches of them, `tokenizer` reads answers where BLEU is measured, and `windows`
    (n, s) are token ids whose perplexity stands in where there is no validation set.
    """

    train: Any
    collate: Callable[..., Any]
    validation: Any = None
    windows: Tensor | None = None
    tokenizer: Any = None


class Evaluation:
    """Measures the model of `objective`; all processes must call what it offers."""

    def __init__(self, objective: Objective, stage: Stage, samples: Samples) -> None:
        self.objective, self.stage, self.samples = objective, stage, samples
        self.device = next(objective.model.parameters()).device
        validation = samples.validation
        self.validation: Any = validation if validation is not None and len(validation) else None
        self.possible = self.validation is not None or samples.windows is not None
        """whether there is anything to measure"""

    def measure(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The figures as train_log.jsonl has them, and all of BLEU where it is asked for."""
        figures: dict[str, Any] = {}
        if self.validation is not None:
            figures["eval_loss"] = self.validation_loss()
        if self.samples.windows is not None:
            model = self.objective.model
            figures["eval_perplexity"] = evaluate(model, self.samples.windows).perplexity
        if not self.stage.bleu_samples or self.validation is None:
            return figures, None
        measured = bleu_of(
            self.objective.model,
            self.samples.tokenizer,
            self.validation,
            samples=self.stage.bleu_samples,
            batch_size=self.stage.batch_size,
        )
        return figures | {"eval_bleu": measured.bleu}, measured.to_dict()

    def validation_loss(self) -> float:
        """Mean negative log-likelihood of the scored tokens of the validation set."""
        model = self.objective.model
        model.eval()
        collate = Counted(self.samples.collate, aligned=self.objective.seq2seq)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        order = range(len(self.validation))
        for batch in load_batches(
            self.validation, order, self.stage.batch_size, collate, self.device
        ):
            inputs = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, Tensor)}
            scored, count = self.objective.plain(inputs)
            sums[0] += scored
            sums[1] += count
        model.train()
        sums = total(sums)
        return float(sums[0] / sums[1].clamp(min=1))
