"""What a stage is measured by while it trains: validation loss, BLEU, perplexity of a text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.data.text import characters_for, load_documents
from fastprune.inspect.perplexity import SEQ_LEN, evaluate, text_windows, window_length
from fastprune.models.vocabulary import check_largest
from fastprune.recover.batches import Counted, load_batches, own_batches
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.held_out import bleu_of
from fastprune.recover.objective import Objective
from fastprune.recover.recipes import Stage

log = logging.getLogger("fastprune")


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
        processes, order = self.objective.processes, range(len(self.validation))
        chosen = own_batches(order, self.stage.batch_size, processes)
        for batch in load_batches(self.validation, chosen, collate, self.device):
            inputs = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, Tensor)}
            scored, count = self.objective.plain(inputs)
            sums[0] += scored
            sums[1] += count
        model.train()
        processes.sum_(sums)
        return float(sums[0] / sums[1].clamp(min=1))


def perplexity_windows(config: FinetuneConfig, model: nn.Module, tokenizer: Any) -> Tensor | None:
    """The evaluation windows; says so when the text is among the training data."""
    if not config.eval_windows:
        return None
    seq_len = window_length(model, "--eval-seq-len", config.eval_seq_len, SEQ_LEN)
    names = {name.strip() for name in config.data.split(",")}
    if shared := sorted(names & {name.strip() for name in config.eval.split(",")}):
        log.warning(
            "%s is both training data and evaluation text: its perplexity will say how well it was "
            "learnt by heart; give another --eval",
            shared[0],
        )
    documents = load_documents(config.eval, characters_for(seq_len * config.eval_windows))
    windows = text_windows(tokenizer, documents, seq_len, config.eval_windows)
    check_largest(model, tokenizer, int(windows.max()), config.eval)
    return windows
