"""Several processes share one job, as torchrun starts them; each has the model and its own share.

    torchrun --nproc-per-node 8 -m fastprune prune MODEL --out DIR --ratio 0.2

What is computed per calibration window is computed by one of the processes, and sums over windows
are added up over all of them, so that each goes on with the same numbers; the first one writes.
A command asks once which processes there are (`joined`) and hands the answer on. Whoever is given
no `Processes` works alone.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Items = TypeVar("Items", bound=Any)  # whatever can be sliced: sequences, ranges, tensors

TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others: the first may be writing a large checkpoint."""


@dataclass(frozen=True)
class Processes:
    """This process, number ``rank``, among ``count`` that share the work.

    All of them call the methods that exchange values, in the same order; one process alone has
    nothing to exchange. Several must be `joined` before.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def share(self, items: Items) -> Items:
        """Every ``count``-th of ``items``, from this process's own on."""
        return items[self.rank :: self.count] if self.several else items

    def sum_(self, *tensors: Tensor) -> None:
        """Add up each of ``tensors`` over the processes, in place and in its own dtype.

        All processes hold the same bits afterwards. Against one process that summed alone the order
        of the sum differs: fp64 sums agree to about 1e-16, fp32 sums to about 1e-7.
        """
        if self.several:
            import torch.distributed as dist  # here, so that the command line can do without torch

            for tensor in tensors:
                dist.all_reduce(tensor)

    def sums(self, values: Sequence[float]) -> list[float]:
        """``values`` added up over the processes, each on its own, in fp64."""
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        self.sum_(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        """The largest ``value`` that any process has."""
        if not self.several:
            return value
        import torch
        import torch.distributed as dist

        most = torch.tensor(value)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def from_first(self, value: T) -> T:
        """What the first process has for ``value``, in all of them; it is pickled on the way."""
        if not self.several:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def by_first(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns in the first process, in all of them; the others wait."""
        return self.from_first(compute() if self.first else cast(T, None))

    def wait(self) -> None:
        """Go on when all processes have come this far."""
        self.sums([0.0])


ALONE = Processes()
"""The one process of a job that is not shared."""


def launched() -> Processes:
    """The processes that torchrun started, as it tells each of them; `ALONE` without torchrun."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return Processes(int(os.environ.get("RANK", "0")), count) if count > 1 else ALONE


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The `launched` processes, able to exchange values, on one GPU each or on CPUs.

    ``device`` is the ``--device`` of the run. Every process must run the same body. Raises
    InputError when there are fewer GPUs than processes.
    """
    processes = launched()
    if not processes.several:
        yield processes
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        cuda = _take_gpu(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        # Not at the end of the body: a group of the same processes cannot be made a second time.
        atexit.register(dist.destroy_process_group)
    try:
        yield processes
    except BaseException:
        atexit.unregister(dist.destroy_process_group)  # which may wait for others that still work
        raise


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
