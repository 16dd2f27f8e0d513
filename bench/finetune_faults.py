"""What faults cost: 5 % of the steps' gradients replaced by NaN or infinity, against a clean run.

    python bench/finetune_faults.py MODEL --data TEXT [--steps 200] [--share 0.05] [--lr 1e-5]

Both runs are `fastprune.finetune` with the same settings and data. Prints the mean loss of the last
tenth of each, their difference, the steps skipped, and how many weights are not finite.
"""

from __future__ import annotations

import math
import random

import torch
from finetune_common import parser, table
from finetune_precision import broken
from torch import nn

import fastprune
from fastprune.models.load import load_model
from fastprune.recover import pipeline


def faulty(steps: int, share: float, seed: int):
    """A hook that spoils the gradients of `share` of the steps, and the steps it will spoil."""
    chosen = random.Random(seed).sample(range(steps), round(share * steps))
    kinds = {step: (math.nan, math.inf, -math.inf)[i % 3] for i, step in enumerate(chosen)}

    def hook(step: int, model: nn.Module) -> None:
        if step in kinds:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            # one tensor is enough, and the hardest to notice: a single value of it
            gradients[step % len(gradients)].flatten()[0] = kinds[step]

    return hook, sorted(kinds)


def run(options, hook):
    model, tokenizer = load_model(options.model, dtype=torch.float32, device=options.device)
    losses: list[float | None] = []
    config = fastprune.FinetuneConfig(
        model=options.model, data=options.data, device=options.device, lr=options.lr,
        seq_len=options.seq_len, batch_size=options.batch_size, grad_accum=1,
        max_steps=options.steps, log_steps=1, eval_windows=0, threads=options.threads,
        precision=options.precision,
    )  # fmt: skip
    original = pipeline.RunFolder.add_line

    def noted(folder, line):
        losses.append(line.get("loss"))
        original(folder, line)

    pipeline.RunFolder.add_line = noted
    try:
        result = fastprune.finetune(model, tokenizer, config, gradient_hook=hook)
    finally:
        pipeline.RunFolder.add_line = original
    sound = [loss for loss in losses[-max(1, options.steps // 10) :] if loss is not None]
    return sum(sound) / len(sound), result.metrics["stages"][0]["skipped_steps"], broken(model)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--share", type=float, default=0.05)
    options.add_argument("--lr", type=float, default=1e-5)
    options.add_argument("--precision", default="auto")
    chosen = options.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    hook, steps = faulty(chosen.steps, chosen.share, seed=0)
    clean, _, _ = run(chosen, None)
    loss, skipped, bad = run(chosen, hook)
    table(
        [
            ["run", "spoilt steps", "skipped", "final loss", "difference", "broken weights"],
            ["clean", "0", "0", f"{clean:.4f}", "", "0"],
            ["faulty", str(len(steps)), str(skipped), f"{loss:.4f}",
             f"{100 * (loss / clean - 1):+.2f} %", str(bad)],
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
