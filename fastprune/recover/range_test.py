"""A learning rate from the model itself: raise it step by step and watch a fixed probe batch.

A short training whose learning rate grows geometrically from LOWEST to HIGHEST. After every few
steps the loss on a probe batch, which is not trained on, is measured. It falls while the rate is
useful and rises when it destroys more than it teaches. The rate at which it falls fastest is used,
as learning rate finders do (Leslie Smith, arXiv 1506.01186; fastai's `steep`, Lightning's
`suggestion`); where it is lowest the next step does harm. The probe takes the place of the noisy
training loss.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from fastprune.inspect.health import unsound
from fastprune.messages import Message
from fastprune.progress import track
from fastprune.recover.freeze import make_optimizer
from fastprune.recover.guard import poison
from fastprune.recover.objective import Objective
from fastprune.recover.recipes import Stage

LOWEST, HIGHEST = 1e-7, 1e-2
RATES = 16  # three to a decade
STEPS_PER_RATE = 3
PROBE_SAMPLES = 8
WORSE = 1.3
"""The test ends when the probe loss is this many times the first."""
GAIN = 0.002
"""Relative fall of the probe loss below which nothing was learnt."""

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class RangeTest:
    """What the test saw and chose."""

    rates: list[float]
    losses: list[float]
    """probe loss after the steps at each rate, fewer than `rates` if it ended early"""
    before: float
    chosen: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(before: float, rates: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """The learning rate to use, and why, from the probe losses at rising `rates`."""
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    edge = min(range(len(finite)), key=finite.__getitem__)
    fall = (before - finite[edge]) / before
    if fall < GAIN:
        return rates[0], (
            f"no rate from {rates[0]:.1g} to {rates[len(losses) - 1]:.1g} lowered the probe loss "
            f"{before:.3f} by more than {GAIN:.1%}: the lowest is used; this data may have nothing "
            "to teach this model"
        )
    seen = [before, *finite[: edge + 1]]  # seen[i] before the steps at rates[i], seen[i + 1] after
    falls = [seen[max(i - 1, 0)] - seen[min(i + 2, edge + 1)] for i in range(edge + 1)]
    steepest = max(range(edge + 1), key=falls.__getitem__)  # with the rates beside it: less noise
    return float(f"{rates[steepest]:.1e}"), (
        f"the probe loss fell from {before:.3f} to {finite[edge]:.3f} as the rate rose to "
        f"{rates[edge]:.1e}, and fastest around this one, which is used"
    )


def range_test(
    objective: Objective,
    stage: Stage,
    samples: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    device: torch.device,
    master: str = "fp32",
    seed: int = 0,
) -> RangeTest:
    """Try rising learning rates on `samples` and put the weights back.

    `samples` is the map-style training set, `collate` makes batches of it. The random state of
    torch is left as it was. Raises NumericalError when the loss is not finite before any step.
    """
    learning = [p for p in objective.model.parameters() if p.requires_grad]
    weights = [p.detach().clone() for p in learning]
    training = objective.model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        order = torch.randperm(len(samples)).tolist()
        probe = _batch(collate, samples, order[:PROBE_SAMPLES], device)
        before = _loss(objective, probe)
        if not math.isfinite(before):
            raise unsound(
                objective.model, Message("the loss before the first step"), objective.dtype
            )
        batches = _batches(collate, samples, order[PROBE_SAMPLES:] or order, stage, device)
        try:
            rates, losses = _climb(objective, stage, batches, probe, before, master)
        finally:
            with torch.no_grad():
                for parameter, weight in zip(learning, weights):
                    parameter.copy_(weight)
            objective.model.zero_grad(set_to_none=True)
            objective.model.train(training)
    chosen, reason = choose(before, rates, losses)
    log.info("learning rate %.1e: %s", chosen, reason)
    return RangeTest(rates, losses, before, chosen, reason)


def _climb(
    objective: Objective,
    stage: Stage,
    batches: Iterator[dict[str, Any]],
    probe: dict[str, Any],
    before: float,
    master: str,
) -> tuple[list[float], list[float]]:
    """Steps at rising rates; the rates tried, and the probe loss after each."""
    optimizer = make_optimizer(objective, replace(stage, lr=1.0), master=master)
    relative = [group["lr"] for group in optimizer.param_groups]
    rates: list[float] = []
    losses: list[float] = []
    for number in track(range(RATES), "learning rate range test"):
        rate = LOWEST * (HIGHEST / LOWEST) ** (number / (RATES - 1))
        for group, factor in zip(optimizer.param_groups, relative):
            group["lr"] = rate * factor
        objective.model.train()
        for _ in range(STEPS_PER_RATE):
            optimizer.scale(poison(objective(next(batches)))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        rates.append(rate)
        losses.append(_loss(objective, probe))
        if not losses[-1] <= WORSE * before:
            break
    return rates, losses


def _batches(
    collate: Callable[[list[Any]], dict[str, Any]],
    samples: Any,
    order: list[int],
    stage: Stage,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Batches of the stage's size, without end."""
    endless = cycle(order)
    while True:
        yield _batch(collate, samples, list(islice(endless, stage.batch_size)), device)


def _batch(
    collate: Callable[[list[Any]], dict[str, Any]],
    samples: Any,
    chosen: list[int],
    device: torch.device,
) -> dict[str, Any]:
    batch = collate([samples[i] for i in chosen])
    return {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}


def _loss(objective: Objective, batch: dict[str, Any]) -> float:
    """The loss against the labels, per scored token."""
    objective.model.eval()
    total, count = objective.plain(batch)
    return float(total) / max(1, count)
