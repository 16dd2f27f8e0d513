"""What `--align N` buys: tokens a second of a model whose MLPs keep widths that are multiples of N.

    python bench/align.py [--model smollm2-135m] [--ratio 0.2] [--align 1 8 16 32 64 128]

Decoder layers of the model's shape, every weight the same number, with MLPs cut by ``--ratio``: at
`--align 1` an odd width, elsewhere the nearest multiples of N from below and from above. Read
(prompt of ``--tokens``) and decoded (batch 1) in turn with the odd width, so that the ratio of the
two holds on a machine whose speed changes from minute to minute; medians of ``--rounds``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastprune.config import resolve_device
from fastprune.inspect.speed import Decoding
from fastprune.models.families import geometries
from fastprune.models.load import load_model
from fastprune.pruning.latency import decoder_stack


@dataclass(frozen=True)
class Speed:
    """Milliseconds of reading the prompt and of decoding a token."""

    read: float
    decode: float


class Runner:
    """One stack of layers, ready to read and to decode."""

    def __init__(self, stack: nn.Module, tokens: int, rounds: int) -> None:
        self.stack, self.tokens = stack, tokens
        self.device = next(stack.parameters()).device
        self.decoding = Decoding(stack, tokens, steps=rounds)

    def once(self) -> Speed:
        ids = torch.zeros(1, self.tokens, dtype=torch.int64, device=self.device)
        start = time.perf_counter()
        with torch.no_grad():
            self.stack(input_ids=ids, use_cache=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Speed(1000 * (time.perf_counter() - start), self.decoding.step())


def widths(channels: int, ratio: float, multiples: list[int]) -> list[tuple[int, int]]:
    """(N, width) to try: an odd width first, then multiples of N around it."""
    odd = round(channels * (1 - ratio)) | 1
    found = [(1, odd)]
    for n in multiples:
        if n > 1:
            below = odd // n * n
            found += [(n, width) for width in (below, below + n) if 0 < width <= channels]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--align", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--layers", type=int, help="layers of a stack (default: the model's)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = str(resolve_device(options.device))
    model, _ = load_model(options.model, dtype=options.dtype, device=device)
    sizes = geometries(model)
    count = options.layers or len(sizes)
    dtype = next(model.parameters()).dtype

    def runner(channels: int) -> Runner:
        stack = decoder_stack(model, replace(sizes[0], channels=channels), count)
        return Runner(stack, options.tokens, options.rounds)

    tried = widths(sizes[0].channels, options.ratio, options.align)
    odd = runner(tried[0][1])
    print(f"{options.model}, {count} layers, {dtype}, {device}, {torch.get_num_threads()} threads")
    print(
        f"{'align':>6} {'width':>6} {'read tokens/s':>14} {'ratio':>6} {'decode':>8} {'ratio':>6}"
    )
    for align, width in tried:
        this = runner(width)
        pairs = [(odd.once(), this.once()) for _ in range(options.rounds)]
        read = statistics.median(mine.read for _, mine in pairs)
        decode = statistics.median(mine.decode for _, mine in pairs)
        faster_read = statistics.median(other.read / mine.read for other, mine in pairs)
        faster_decode = statistics.median(other.decode / mine.decode for other, mine in pairs)
        print(
            f"{align:6} {width:6} {1000 * options.tokens / read:14,.0f} {faster_read:6.3f} "
            f"{1000 / decode:8,.1f} {faster_decode:6.3f}"
        )


if __name__ == "__main__":
    main()
