"""Second moments of a layer's inputs on calibration text, alone and with reconstruction targets.

In the pruned prefix the hidden states leave those of the dense model. Beside the second moments of
a linear layer's inputs x, XᵀX, those with its reconstruction target t are kept, TᵀX: t is what the
sublayer would have to add to the hidden states it gets so that they come out as the dense model's
do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.models.experts import Visit, observed
from fastprune.models.families import sublayers
from fastprune.models.layers import Layers

ADDED = 0.1
"""A layer adds the outputs of its sublayers to the hidden states if, by the median token, so much
of what it changes at most is anything else."""

ROWS = 4
"""XᵀX is symmetric: it is counted in so many rows of blocks, each from the diagonal on."""

After = Mapping[nn.Linear, Sequence[Tensor]]
"""The dense model's hidden states (n, s, hidden) behind a sublayer, by its output module, batch by
batch."""


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

    def complete(self) -> None:
        """Account for what the other processes have seen as well; call it once, after all `add`."""
        for start, end in symmetric_rows(len(self.squares)):
            self.squares[end:, start:end] = self.squares[start:end, end:].T
        distributed.sum_(self.squares, self.sums)
        if self.cross is not None:
            distributed.sum_(self.cross, self.target_sums, self.target_square)
        self.count = round(distributed.sums([self.count])[0])

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
    """Moments of the inputs of ``linears`` in layer ``index``: to fit, and held out.

    ``linears`` are output modules of its sublayers, in their order; ``states`` (n, s, hidden) the
    layer's inputs, anywhere; ``held_out`` says of each batch which it is for. Targets are counted
    for those that ``after`` has, for the same batches.
    """
    if not linears:
        return {}
    after = after or {}
    found = {
        linear: tuple(Moments(linear, targets=linear in after) for _ in range(2))
        for linear in linears
    }
    before = torch.empty(0)  # the hidden states that the next sublayer adds to
    dense: dict[nn.Linear, Tensor] = {}  # what they should be after it
    side = 0

    def see(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        target = dense[linear].to(layers.device).float() - before if linear in dense else None
        found[linear][side].add(inputs[0], target)
        if linear is linears[-1]:
            raise _Stop

    def pass_by(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal before
        before = before + output

    handles = [linear.register_forward_pre_hook(see) for linear in linears]
    if after:
        every = outputs(layers.modules[index])
        handles += [linear.register_forward_hook(pass_by) for linear in every[:-1]]
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
    for moments in found.values():
        for m in moments:
            m.complete()
    return {linear: (a, b) if a.count else (b, b) for linear, (a, b) in found.items()}


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
    for pair in found.values():
        for m in pair:
            m.complete()
    return {expert: (a, b) if a.count else (b, b) for expert, (a, b) in found.items()}


@torch.no_grad()
def advance(
    layers: Layers, index: int, states: Sequence[Tensor], targets: Sequence[nn.Linear] = ()
) -> After:
    """Carry the hidden states (n, s, hidden) through layer ``index`` as it is, in their place:
    new memory for them at every layer would leave the heap in pieces.

    What they are behind those sublayers whose output module is among ``targets`` comes back, for
    `collect`: nothing where the layer does more than to add the outputs of its sublayers to its
    input, such as to put a norm behind them, for then no weights can be fitted to a target.
    """
    added: dict[nn.Module, Tensor] = {}
    watched = outputs(layers.modules[index]) if targets else []
    handles = [
        linear.register_forward_hook(lambda module, _, output: added.__setitem__(module, output))
        for linear in watched
    ]
    after: dict[nn.Linear, list[Tensor]] = {linear: [] for linear in targets}
    plain = True
    try:
        for number, hidden in enumerate(states):
            place, hidden = hidden.device, hidden.to(layers.device)
            output = layers.run(index, hidden, fast=True).to(hidden.dtype)
            if watched and number == 0:
                plain = _only_adds(hidden, output, list(added.values()))
            states[number].copy_(output)
            for linear in targets:
                later = watched[watched.index(linear) + 1 :]
                behind = states[number]
                if later:
                    behind = output.float()
                    for other in later:
                        behind = behind - added[other]
                    behind = behind.to(place, hidden.dtype)
                after[linear].append(behind)
            added.clear()
    finally:
        for handle in handles:
            handle.remove()
    if targets:
        plain = distributed.from_first(plain)
    return after if plain else {}


def outputs(layer: nn.Module) -> list[nn.Module]:
    """The modules whose outputs ``layer`` adds to the hidden states, in the order of its sublayers:
    output modules, and mixtures of experts as a whole."""
    return [sublayer.adds(layer) for sublayer in sublayers(layer)]


def _only_adds(before: Tensor, after: Tensor, added: Sequence[Tensor]) -> bool:
    change = after.float() - before.float()
    rest = change - sum(a.float() for a in added)
    share = rest.norm(dim=-1) / change.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return share.median().item() <= ADDED
