"""Weights spread over processes (FSDP2), so that none holds all of them while it trains.

A tensor of which every process holds a part is a DTensor. A sharded model gathers a layer when the
layer is called and lets it go afterwards; what lies outside the layers is gathered while the model
itself is called, and only then (`inside`). Functions marked as collective wait for all processes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastprune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

LAYER = re.compile(r"(?:^|\.)(?:layers|h|block)\.\d+$")
"""Names of the modules that are gathered one at a time."""
_INSIDE = "compute_inside"
"""The method of a sharded model that calls a function as if it were the model's `forward`."""


def local(t: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def whole(t: Tensor) -> Tensor:
    """The whole of a DTensor, on its device; any other tensor as it is. Collective."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def collected(value: Any, keep: bool) -> Any:
    """Nested `value` with every DTensor whole, on the host; one at a time is gathered. Collective.

    Processes with `keep` false take part and get None in the place of each.
    """
    if hasattr(value, "full_tensor"):
        full = value.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {key: collected(item, keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(collected(item, keep) for item in value)
    return value


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """What this process holds of `value`, if it is spread as `like` is.

    `value` is whole, a DTensor, or already the part; where `like` is no DTensor, it is all.
    """
    if hasattr(value, "to_local"):
        return value.to_local()
    if not hasattr(like, "device_mesh") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank None: every process has `value`, nothing is sent
    shard = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return shard.to_local()


def as_shard(value: Tensor, like: Tensor) -> Tensor:
    """`value`, the part that goes with this process's part of `like`, as a DTensor spread alike."""
    if not hasattr(like, "device_mesh") or value.shape != local(like).shape:
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def add_up(total: Tensor, like: Tensor) -> None:
    """Sum `total` in place over the processes that hold different parts of `like`. Collective.

    One all-reduce for FSDP; none where `like` is no DTensor.
    """
    import torch.distributed as dist

    for number, placement in enumerate(getattr(like, "placements", ())):
        if not placement.is_replicate():
            dist.all_reduce(total, group=like.device_mesh.get_group(number))


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to `model`."""
    return hasattr(model, "reshard")


def spread(module: nn.Module, device: torch.device) -> None:
    """Shard `module` in place over all processes, its layers one by one, onto `device`.

    The parameters must be the same in all processes. Collective. Raises InputError when those that
    learn have several dtypes, whose gradients cannot be reduced together.
    """
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise InputError(
            f"--shard: what learns has several dtypes ({', '.join(sorted(dtypes))}); bring the "
            "model to one with --dtype, or train all in fp32 with --precision fp32"
        )
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = [m for name, m in module.named_modules() if LAYER.search(name)]
    for each in (*layers, module):
        if any(True for _ in each.parameters()):
            # the root too: between two calls its parameters are the sharded ones
            fully_shard(each, mesh=mesh, reshard_after_forward=True)
    setattr(module, _INSIDE, _called)
    register_fsdp_forward_method(module, _INSIDE)


def sharded_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` spread over all processes; `model` keeps its own weights. Collective.

    The layers go to `device` one at a time, so `model` may be larger than the device's memory and
    lie on the host.
    """
    from torch import nn
    from torch.distributed.fsdp import register_fsdp_forward_method

    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    other = copy.deepcopy(model, memo)
    spread(other, device)
    if hasattr(other, "generate"):  # of a PeftModel, it does not call the model itself
        register_fsdp_forward_method(other, "generate")
    return other


def bring_back(sharded: nn.Module, model: nn.Module) -> None:
    """Copy what has learnt in `sharded` into `model`, of which it is a copy. Collective."""
    targets = dict(model.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            targets[name].data.copy_(whole(parameter.detach()))


def inside(model: nn.Module, compute: Callable[[], T]) -> T:
    """`compute()`, within a call of `model` where it is sharded: all it reads is gathered there.

    Collective for a sharded model; for any other one `compute()` is simply called.
    """
    if not is_sharded(model):
        return compute()
    result: T = getattr(model, _INSIDE)(compute)
    return result


def _called(compute: Callable[[], T]) -> T:
    return compute()
