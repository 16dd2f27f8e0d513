"""Second moments of a layer's inputs on calibration text, alone and with reconstruction targets.

In the pruned prefix the hidden states leave those of the dense model. Beside the second moments of
a linear layer's inputs x, XᵀX, those with its reconstruction target t are kept, TᵀX: t is what the
sublayer would have to give so that the hidden states, to which the layer adds it, come out as the
dense model's do.

Where a norm g·y / rms(y) lies behind the linear layer (Gemma, OLMo 2), each token counts as the
norm sees it: with y the linear layer's own output, x stands for x / rms(y) and t for t / g. Without
that the few tokens whose y is a hundred times that of the others would decide alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.distributed import ALONE, Processes
from fastprune.models.experts import Visit, observed
from fastprune.models.families import residual_scale, sublayers
from fastprune.models.layers import Layers

ADDED = 0.1
"""A layer adds the outputs of its sublayers to the hidden states if, by the median token, so much
of what it changes at most is anything else."""

LEAST_ENERGY = 1e-12
"""Mean square of an output below which a token counts as if it had as much."""
SMALL_GAIN = 1e-2
"""Of a norm's mean gain: an entry below takes no share of a reconstruction target."""

ROWS = 4
"""XᵀX is symmetric: it is counted in so many rows of blocks, each from the diagonal on."""

K = TypeVar("K")

After = Mapping[nn.Linear, Sequence[Tensor]]
"""The dense model's hidden states (n, s, hidden) after a sublayer is added to them, by its output
module, batch by batch."""


class Moments:
    """Second moments, sums and count of the inputs of a linear layer, in fp32; targets as well.

    Attributes:
        squares: XᵀX (in, in); below the diagonal only after `complete`.
        cross: TᵀX (out, in), or None without targets.
        target_square: ‖T‖², a scalar.
    """

    def __init__(self, linear: nn.Linear, *, targets: bool = False) -> None:
        rows, columns, device = linear.out_features, linear.in_features, linear.weight.device
        self.squares = torch.zeros(columns, columns, device=device)
        self.sums = torch.zeros(columns, device=device)
        self.count = 0
        self.cross = torch.zeros(rows, columns, device=device) if targets else None
        self.target_sums = torch.zeros(rows if targets else 0, device=device)
        self.target_square = torch.zeros((), device=device)

    def add(self, x: Tensor, target: Tensor | None = None) -> None:
        """Account for inputs x (..., in), and for their targets (..., out) where they count."""
        x = x.flatten(0, -2).float()
        for start, end in symmetric_rows(x.shape[1]):
            self.squares[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        self.sums += x.sum(0)
        self.count += x.shape[0]
        if self.cross is not None and target is not None:
            target = target.flatten(0, -2).float()
            self.cross.addmm_(target.T, x)
            self.target_sums += target.sum(0)
            self.target_square += target.square().sum()

    def complete(self, processes: Processes) -> None:
        """Account for what all ``processes`` have seen; call it once, after all `add`."""
        for start, end in symmetric_rows(len(self.squares)):
            self.squares[end:, start:end] = self.squares[start:end, end:].T
        processes.sum_(self.squares, self.sums)
        if self.cross is not None:
            processes.sum_(self.cross, self.target_sums, self.target_square)
        self.count = round(processes.sums([self.count])[0])

    def centred(self) -> Tensor:
        """Σ (x − mean)(x − mean)ᵀ: what is left to a layer whose bias absorbs the mean."""
        return self.squares - torch.outer(self.sums, self.sums) / max(self.count, 1)

    def centred_cross(self) -> tuple[Tensor, Tensor]:
        """Σ (t − mean)(x − mean)ᵀ and Σ ‖t − mean‖², with targets."""
        assert self.cross is not None
        mean = self.target_sums / max(self.count, 1)
        square = self.target_square - mean.square().sum() * self.count
        return self.cross - torch.outer(mean, self.sums), square


def symmetric_rows(columns: int) -> list[tuple[int, int]]:
    """Starts and ends of the `ROWS` rows of blocks of XᵀX (columns, columns)."""
    step = -(-columns // ROWS)
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


class Behind:
    """What lies between an output module of a sublayer and the hidden states.

    Attributes:
        linear: the output module; None for a mixture of experts, which has several.
        added: the module whose output is added: the norm behind it, itself, or the mixture.
    """

    def __init__(self, linear: nn.Linear | None, added: nn.Module) -> None:
        self.linear, self.added = linear, added

    @cached_property
    def gain(self) -> Tensor | None:
        """What the norm multiplies each entry by (out,), fp32; None without one."""
        if self.linear is None or self.added is self.linear:
            return None
        ones = self.linear.weight.new_ones(self.linear.out_features)
        return self.added.forward(ones).float()  # not by a call, which the walks listen to

    def seen(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Inputs x (..., in) of the linear layer, and ``target`` (..., out) for what is added, as
        moments count them."""
        if self.linear is None or self.gain is None:
            return x, target
        x = x.float()
        y = functional.linear(x, self.linear.weight.float())
        scale = y.square().mean(-1, keepdim=True).clamp_min(LEAST_ENERGY).rsqrt()
        if target is not None:
            small = self.gain.abs() < SMALL_GAIN * self.gain.abs().mean()
            target = torch.where(small, y * scale, target / self.gain)
        return x * scale, target


class _Stop(Exception):
    """Ends a layer's forward as soon as the wanted inputs have been seen."""


@torch.no_grad()
def collect(
    layers: Layers,
    index: int,
    linears: Sequence[nn.Linear],
    states: Sequence[Tensor],
    held_out: Sequence[bool],
    after: After | None = None,
) -> dict[nn.Linear, tuple[Moments, Moments]]:
    """Moments of the inputs of ``linears`` in layer ``index`` here: to fit, and held out.

    Those of this process are counted, which `completed` adds up.
    ``linears`` are output modules of its sublayers, in their order; ``states`` (n, s, hidden) the
    layer's inputs, anywhere; ``held_out`` says of each batch which it is for. Targets are counted
    for those that ``after`` has, for the same batches.
    """
    if not linears:
        return {}
    after = after or {}
    found = {
        linear: (Moments(linear, targets=linear in after), Moments(linear, targets=linear in after))
        for linear in linears
    }
    every = {behind.linear: behind for behind in outputs(layers.modules[index])}
    scale = residual_scale(layers.modules[index])
    before = torch.empty(0)  # the hidden states that the next sublayer adds to
    dense: dict[nn.Linear, Tensor] = {}  # what they should be after it
    side = 0

    def see(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        target = None
        if linear in dense:
            target = (dense[linear].to(layers.device).float() - before) / scale
        found[linear][side].add(*every[linear].seen(inputs[0], target))
        if linear is linears[-1]:
            raise _Stop

    def pass_by(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal before
        before = before + scale * output

    handles = [linear.register_forward_pre_hook(see) for linear in linears]
    if after:
        *passed, _ = every.values()
        handles += [behind.added.register_forward_hook(pass_by) for behind in passed]
    try:
        for number, hidden in enumerate(states):
            hidden = hidden.to(layers.device)
            before, side = hidden.float(), int(held_out[number])
            dense = {linear: batches[number] for linear, batches in after.items()}
            with contextlib.suppress(_Stop):
                layers.run(index, hidden, fast=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def collect_routed(
    layers: Layers,
    index: int,
    experts: nn.Module,
    linears: Mapping[int, nn.Linear],
    states: Sequence[Tensor],
    held_out: Sequence[bool],
) -> dict[int, tuple[Moments, Moments]]:
    """Moments of what some ``experts`` of layer ``index`` read, times the gates, of the tokens
    routed to them: to fit, and held out.

    ``linears`` are their output matrices by number; the rest is as for `collect`.
    """
    found = {expert: (Moments(linear), Moments(linear)) for expert, linear in linears.items()}
    side = 0

    def see(visit: Visit) -> None:
        if visit.expert in found:
            found[visit.expert][side].add(visit.inner * visit.gates)

    with observed(experts, see):
        for number, hidden in enumerate(states):
            side = int(held_out[number])
            layers.run(index, hidden.to(layers.device), fast=True)
    return found


def completed(
    found: Mapping[K, tuple[Moments, Moments]], processes: Processes
) -> dict[K, tuple[Moments, Moments]]:
    """What all ``processes`` have ``found`` by `collect` or `collect_routed`, added up.

    Where nothing was seen to fit, what is held out does for both.
    """
    for pair in found.values():
        for moments in pair:
            moments.complete(processes)
    return {key: (a, b) if a.count else (b, b) for key, (a, b) in found.items()}


@torch.no_grad()
def advance(
    layers: Layers,
    index: int,
    states: Sequence[Tensor],
    targets: Sequence[nn.Linear] = (),
    processes: Processes = ALONE,
) -> After:
    """Carry the hidden states (n, s, hidden) through layer ``index`` as it is, in their place:
    new memory for them at every layer would leave the heap in pieces.

    What they are after those sublayers are added whose output module is among ``targets`` comes
    back, for `collect`: nothing where the layer does more than to add what its sublayers give to
    its input, for then no weights can be fitted to a target. The first of ``processes`` decides
    that for all.
    """
    added: dict[nn.Module, Tensor] = {}
    scale = residual_scale(layers.modules[index])
    watched = outputs(layers.modules[index]) if targets else []
    places = {behind.linear: place for place, behind in enumerate(watched)}
    handles = [
        behind.added.register_forward_hook(
            lambda module, _, output: added.__setitem__(module, output)
        )
        for behind in watched
    ]
    after: dict[nn.Linear, list[Tensor]] = {linear: [] for linear in targets}
    plain = True
    try:
        for number, hidden in enumerate(states):
            place, hidden = hidden.device, hidden.to(layers.device)
            output = layers.run(index, hidden, fast=True).to(hidden.dtype)
            if watched and number == 0:
                plain = _only_adds(hidden, output, [scale * a for a in added.values()])
            states[number].copy_(output)
            for linear in targets:
                later = watched[places[linear] + 1 :]
                then = states[number]
                if later:
                    then = output.float()
                    for other in later:
                        then = then - scale * added[other.added]
                    then = then.to(place, hidden.dtype)
                after[linear].append(then)
            added.clear()
    finally:
        for handle in handles:
            handle.remove()
    if targets:
        plain = processes.from_first(plain)
    return after if plain else {}


def outputs(layer: nn.Module) -> list[Behind]:
    """The output modules of the sublayers that ``layer`` has, in their order; a mixture of experts
    has none.

    A norm behind one with a bias is left out of account: such an output could not be scaled token
    by token.
    """
    found = []
    for sublayer in sublayers(layer):
        linear = None if sublayer.mixture is not None else sublayer.linear(layer)
        plain = linear is not None and linear.bias is not None
        found.append(Behind(linear, linear if plain else sublayer.adds(layer)))
    return found


def _only_adds(before: Tensor, after: Tensor, added: Sequence[Tensor]) -> bool:
    change = after.float() - before.float()
    rest = change - sum(a.float() for a in added)
    share = rest.norm(dim=-1) / change.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return share.median().item() <= ADDED
