"""Several processes train together, as torchrun or accelerate started them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from fastprune.config import resolve_device
from fastprune.distributed import Processes, own_gpu
from fastprune.errors import InputError
from fastprune.models.multimodal import enclosing
from fastprune.recover.config import FinetuneConfig


def own_device(name: str, processes: Processes) -> torch.device:
    """The device of this one of `processes`: what `--device` says, and of several a GPU of its own.

    Raises InputError.
    """
    device = resolve_device(name)
    if device.type == "cuda" and processes.several:
        return torch.device("cuda", own_gpu())
    return device


def shards(config: FinetuneConfig, processes: Processes) -> bool:
    """Whether the weights are spread over the `processes` while they train."""
    return config.shard and processes.several


def check_shardable(model: nn.Module, config: FinetuneConfig, processes: Processes) -> None:
    """InputError when `config` spreads the weights of a `model` that is part of another one."""
    if shards(config, processes) and enclosing(model) is not None:
        raise InputError(
            "--shard spreads language models alone, and this one is part of a multimodal model; "
            "leave --shard out, and train an adapter where memory is short (--method lora)"
        )


def take_over_sharding(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with `shard` where `accelerate launch` was told to use FSDP.

    The library is told no more: it would load the weights in one process only, and wrap the model.
    """
    wanted = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return replace(config, shard=True) if wanted else config


@contextmanager
def first_of_node_first(processes: Processes) -> Iterator[None]:
    """The first process of each node runs the body, then the others do, after an error too."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        processes.wait()
    try:
        yield
    finally:
        if first:
            processes.wait()
