"""Batches: which samples are in which, and what the training loop must know of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastprune.distributed import ALONE, Processes
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


def shuffled(samples: int, seed: int) -> list[int]:
    """The numbers of `samples` samples in an order that follows from `seed` alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()


def own_batches(
    order: Sequence[int], batch_size: int, processes: Processes = ALONE
) -> list[list[int]]:
    """The batches of `order` that fall to this one of `processes`, which take turns.

    Alone a process takes what is left as a smaller last batch. Several go on from the beginning of
    `order`, so that all have as many batches, all of them full.
    """
    padded = list(order)
    turn = batch_size * processes.count
    if processes.several:
        padded = list(islice(cycle(order), math.ceil(len(order) / turn) * turn))
    starts = range(processes.rank * batch_size, len(padded), turn)
    return [padded[start : start + batch_size] for start in starts]


def load_batches(
    samples: Any,
    chosen: Sequence[Sequence[int]],
    collate: Callable[..., Batch],
    device: torch.device,
) -> Iterator[Batch]:
    """The batches of the map-style `samples` whose numbers are `chosen`, as by `own_batches`.

    They are on the host, pinned where `device` is a GPU. torch's random state goes on by one draw,
    at once.
    """
    loader: Any = DataLoader(
        samples, batch_sampler=chosen, collate_fn=collate, pin_memory=device.type == "cuda"
    )
    return iter(loader)
