"""One example: a call made, and everything that it gave and changed looked at."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from calls import CALLS, Call, Draw, copied, tensors_in
from spoils import spoil
from torch import Tensor

from fastprune.kernels import backend
from fastprune.kernels.declarations import OPS

REFUSALS = (ValueError, TypeError, AttributeError, BufferError, RuntimeError)
"""What a call may raise that is not right."""


def run_examples(seed: int, first: int, count: int, large: float) -> dict[str, int]:
    """Check examples `first` and on; how many were computed and refused."""
    module = backend.compiled(torch.device("cpu"))
    found = {"computed": 0, "refused": 0}
    for number in range(first, first + count):
        try:
            found[check_example(module, seed * 10**9 + number, large)] += 1
        except Exception:
            print(f"example {number} of seed {seed}:", file=sys.stderr)
            raise
    return found


def check_memory(blocks: list[Tensor], before: list[Tensor], written: list[Tensor]) -> None:
    """AssertionError where bytes of `blocks` changed that belong to no tensor of `written`."""
    for block, old in zip(blocks, before):
        changed = block.view(torch.uint8) != old.view(torch.uint8)
        if not bool(changed.any()):
            continue
        free = torch.zeros(block.shape, dtype=torch.bool)
        for t in written:
            if t.untyped_storage().data_ptr() == block.untyped_storage().data_ptr():
                free.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
        free = free[:, None].expand(-1, block.element_size()).flatten()
        assert not bool((changed & ~free).any()), "memory beside the results changed"


def check_example(module: Any, seed: int, large: float) -> str:
    """Make and check one call; what became of it. AssertionError where it went wrong."""
    draw = Draw(seed, large)
    names = [f for f in CALLS if module.attention_serves() or not f.__name__.startswith("att")]
    function = draw.choice(names)
    if not function.__name__.startswith("att"):
        module.set_cpu_level(draw.choice(module.cpu_levels()))
    call = function(module, draw)
    for _ in range(draw.choice((0, 0, 1, 2))):
        spoil(draw, call)
    before = [block.clone() for block in draw.blocks]
    arguments = copied(call.arguments)
    try:
        size_workspace(module, call)
        call.run(**call.arguments)
    except REFUSALS:
        if not call.spoiled:
            raise
        check_memory(draw.blocks, before, [])
        return "refused"
    finally:
        module.set_cpu_level(module.cpu_levels()[-1])
    check_memory(draw.blocks, before, tensors_in([call.arguments[n] for n in call.written]))
    where = f"{call.name} with another {', '.join(call.spoiled)}" if call.spoiled else call.name
    for ours, true, tolerance in call.compare(call.arguments, arguments):
        assert same(ours.detach().double(), true.double(), tolerance), f"{where} is wrong"
    return "computed"


def same(ours: Tensor, true: Tensor, tolerance: float) -> bool:
    """Within the tolerance where what is true is finite; a tolerance of 0 asks for all of it."""
    if tolerance == 0:
        return torch.equal(ours.nan_to_num(nan=1.25e300), true.nan_to_num(nan=1.25e300))
    finite = true.isfinite()
    near = (ours - true).abs() <= tolerance * (1 + true.abs())
    return not math.isfinite(tolerance) or bool((near | ~finite).all())


def size_workspace(module: Any, call: Call) -> None:
    """The sizes of workspaces are computed from what may be wrong too."""
    op = next((op for op in OPS if op.name == call.name and op.workspace), None)
    if op is not None:
        values = {"at_once": 2} | call.arguments
        size = getattr(module, f"{op.name}_workspace")(*[values[n] for n in op.workspace])
        assert 0 <= size < 2**62, f"{call.name} wants a workspace of {size} bytes"
