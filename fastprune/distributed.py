"""Several processes share one job, as torchrun starts them; each has the model and its own share.

    torchrun --nproc-per-node 8 -m fastprune prune MODEL --out DIR --ratio 0.2

What is computed per calibration window is computed by one of the processes, and sums over windows
are added up over all of them, so that each goes on with the same numbers; the first one writes.
That holds inside `joined`. Outside of it, and without torchrun, there is one process, `share`
returns everything and the sums stay what they are.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Items = TypeVar("Items", bound=Any)  # whatever can be sliced: sequences, ranges, tensors

TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others: the first may be writing a large checkpoint."""

_processes = 1  # those that share the work now: more than one only inside `joined`


def rank() -> int:
    """The number that torchrun gave this process; 0 is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) if _started() > 1 else 0


def world() -> int:
    """How many processes share the work."""
    return _processes


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """The processes that torchrun started share the work of the body, on one GPU each or on CPUs.

    ``device`` is the ``--device`` of the run. Every process must run the same body. Without
    torchrun nothing changes. Raises InputError when there are fewer GPUs than processes.
    """
    global _processes
    if _started() == 1 or _processes > 1:
        yield
        return
    import torch.distributed as dist  # here, so that the command line can ask for the rank early

    if not dist.is_initialized():
        cuda = _take_gpu(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        # Not at the end of the body: a group of the same processes cannot be made a second time.
        atexit.register(dist.destroy_process_group)
    _processes = dist.get_world_size()
    try:
        yield
    except BaseException:
        atexit.unregister(dist.destroy_process_group)  # which may wait for others that still work
        raise
    finally:
        _processes = 1


def share(items: Items) -> Items:
    """Every `world`-th of ``items``, from this process's own on; all of them for one process."""
    return items[rank() :: _processes] if _processes > 1 else items


def sum_(*tensors: Tensor) -> None:
    """Add up each of ``tensors`` over the processes, in place and in its own dtype.

    All processes hold the same bits afterwards. Against one process that summed alone the order of
    the sum differs: fp64 sums agree to about 1e-16, fp32 sums to about 1e-7.
    """
    if _processes > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def sums(values: Sequence[float]) -> list[float]:
    """``values`` added up over the processes, each on its own, in fp64."""
    import torch

    total = torch.tensor(values, dtype=torch.float64)
    sum_(total)
    return total.tolist()


def largest(value: int) -> int:
    """The largest ``value`` that any process has."""
    if _processes == 1:
        return value
    import torch
    import torch.distributed as dist

    most = torch.tensor(value)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def from_first(value: T) -> T:
    """What the first process has for ``value``, in all of them; it is pickled on the way."""
    if _processes == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def by_first(compute: Callable[[], T]) -> T:
    """What ``compute`` returns in the first process, in all of them; the others wait meanwhile.

    Outside of `joined` every process computes it.
    """
    return from_first(compute() if _processes == 1 or rank() == 0 else cast(T, None))


def wait() -> None:
    """Go on when all processes have come this far."""
    sums([0.0])


def own_gpu() -> int:
    """The number of this process's GPU: its own among the processes of this machine.

    Raises InputError.
    """
    import torch

    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise InputError(
            f"torchrun started more processes than there are GPUs here ({count}); "
            f"use --nproc-per-node {count}, or --device cpu"
        )
    return number


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _take_gpu(device: str) -> bool:
    """Make ``cuda`` mean a GPU of this process's own; whether the run is on GPUs at all."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return False
    if device not in ("auto", "cuda"):
        raise InputError(
            f"--device {device}: under torchrun each process takes a GPU of its own; "
            "leave --device out"
        )
    torch.cuda.set_device(own_gpu())
    return True
