"""A plan tried out on the uncut model: removed units are zeroed, and come back.

Only the output modules of sublayers change, as in compensation, so only they are kept aside: of a
resident model as they were, of one that is fetched layer by layer as they become.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastprune.models.families import sublayers
from fastprune.models.layers import Layers
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.compensation import compensate
from fastprune.pruning.plan import Plan
from fastprune.pruning.surgery import take_out


class DenseOutputs:
    """The output modules of all ``layers`` as they are now, to be put back bit for bit."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self._saved = layers.saved()

    def restore(self) -> None:
        """Put back all of them."""
        self.layers.restore(self._saved)

    @torch.no_grad()
    def show(self, index: int, kind: str | None = None) -> None:
        """Put them back in layer ``index``, which is loaded, alone; all of its kinds or one."""
        for name, parameter in self.layers.outputs(index, kind):
            parameter.copy_(self.layers.restored(self._saved, name))

    @contextmanager
    @torch.no_grad()
    def shown(self, index: int) -> Iterator[None]:
        """Inside the block layer ``index``, which is loaded, has these values; afterwards those it
        has now again."""
        now = [(p, p.clone()) for _, p in self.layers.outputs(index)]
        self.show(index)
        try:
            yield
        finally:
            for parameter, value in now:
                parameter.copy_(value)


@contextmanager
def preserved(layers: Layers) -> Iterator[DenseOutputs]:
    """What the block does to output modules is undone at its end; yields what undoes it."""
    dense = DenseOutputs(layers)
    try:
        yield dense
    finally:
        dense.restore()


def mask(layers: Layers, plan: Plan, calibration: Calibration | None) -> None:
    """Make the uncut model of ``layers`` compute what it will after ``plan``.

    With ``calibration`` what stays is refitted, as `compensate` does, on its text alone.
    """
    if calibration is not None:
        compensate(calibration, plan, random=False)
        return
    for index, layer in layers.walk():
        for sublayer in sublayers(layer):
            take_out(sublayer, layer, plan.layers[index])
        layers.keep(index)
