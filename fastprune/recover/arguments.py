"""A stage's settings as transformers' TrainingArguments, and how many steps they come to."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from fastprune import distributed
from fastprune.config import resolve_device
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.loggers import run_name, set_project
from fastprune.recover.recipes import Stage

USUAL_WARMUP, USUAL_BATCH = (0.10, 0.15), (64, 96)
"""Share of the steps, and samples a step, that supervised finetuning on answers usually takes."""
LOG_LINES = 200  # of a stage, where --log-steps does not say


def world_size() -> int:
    """Processes that train together, as torchrun or accelerate started them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(name: str) -> torch.device:
    """The device of this process: what `--device` says, and under torchrun a GPU of its own.

    Raises InputError.
    """
    device = resolve_device(name)
    if device.type == "cuda" and world_size() > 1:
        return torch.device("cuda", distributed.own_gpu())
    return device


def shards(config: FinetuneConfig) -> bool:
    """Whether the weights are spread over the processes while they train."""
    return config.shard and world_size() > 1


def take_over_sharding(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with `shard` where `accelerate launch` was told to use FSDP.

    The library is told no more: it would load the weights in one process only, and wrap the model.
    """
    wanted = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return replace(config, shard=True) if wanted else config


def meet(device: torch.device) -> None:
    """Of several processes none goes on before all have come this far."""
    if world_size() > 1:
        from accelerate import PartialState

        if device.type == "cuda":
            torch.cuda.set_device(device)
        state = PartialState(cpu=device.type == "cpu", timeout=distributed.TIMEOUT)
        state.wait_for_everyone()


@contextmanager
def first_of_node_first(device: torch.device) -> Iterator[None]:
    """The first process of each node runs the body, then the others do, after an error too."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        meet(device)
    try:
        yield
    finally:
        if first:
            meet(device)


def is_first_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return distributed.rank() == 0


def steps_per_epoch(stage: Stage, samples: int) -> int:
    """Optimizer steps of one pass over `samples` training samples."""
    batches = math.ceil(samples / (stage.batch_size * world_size()))
    return max(1, math.ceil(batches / stage.grad_accum))


def total_steps(stage: Stage, samples: int) -> int:
    """Optimizer steps of the stage."""
    return stage.max_steps or math.ceil(stage.epochs * steps_per_epoch(stage, samples))


def training_arguments(
    stage: Stage, config: FinetuneConfig, folder: Path, device: torch.device, samples: int
) -> TrainingArguments:
    """The library's settings of a stage that keeps its checkpoints in `folder`."""
    steps = total_steps(stage, samples)
    if device.type == "cuda" and world_size() > 1:
        torch.cuda.set_device(device)
    elif device.type == "cuda" and device.index:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)  # the library would take cuda:0
    set_project(config.logger_project)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.grad_accum,
        num_train_epochs=stage.epochs,
        max_steps=steps,
        max_grad_norm=0.0,  # the optimizer clips
        logging_strategy="steps",
        logging_steps=config.log_steps or math.ceil(steps / LOG_LINES),
        logging_nan_inf_filter=False,  # it waits for the device at every micro-batch; see log()
        save_strategy="steps",
        save_steps=stage.save_steps,
        eval_strategy="no",  # Watch says when
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=config.log_to,
        run_name=run_name(folder),
        **({"project": config.logger_project} if config.logger_project else {}),
        disable_tqdm=True,
        log_level="critical",
        log_level_replica="critical",
    )
    if device.type == "cuda" and world_size() == 1:
        arguments._n_gpu = 1  # one process uses the card it was given, never DataParallel
        if device.index:
            arguments.__dict__["_setup_devices"] = device
            torch.cuda.set_device(device)
    return arguments


def describe(arguments: Any) -> str:
    """The batch of one optimizer step in words."""
    batch = arguments.per_device_train_batch_size
    parts = [f"{batch} a pass", f"{arguments.gradient_accumulation_steps} passes a step"]
    if arguments.world_size > 1:
        parts.append(f"{arguments.world_size} processes")
    whole = batch * arguments.gradient_accumulation_steps * arguments.world_size
    return ", ".join([*parts, f"{whole} samples a step"])


def unusual_for_answers(stage: Stage, samples: int) -> list[str]:
    """Where `stage` differs from how answers are usually learnt, and the flags that change it."""
    found = []
    share = stage.warmup_ratio
    if stage.warmup_steps is not None:
        share = stage.warmup_steps / total_steps(stage, samples)
    least, most = USUAL_WARMUP
    if not least <= share <= most:
        found.append(
            f"a warm-up of {100 * least:.0f}–{100 * most:.0f} % of the steps, here "
            f"{100 * share:.0f} % (--warmup-ratio 0.12)"
        )
    at_once = stage.batch_size * world_size()
    fewest, largest = USUAL_BATCH
    if not fewest <= at_once * stage.grad_accum <= largest and samples >= fewest:
        passes = max(1, math.ceil(fewest / at_once))
        found.append(
            f"{fewest}–{largest} samples a step, here {at_once * stage.grad_accum} "
            f"(--grad-accum {passes})"
        )
    return found
