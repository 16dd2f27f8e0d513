"""A plan tried out on the uncut model: removed units are zeroed, and come back.

Only the output projections change, as in compensation, so only they are kept aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastprune.models.families import decoder_layers, sublayers
from fastprune.pruning.compensation import compensate
from fastprune.pruning.plan import Plan
from fastprune.pruning.surgery import kept_entries


class DenseOutputs:
    """The output projections of ``model`` as they are now, to be put back bit for bit.

    The values wait on the host: about a third of the block parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = {
            parameter: parameter.detach().to("cpu", copy=True)
            for layer in decoder_layers(model)
            for sublayer in sublayers(layer)
            for parameter in sublayer.linear(layer).parameters()
        }

    @torch.no_grad()
    def restore(self, linear: nn.Linear | None = None) -> None:
        """Put back one of the layers, or all of them."""
        for parameter in self._saved if linear is None else linear.parameters():
            parameter.copy_(self._saved[parameter])

    @contextmanager
    @torch.no_grad()
    def shown(self, layer: nn.Module) -> Iterator[None]:
        """Inside the block ``layer`` has these values; afterwards those it has now again."""
        linears = [sublayer.linear(layer) for sublayer in sublayers(layer)]
        now = [(p, p.clone()) for linear in linears for p in linear.parameters()]
        for linear in linears:
            self.restore(linear)
        try:
            yield
        finally:
            for parameter, value in now:
                parameter.copy_(value)


@contextmanager
def preserved(model: nn.Module) -> Iterator[DenseOutputs]:
    """What the block does to output projections is undone at its end; yields what undoes it."""
    dense = DenseOutputs(model)
    try:
        yield dense
    finally:
        dense.restore()


def mask(model: nn.Module, plan: Plan, windows: Tensor | None) -> None:
    """Make the uncut ``model`` compute what it will after ``plan``.

    With token ``windows`` (n, s) what stays is refitted, as `compensate` does, on these alone.
    """
    if windows is not None:
        compensate(model, plan, windows, random=False)
        return
    with torch.no_grad():
        for layer, kept in zip(decoder_layers(model), plan.layers, strict=True):
            for sublayer in sublayers(layer):
                columns = kept_entries(sublayer.output, kept.kept[sublayer.kind])
                zero_removed(sublayer.linear(layer), columns)


@torch.no_grad()
def zero_removed(linear: nn.Linear, kept: Tensor) -> None:
    """Zero all columns but ``kept`` (int64); without any left the sublayer is gone, bias too."""
    removed = torch.ones(linear.in_features, dtype=torch.bool, device=linear.weight.device)
    removed[kept.to(removed.device)] = False
    linear.weight[:, removed] = 0
    if removed.all() and linear.bias is not None:
        linear.bias.zero_()
