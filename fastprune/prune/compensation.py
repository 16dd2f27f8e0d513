"""Least-squares compensation: what is kept takes over what it can of what is removed.

Layer by layer, from the already pruned prefix: with X the inputs of o_proj or down_proj on
calibration tokens and H = XᵀX, the kept columns become

    W_K ← W_K + W_R H_RK (H_KK + λ·mean(diag H)·I)⁻¹

which minimises ‖X_K W_Kᵀ − X Wᵀ‖² with a pull of strength λ toward the original kept weights.
λ is chosen per sublayer on calibration windows kept out of H, among values that include "change
nothing", so a sublayer's error on unseen text never grows.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.models.blocks import Blocks
from fastprune.models.families import attention_slices, mlp_slices
from fastprune.precision import fast_forward
from fastprune.progress import track
from fastprune.prune.plan import LayerPlan, Plan
from fastprune.prune.surgery import kept_entries

log = logging.getLogger("fastprune")

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Pull toward the original weights, in units of the mean diagonal of H."""

BATCH_TOKENS = 2048
"""Tokens of one calibration batch on the device."""

HELD_OUT = 8
"""One calibration batch in this many judges the strengths instead of entering H."""


@dataclass(frozen=True)
class Refit:
    """What compensation did to one sublayer, measured on held-out calibration text.

    Errors are squared output errors relative to the squared output: of plain removal, and after.
    """

    layer: int
    sublayer: str
    strength: float | None
    error_before: float
    error_after: float


class Moments:
    """Second moments XᵀX, sums and count of the inputs of a linear layer, in fp32."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.squares = torch.zeros(features, features, device=device)
        self.sums = torch.zeros(features, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Account for inputs x (..., features)."""
        x = x.flatten(0, -2).float()
        self.squares.addmm_(x.T, x)
        self.sums += x.sum(0)
        self.count += x.shape[0]

    def add_others(self) -> None:
        """Account for what the other processes have seen as well."""
        distributed.sum_(self.squares, self.sums)
        self.count = round(distributed.sums([self.count])[0])

    def centred(self) -> Tensor:
        """Σ (x − mean)(x − mean)ᵀ: what is left to a layer whose bias absorbs the mean."""
        return self.squares - torch.outer(self.sums, self.sums) / max(self.count, 1)


@torch.no_grad()
def compensate(
    model: nn.Module, plan: Plan, windows: Tensor, *, batch_size: int | None = None
) -> list[Refit]:
    """Refit o_proj and down_proj of the uncut ``model`` in place for the units that ``plan`` keeps.

    ``windows`` (n, s) are calibration token ids. The columns of removed units become zero, so
    that surgery afterwards changes nothing any more. Hidden states of all windows stay on the
    host; the device holds one layer's activations of a batch and its two moment matrices.
    """
    prefix = Prefix(model, windows, batch_size)
    refits: list[Refit] = []
    for kept in track(plan.layers, "compensating"):
        refits += prefix.refit(kept)
    return refits


class _Stop(Exception):
    """Ends a layer's forward as soon as the wanted input has been seen."""


class Prefix:
    """The calibration hidden states at the front of the pruned prefix, kept on the host.

    Each process keeps those of its own batches and counts their moments; refits are the same in
    all of them.
    """

    def __init__(self, model: nn.Module, windows: Tensor, batch_size: int | None) -> None:
        self.blocks = Blocks(model)
        self.device = next(model.parameters()).device
        size = batch_size or max(1, BATCH_TOKENS // windows.shape[1])
        batches = windows.split(size)
        self.numbers = distributed.share(range(len(batches)))
        self.hidden = [self.blocks.embed(batches[n].to(self.device)).cpu() for n in self.numbers]
        self.held_out = set(range(HELD_OUT - 1, len(batches), HELD_OUT)) or {len(batches) - 1}

    def refit(self, kept: LayerPlan) -> list[Refit]:
        """Refit the layer at the front in place for the units ``kept`` of it, and step past it."""
        layer, index = self.blocks.layers[kept.index], kept.index
        refits: list[Refit] = []
        for name, slices, units in (
            ("attention", attention_slices(layer), kept.kv_groups),
            ("mlp", mlp_slices(layer), kept.channels),
        ):
            if not slices:
                continue
            columns = kept_entries(slices[-1], units)
            linear = layer.get_submodule(slices[-1].module)
            if not units:
                linear.weight.zero_()
                if linear.bias is not None:
                    linear.bias.zero_()
            elif len(columns) < linear.in_features:
                fit, test = self.moments(index, linear)
                solution = refit(linear, columns.to(self.device), fit, test)
                solution.write(linear)
                refits.append(
                    Refit(
                        index,
                        name,
                        solution.strength,
                        solution.error_before,
                        solution.error_after,
                    )
                )
                log.debug("%s", refits[-1])
        self.advance(index)
        return refits

    def moments(self, index: int, linear: nn.Linear) -> tuple[Moments, Moments]:
        """Moments of the inputs of ``linear`` in layer ``index``: to fit, and held out."""
        fit, test = (Moments(linear.in_features, self.device) for _ in range(2))
        into = fit

        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            into.add(inputs[0])
            raise _Stop

        handle = linear.register_forward_pre_hook(see)
        try:
            for number, hidden in zip(self.numbers, self.hidden, strict=True):
                into = test if number in self.held_out else fit
                with contextlib.suppress(_Stop), fast_forward(self.device, hidden.dtype):
                    self.blocks.run(index, hidden.to(self.device))
        finally:
            handle.remove()
        fit.add_others()
        test.add_others()
        return (fit, test) if fit.count else (test, test)

    def advance(self, index: int) -> None:
        """Carry the hidden states through layer ``index`` as it is now."""
        for number, hidden in enumerate(self.hidden):
            with fast_forward(self.device, hidden.dtype):
                after = self.blocks.run(index, hidden.to(self.device))
            self.hidden[number] = after.to("cpu", hidden.dtype)


@dataclass(frozen=True)
class Solution:
    """A refit of one linear layer: the new weight (out, in), bias, and its held-out errors."""

    weight: Tensor
    bias: Tensor | None
    strength: float | None
    error_before: float
    error_after: float

    def write(self, linear: nn.Linear) -> None:
        """Put it into ``linear``, in that layer's dtype."""
        linear.weight.copy_(self.weight)
        if self.bias is not None:
            linear.bias.copy_(self.bias)


def refit(linear: nn.Linear, kept: Tensor, fit: Moments, test: Moments) -> Solution:
    """The weight of ``linear`` with only the columns ``kept``, refitted as ``test`` likes best.

    ``kept`` are column indices (int64, on the weight's device). The layer itself is not changed.
    """
    weight = linear.weight.float()
    h, judge = (m.squares if linear.bias is None else m.centred() for m in (fit, test))
    removed = torch.ones(linear.in_features, dtype=torch.bool, device=weight.device)
    removed[kept] = False

    masked = weight.clone()
    masked[:, removed] = 0
    whole = _error(weight, judge).clamp_min(torch.finfo(torch.float32).tiny)
    before = (_error(weight - masked, judge) / whole).item()
    best, strength, after = masked, None, before
    cross = weight[:, removed] @ h[removed][:, kept]
    for candidate in STRENGTHS:
        update = solve(h[kept][:, kept], cross, candidate)
        if update is None:
            continue
        trial = masked.clone()
        trial[:, kept] += update
        error = (_error(weight - trial, judge) / whole).item()
        if error < after:
            best, strength, after = trial, candidate, error
    bias = None
    if linear.bias is not None:
        bias = linear.bias + (weight - best) @ (fit.sums / max(fit.count, 1))
    return Solution(best, bias, strength, before, after)


def solve(h: Tensor, cross: Tensor, strength: float) -> Tensor | None:
    """cross (H + strength·mean(diag H)·I)⁻¹ for symmetric H (k, k) and cross (m, k).

    By Cholesky in fp32, in fp64 where that fails; None when H is not finite or not definite.
    """
    ridge = strength * h.diagonal().mean()
    for dtype in (torch.float32, torch.float64):
        damped = h.to(dtype, copy=True)
        damped.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            update = torch.cholesky_solve(cross.to(dtype).T, factor).T
            if update.isfinite().all():
                return update.float()
    return None


def _error(difference: Tensor, h: Tensor) -> Tensor:
    """‖X Dᵀ‖² = tr(D H Dᵀ)."""
    return torch.einsum("oi,oi->", difference @ h, difference).clamp_min(0)
