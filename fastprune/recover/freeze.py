"""Which parameters learn, and how fast: frozen parts, learning rates by depth, schedules.

Everything goes by the parameter's name, so it holds for the plain model and for LoRA matrices
beside it, and for the families of transformers whose layers are called `layers`, `h` or `block`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from fastprune.errors import InputError
from fastprune.kernels.optim import AdamW
from fastprune.recover.config import LAST
from fastprune.recover.objective import Objective
from fastprune.recover.recipes import Stage

LAYER = re.compile(r"(?:^|\.)(?:layers|h|block)\.(\d{1,9})\.")
ATTENTION = re.compile(r"\.(self_attn|attn|attention|SelfAttention|EncDecAttention)\.")
MLP = re.compile(r"\.(mlp|feed_forward|DenseReluDense)\.")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|wpe|shared|embeddings?)\.")
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""What an optimizer's group holds of its learning rate."""
TRAINED_BY_MOST = 5
"""Layers that `--freeze most` leaves to learn."""


def layer_of(name: str) -> int | None:
    """The decoder layer that the parameter `name` lies in; None outside the layers."""
    match = LAYER.search(name)
    return int(match[1]) if match else None


def depth_of(model: nn.Module) -> int:
    """The number of decoder layers of `model`. Raises InputError where none is found."""
    layers = [
        layer for name, _ in model.named_parameters() if (layer := layer_of(name)) is not None
    ]
    if not layers:
        raise InputError(
            f"{type(model).__name__}: no decoder layers found in it; leave out what chooses among "
            "them, such as --freeze"
        )
    return max(layers) + 1


def freeze(model: nn.Module, strategy: str) -> int:
    """Set `requires_grad` of what learns now as `strategy` says; the parameters left to learn.

    most: all but the last 5 layers are frozen, last:N: all but the last N; half: the first half;
    ends: the outer quarters; attention, mlp: these in every layer. Each freezes the embeddings and
    the head too; the final norm learns. none leaves everything as it is. Raises InputError when
    nothing would learn, and for more layers than there are.
    """
    if strategy != "none":
        depth = depth_of(model)
        if (last := LAST.fullmatch(strategy)) and int(last[1]) > depth:
            raise InputError(f"--freeze {strategy}: the model has only {depth} layers; give fewer")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and _frozen(name, strategy, depth):
                parameter.requires_grad_(False)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        raise InputError(f"--freeze {strategy} leaves nothing of this model to learn; freeze less")
    return count


def _frozen(name: str, strategy: str, depth: int) -> bool:
    layer = layer_of(name)
    if layer is None:
        return "norm" not in name and "ln_f" not in name
    if strategy == "most":
        return layer < depth - TRAINED_BY_MOST
    if last := LAST.fullmatch(strategy):
        return layer < depth - int(last[1])
    if strategy == "half":
        return layer < depth // 2
    if strategy == "ends":
        outer = max(1, depth // 4)
        return layer < outer or layer >= depth - outer
    return bool((ATTENTION if strategy == "attention" else MLP).search(name))


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """What learns in `model` as groups for an optimizer, with (name, parameter) pairs.

    One group for each learning rate, with and without weight decay: vectors (norms, biases) never
    decay. With `layer_lr_decay` d, layer l of L learns at lr · d^(L-1-l), the embeddings at d^L.
    With `layer_lrs` the depth is cut into as many equal parts, the embeddings go with the first
    and what follows the layers with the last.
    """
    depth = depth_of(model)
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = stage.weight_decay if parameter.dim() > 1 else 0.0
            key = (_rate(name, stage, depth), decay)
            groups.setdefault(key, []).append((name, parameter))
    return [
        {"params": params, "lr": lr, "weight_decay": decay}
        for (lr, decay), params in groups.items()
    ]


def _rate(name: str, stage: Stage, depth: int) -> float:
    layer = layer_of(name)
    if layer is None:
        layer = -1 if EMBEDDING.search(name) else depth - 1
    if stage.layer_lrs:
        parts = len(stage.layer_lrs)
        return stage.layer_lrs[max(0, layer) * parts // depth]
    return stage.lr * stage.layer_lr_decay ** (depth - 1 - layer)


def make_optimizer(
    objective: Objective, stage: Stage, *, master: str = "fp32", seed: int = 0
) -> AdamW:
    """fastprune.AdamW over what learns, clipping inside; it scales the loss where fp16 takes part.

    `master` and `seed` are those of AdamW.
    """
    groups = parameter_groups(objective.model, stage)
    half = any(p.dtype == torch.float16 for group in groups for _, p in group["params"])
    scale = "dynamic" if half or objective.dtype == torch.float16 else None
    clip = stage.max_grad_norm
    return AdamW(groups, max_grad_norm=clip, master=master, loss_scale=scale, seed=seed)


def warmup_steps(stage: Stage, steps: int) -> int:
    """Steps of `steps` until the learning rate of `stage` is reached."""
    if stage.warmup_steps is not None:
        return min(stage.warmup_steps, steps)
    return round(stage.warmup_ratio * steps)


def make_schedule(stage: Stage, optimizer: Any, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each of `steps` optimizer steps. Raises InputError.

    It rises in equal parts over the warm-up, from the first step on: step k of w learns at k/w.
    """
    from transformers import get_scheduler

    warmup = warmup_steps(stage, steps)
    if stage.schedule == "one-cycle":
        if steps < 4:
            raise InputError(
                f"--schedule one-cycle needs at least 4 steps, this run has {steps}; train for "
                "longer, or choose another schedule"
            )
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group.get("max_lr", group["lr"]) for group in optimizer.param_groups],
            total_steps=steps,
            pct_start=min(max(warmup, 2), steps - 2) / steps,
            div_factor=stage.div_factor,
            cycle_momentum=False,
        )
    name = "constant_with_warmup" if stage.schedule == "constant" else stage.schedule
    rule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    (factor, *_) = rule.lr_lambdas

    def from_the_first(step: int) -> float:
        return (step + 1) / warmup if step < warmup else factor(step)

    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, from_the_first)


def pace(stage: Stage, steps: int) -> dict[str, Any]:
    """What the learning rate of each of `steps` steps follows from, where it may be changed."""
    return {"lr": stage.lr, "layer_lrs": list(stage.layer_lrs), "steps": steps}


def rates_of(optimizer: Any) -> list[dict[str, Any]]:
    """The rates, and what schedules keep of them, in each group of `optimizer`."""
    return [{key: g[key] for key in RATES if key in g} for g in optimizer.param_groups]


def reschedule(
    schedule: Any, optimizer: Any, rates: list[dict[str, Any]], begun: dict[str, Any]
) -> None:
    """Bring a fresh `schedule` to where one with the state `begun` was, at its own `rates`.

    `optimizer` holds those of the schedule that was begun.
    """
    for group, own in zip(optimizer.param_groups, rates, strict=True):
        group.update(own)
    place = {"last_epoch": begun["last_epoch"] - 1, "_step_count": begun["_step_count"]}
    rules = {"lr_lambdas": [None] * len(begun["lr_lambdas"])} if "lr_lambdas" in begun else {}
    schedule.load_state_dict(place | rules)
    schedule.step()


def halve_rates(optimizer: Any, schedule: Any) -> None:
    """Halve every learning rate of `optimizer`, now and in all that `schedule` will set."""
    for group in optimizer.param_groups:
        for key in RATES:
            if key in group:
                group[key] *= 0.5
    schedule.base_lrs = [rate * 0.5 for rate in schedule.base_lrs]
