"""Several processes train together, as torchrun or accelerate started them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.config import resolve_device
from fastprune.errors import InputError
from fastprune.models.multimodal import enclosing
from fastprune.recover.config import FinetuneConfig


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return distributed.rank() == 0


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


def check_shardable(model: nn.Module, config: FinetuneConfig) -> None:
    """InputError when `config` spreads the weights of a `model` that is part of another one."""
    if shards(config) and enclosing(model) is not None:
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


def barrier(device: torch.device) -> None:
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
        barrier(device)
    try:
        yield
    finally:
        if first:
            barrier(device)


def total(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, which must all call it; of one process `value`."""
    if world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value
