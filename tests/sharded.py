"""AdamW on the shards of FSDP2; `kernels/test_sharded_adamw.py` runs it alone and under torchrun.

    torchrun --nproc-per-node 2 tests/sharded.py FOLDER

leaves in FOLDER what each process found.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastprune import sharding
from fastprune.kernels import AdamW

BATCH, STEPS, BROKEN = 8, 5, 3  # the step whose gradients are not finite
MESHES = {"one": None, "sharded": (2,), "replicated": (2, 1)}
DTYPES = (torch.float32, torch.bfloat16)


def network(dtype: torch.dtype) -> nn.Module:
    """Rows that two processes share unequally, and a single one of which the second has none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def shard(model: nn.Module, shape: tuple[int, ...] | None) -> None:
    if shape is not None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])
        fully_shard(model, mesh=mesh)


def step(model: nn.Module, optimizer: AdamW, number: int) -> None:
    """One step on this process's share of a batch; the gradient is the mean over the whole."""
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(BATCH, 6, generator=generator)
    share = (
        inputs.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else inputs
    )
    model(share.to(next(model.parameters()).dtype)).float().square().mean().backward()
    grad = model[0].weight.grad
    if number == BROKEN and (len(sharding.local(grad)) == len(grad) or dist.get_rank() == 0):
        sharding.local(grad)[0] = math.inf  # the first row; of shards the first process has it
    optimizer.step()
    model.zero_grad()


def train(shape: tuple[int, ...] | None, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that must not depend on how many processes train."""
    model = network(dtype)
    shard(model, shape)
    optimizer = AdamW(model.named_parameters(), lr=1e-2, max_grad_norm=0.05)
    norms, culprits = [], {}
    for number in range(STEPS):
        step(model, optimizer, number)
        norms.append(float(optimizer.grad_norm))
        if number == BROKEN:
            culprits = optimizer.culprits()
    state = sharding.collected(optimizer.state_dict(), keep=True)
    weights = {n: sharding.whole(p.detach()).clone() for n, p in model.named_parameters()}

    # The whole state and the whole weights, brought into a new run of as many processes.
    again = network(dtype)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(weights[name])
    shard(again, shape)
    resumed = AdamW(again.named_parameters(), lr=1e-2, max_grad_norm=0.05)
    resumed.load_state_dict(state)
    for each, its in ((model, optimizer), (again, resumed)):
        step(each, its, STEPS)
    return {
        "weights": weights,
        "state": state["state"],
        "norms": norms[:BROKEN] + norms[BROKEN + 1 :],
        "skipped": int(optimizer.skipped_steps),
        "culprits": culprits,
        "resumed": all(
            torch.equal(sharding.local(p), sharding.local(q))
            for p, q in zip(model.parameters(), again.parameters())
        ),
    }


def main(folder: Path) -> None:
    """What torchrun starts."""
    dist.init_process_group("gloo")
    found = {
        (name, t): train(MESHES[name], t) for name in ("sharded", "replicated") for t in DTYPES
    }
    torch.save(found, folder / f"found-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
