"""What the finetuning benchmarks share: a model, windows of a text, and a training step on them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune.data.text import load_documents, sample_windows, token_stream
from fastprune.models.load import load_model
from fastprune.precision import lacks_units

aten = torch.ops.aten
PRODUCTS = {op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}


class HalfProducts(TorchDispatchMode):
    """Half-precision matrix products as matrix units make them: fp32 sums, rounded once.

    For processors without such units, whose own half-precision products take minutes a step. The
    operands and results have the same values; only the order of the sums may differ.
    """

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op not in PRODUCTS or args[0].dtype not in (torch.bfloat16, torch.float16):
            return op(*args, **(kwargs or {}))
        wide = [x.float() if isinstance(x, Tensor) else x for x in args]
        return op(*wide, **(kwargs or {})).to(args[0].dtype)


def half_products(device: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """`HalfProducts` on a processor without units for `dtype` (None is fp32), else nothing."""
    slow = dtype is not None and lacks_units(torch.device(device), dtype)
    return HalfProducts() if slow else nullcontext()


def parser(about: str) -> argparse.ArgumentParser:
    """Options of every one of them."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("model", help="as for fastprune finetune")
    made.add_argument("--data", default="builtin:c4", help="text to train on")
    made.add_argument("--seq-len", type=int, default=128)
    made.add_argument("--batch-size", type=int, default=2)
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=None)
    return made


def prepared(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model in fp32 and windows (n, seq_len) of the text."""
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, dtype=torch.float32, device=options.device)
    limit = 2000 * options.seq_len
    stream = token_stream(tokenizer, load_documents(options.data), limit)
    n = min(512, len(stream) // options.seq_len)
    return model, sample_windows(stream, options.seq_len, n)


def batches(windows: Tensor, size: int, device: str) -> Iterator[Tensor]:
    """Batches (size, seq_len), round and round."""
    while True:
        for batch in windows.split(size):
            if len(batch) == size:
                yield batch.to(device)


def table(rows: Sequence[Sequence[str]]) -> None:
    """Print `rows`, the first of them a heading, as Markdown."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |")
        if not number:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    sys.stdout.flush()
