"""The loss on data that training never sees: `--test-data`, once at the end."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastprune.data.training import Collator, TrainingData
from fastprune.inspect.bleu import Bleu, measure_bleu
from fastprune.inspect.generate import pad_token
from fastprune.kernels.reference import IGNORED
from fastprune.progress import track
from fastprune.recover.objective import Objective


def held_out_figures(
    model: nn.Module,
    tokenizer: Any,
    data: TrainingData,
    *,
    dtype: torch.dtype | None,
    batch_size: int,
    bleu_samples: int,
) -> dict[str, Any]:
    """What `model` makes of `data`, as metrics.json has it.

    `loss` is the mean negative log-likelihood of the tokens that are to be learnt, `perplexity` its
    exponential; both are None where it is not finite. `bleu` is there where `bleu_samples` prompts
    were answered. Products are made in `dtype`, None for fp32.
    """
    objective = Objective(model, dtype)
    collate = Collator(pad_token(model, tokenizer))
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)
    training = model.training
    model.eval()
    loader: Any = DataLoader(data.train, batch_size=batch_size, collate_fn=collate)
    try:
        for batch in track(loader, "testing", len(loader)):
            total, count = objective.plain({k: v.to(device) for k, v in batch.items()})
            sums += torch.stack([total.double().cpu(), torch.tensor(float(count))])
    finally:
        model.train(training)
    loss = float(sums[0] / sums[1].clamp(min=1))
    finite = math.isfinite(loss)
    figures: dict[str, Any] = {
        "items": len(data.train),
        "loss": loss if finite else None,
        "perplexity": math.exp(min(loss, 700.0)) if finite else None,
    }
    if bleu_samples and data.kind != "text":
        measured = bleu_of(
            model, tokenizer, data.train, samples=bleu_samples, batch_size=batch_size
        )
        figures["bleu"] = measured.to_dict()
    return figures


def bleu_of(model: nn.Module, tokenizer: Any, data: Any, *, samples: int, batch_size: int) -> Bleu:
    """BLEU-4 of the answers to the first `samples` prompts of `data`.

    Answers end where the longest reference does: what is longer is wrong, and costs time.
    """
    items = [data[i] for i in range(min(samples, len(data)))]
    longest = max(int((item["labels"] != IGNORED).sum()) for item in items)
    measured, _ = measure_bleu(
        model, tokenizer, items, max_new_tokens=max(1, longest), batch_size=batch_size
    )
    return measured
