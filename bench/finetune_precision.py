"""Does a training survive its precision and its learning rate? A table.

    python bench/finetune_precision.py smollm2-135m --data TEXT [--steps 20] [--half-weights]

For fp32, bf16 and fp16 and learning rates from 1e-7 to 1e-3, so many steps with fastprune.AdamW:
first and last loss, skipped steps, and how many weights are not finite afterwards. fp32 weights
with autocast; --half-weights trains weights that are bf16 or fp16 themselves (an fp32 copy in the
optimizer). Beside it torch.optim.AdamW on fp16 weights, with the step at which its weights broke.
A processor without units for half-precision products gets them from the same rounded operands in
fp32 (finetune_common.HalfProducts).
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator

import torch
from finetune_common import batches, half_products, parser, prepared, table
from torch import Tensor, nn

from fastprune.inspect.health import scan_model
from fastprune.kernels import AdamW
from fastprune.recover.guard import poison
from fastprune.recover.objective import DTYPES, Objective

RATES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


def broken(model: nn.Module) -> int:
    """Weights that are NaN or infinite."""
    scans = [health.scan for health in scan_model(model)]
    return sum(int(scan.nan + scan.inf) for scan in scans if scan is not None)


def ours(
    model: nn.Module, rate: float, dtype: torch.dtype | None
) -> tuple[Callable[[Tensor], float], AdamW]:
    """A step with fastprune.AdamW under autocast, and the optimizer."""
    objective = Objective(model, dtype)
    half = torch.float16 in (dtype, model.dtype)
    optimizer = AdamW(
        list(model.named_parameters()),
        lr=rate, weight_decay=0.0, max_grad_norm=1.0, loss_scale="dynamic" if half else None,
    )  # fmt: skip

    def step(ids: Tensor) -> float:
        loss = objective({"input_ids": ids, "labels": ids})
        optimizer.scale(poison(loss)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, optimizer


def theirs(model: nn.Module, rate: float) -> Callable[[Tensor], float]:
    """A step with torch.optim.AdamW on the weights as they are."""
    objective = Objective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def step(ids: Tensor) -> float:
        loss = objective({"input_ids": ids, "labels": ids})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def run(step: Callable[[Tensor], float], data: Iterator[Tensor], steps: int) -> list[float]:
    return [step(next(data)) for _ in range(steps)]


def row(name: str, rate: float, losses: list[float], skipped: str, bad: int) -> list[str]:
    return [name, f"{rate:.0e}", f"{losses[0]:.3f}", f"{losses[-1]:.3f}", skipped, str(bad)]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--half-weights", action="store_true")
    options.add_argument("--precisions", default="fp32,bf16,fp16")
    chosen = options.parse_args()
    dense, windows = prepared(chosen)
    dense.train()
    rows = [["precision", "lr", "first loss", "last loss", "skipped", "broken weights"]]
    for name in chosen.precisions.split(","):
        dtype = DTYPES[name]
        for rate in RATES:
            model = copy.deepcopy(dense)
            if chosen.half_weights and dtype is not None:
                model.to(dtype)
            step, optimizer = ours(model, rate, dtype)
            with half_products(chosen.device, dtype):
                losses = run(step, batches(windows, chosen.batch_size, chosen.device), chosen.steps)
            skipped = int(optimizer.skipped_steps)
            rows.append(row(name, rate, losses, str(skipped), broken(model)))
            print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
            del model, step, optimizer  # several gigabytes, before the next ones come
            gc.collect()
    for rate in (1e-7, 1e-5):
        model = copy.deepcopy(dense).half()
        step, data, losses = theirs(model, rate), batches(windows, 1, chosen.device), []
        with half_products(chosen.device, torch.float16):
            while not broken(model) and len(losses) < chosen.steps:
                losses.append(step(next(data)))
        name = f"torch.optim.AdamW, fp16 weights, after step {len(losses)}"
        rows.append(row(name, rate, losses, "—", broken(model)))
    table(rows)


if __name__ == "__main__":
    main()
