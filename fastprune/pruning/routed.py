"""What the experts of a layer do with the tokens that are routed to them, and scores by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastprune.distributed import Processes
from fastprune.kernels import ops
from fastprune.models.experts import INPUTS, Visit, observed
from fastprune.models.families import Sublayer

Units = dict[str, Tensor]
"""One layer's sums per unit, fp64, by kind: of experts (experts,), of the channels inside of them
(experts, channels)."""


class Routed:
    """What the experts of ``sublayer`` in ``layer`` are given and give back, summed over tokens.

    Attributes:
        tokens: how many each expert is given (experts,).
        outputs: Σ of gate times the norm of the expert's output (experts,).
        energies: Σ of the square of that (experts,).
        states: Σ of the squares of each input column (experts, hidden).
        inner: Σ of the squares of gate times what each down column reads (experts, channels).
    """

    def __init__(self, sublayer: Sublayer, layer: nn.Module, device: torch.device) -> None:
        self.experts = layer.get_submodule(sublayer.output.module)
        down = layer.get_parameter(sublayer.output.name)
        count, hidden, channels = down.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens, self.outputs, self.energies = (zeros(count) for _ in range(3))
        self.states, self.inner = zeros(count, hidden), zeros(count, channels)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What the experts are given inside the block counts."""
        with observed(self.experts, self._see):
            yield

    def complete(self, processes: Processes) -> None:
        """Account for what all ``processes`` have seen; call it once, after everything was seen."""
        processes.sum_(self.tokens, self.outputs, self.energies, self.states, self.inner)

    @torch.no_grad()
    def _see(self, visit: Visit) -> None:
        gated = visit.inner.float() * visit.gates.float()
        output = gated.to(visit.inner.dtype) @ self.experts.down_proj[visit.expert].T
        norms = output.float().norm(dim=-1).double()
        self.tokens[visit.expert] += len(norms)
        self.outputs[visit.expert] += norms.sum()
        self.energies[visit.expert] += norms.square().sum()
        self.states[visit.expert] += visit.states.float().square().sum(0).double()
        self.inner[visit.expert] += gated.square().sum(0).double()

    def mean_outputs(self) -> Tensor:
        """Of each expert the mean over its tokens of gate times output norm (experts,).

        That is the router-weighted expert activation of REAP (arXiv 2510.13999). An expert without
        tokens has 0.
        """
        return self.outputs / self.tokens.clamp_min(1)

    def inputs_of(self, parameter: str) -> Tensor:
        """L2 norms (experts, columns) of what the columns of ``parameter`` read."""
        return (self.states if parameter == INPUTS else self.inner).sqrt().float()


def expert_terms(
    name: str, weights: Tensor, kind: str, grad: Tensor | None = None, x: Tensor | None = None
) -> Units:
    """Unit sums of the terms of the parameter ``name`` of experts, as `ops.taylor` calls them.

    ``weights`` are (experts, rows, columns), ``grad`` likewise, ``x`` (experts, columns).
    """
    found = [
        ops.taylor(
            matrix,
            None if grad is None else grad[expert],
            x=None if x is None else x[expert],
            kind=kind,
        )
        for expert, matrix in enumerate(weights)
    ]
    rows, columns = (torch.stack(sums).double() for sums in zip(*found))
    return {"experts": rows.sum(1), "mlp": _by_channel(name, rows, columns)}


def channel_energies(layer: nn.Module, sublayer: Sublayer, seen: Routed) -> tuple[Tensor, Tensor]:
    """Of the channels inside of experts (experts, channels) the energy that leaves with each, and
    the largest weights times the norm of what the down column reads.

    The largest weights are those of gate row, up row and down column, relative to the layer's
    largest, summed.
    """
    rows, down = (layer.get_parameter(s.name).detach() for s in sublayer.slices[-2:])
    gate, up = extent(rows, 2).chunk(2, dim=1)
    parts = (gate, up, extent(down, 1))
    smallest = torch.finfo(torch.float64).tiny
    largest = sum(part / part.max().clamp_min(smallest) for part in parts)
    energy = expert_terms(sublayer.output.parameter, down, "l2")["mlp"] * seen.inner
    return energy, largest * seen.inner.sqrt()


def extent(weights: Tensor, dim: int) -> Tensor:
    """The largest weight plus the absolute value of the smallest, along ``dim``, in fp64."""
    return weights.amax(dim).double() + weights.amin(dim).double().abs()


def _by_channel(name: str, rows: Tensor, columns: Tensor) -> Tensor:
    """Sums (experts, channels) of those of the rows and columns of the parameter ``name``."""
    if name == INPUTS:
        gate, up = rows.chunk(2, dim=1)
        return gate + up
    return columns
