"""Batches with what the training loop must know of them, counted before they leave the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastprune.kernels.reference import IGNORED

Batch = dict[str, Any]


class Counted:
    """Wraps a collator: adds `items`, the scored tokens, and `tokens`, those that are no padding.

    An attention mask without padding is left out: attention is then plainly causal, which has the
    faster kernels. `aligned` labels (of encoder-decoder models) are all scored where not -100.
    """

    def __init__(self, collate: Callable[[Sequence[Batch]], Batch], *, aligned: bool = False):
        self.collate, self.first = collate, 0 if aligned else 1

    def __call__(self, samples: Sequence[Batch]) -> Batch:
        batch = dict(self.collate(samples))
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        if mask is not None and tokens == mask.numel():
            del batch["attention_mask"]
        items = int((batch["labels"][:, self.first :] != IGNORED).sum())
        return batch | {"items": items, "tokens": tokens}
