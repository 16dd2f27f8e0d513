"""A stage's settings as transformers' TrainingArguments, and how many steps they come to."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from fastprune import distributed
from fastprune.config import resolve_device
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.loggers import run_name
from fastprune.recover.recipes import Stage

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
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


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
    return ", ".join(parts)
