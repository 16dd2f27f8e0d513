"""Least-squares compensation: what is kept takes over what it can of what is removed.

Layer by layer, from the already pruned prefix: with X the inputs of o_proj or down_proj on
calibration tokens, H = XᵀX, and E what the hidden states behind the uncut layer would lack of the
dense model's, the kept columns become

    W_K ← W_K + (W_R H_RK + β·(EᵀX)_K) (H_KK + λ·mean(diag H)·I)⁻¹

which minimises ‖X_K W_Kᵀ − X Wᵀ − β·E‖² with a pull of strength λ toward the original kept weights:
the layer gives what it gave, and makes up for a part β of what went wrong before it (as in
Quantization Error Propagation, arXiv 2504.09629). Windows of random tokens enter H beside the text,
for what is said with words that it has not. λ is chosen per sublayer on calibration windows
kept out of H, among values that include "change nothing", so a sublayer's error on unseen text
never grows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.inspect.perplexity import batches
from fastprune.models.blocks import Blocks
from fastprune.models.families import sublayers
from fastprune.progress import track
from fastprune.pruning.moments import After, Moments, advance, collect
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.surgery import kept_entries

log = logging.getLogger("fastprune")

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Pull toward the original weights, in units of the mean diagonal of H."""

MADE_UP = 0.25
"""β: the part of what went wrong before a sublayer that it makes up for."""

HELD_OUT = 8
"""One calibration batch in this many, and the last, judge the strengths instead of entering H."""

TEXT_PER_RANDOM = 4
"""Beside so many calibration windows one of random tokens enters H."""


@dataclass(frozen=True)
class Refit:
    """What compensation did to one sublayer, measured on held-out calibration text.

    Errors are squared output errors relative to the squared output: of plain removal, and after.
    What a sublayer is to make up for is a part of its output here.
    """

    layer: int
    sublayer: str
    strength: float | None
    error_before: float
    error_after: float


@torch.no_grad()
def compensate(
    model: nn.Module,
    plan: Plan,
    windows: Tensor,
    *,
    batch_size: int | None = None,
    random: bool = True,
) -> list[Refit]:
    """Refit o_proj and down_proj of the uncut ``model`` in place for the units that ``plan`` keeps.

    ``windows`` (n, s) are calibration token ids; with ``random`` the `random_windows` go beside
    them. The columns of removed units become zero, so that surgery afterwards changes nothing any
    more. Hidden states of all windows, as they become and as the dense model's are, stay on the
    host; the device holds one layer's activations of a batch and its moments.
    """
    prefix = Prefix(model, windows, batch_size, random=random)
    refits: list[Refit] = []
    for kept in track(plan.layers, "compensating"):
        refits += prefix.refit(kept)
    return refits


def random_windows(model: nn.Module, windows: Tensor) -> Tensor:
    """Windows (n // TEXT_PER_RANDOM, s) of tokens from all of the vocabulary, to go with (n, s).

    Where the calibration text says little, they hold a refit to what the dense model does there.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    shape = (len(windows) // TEXT_PER_RANDOM, windows.shape[1])
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


def fitting(
    windows: Tensor, random: Tensor | None = None, batch_size: int | None = None
) -> Sequence[tuple[Tensor, bool]]:
    """This process's batches of ``windows`` (n, s) and ``random`` ones, and which are held out.

    Text alone is held out, unless it is one batch, which then does for both.
    """
    text = batches(windows, batch_size)
    last = len(text) - 1
    found = [(ids, n % HELD_OUT == HELD_OUT - 1 or n == last) for n, ids in enumerate(text)]
    if random is not None and len(random):
        found += [(ids, last == 0) for ids in batches(random, batch_size)]
    return distributed.share(found)


class Prefix:
    """The calibration hidden states at the front of the pruned prefix, kept on the host.

    They are those of token ``windows`` (n, s), with ``random`` of `random_windows` too. Each
    process keeps those of its own batches and counts their moments; refits are the same in all of
    them. The dense model's own are kept beside them from the first thinned layer on.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Tensor,
        batch_size: int | None = None,
        *,
        random: bool = True,
    ) -> None:
        self.blocks = Blocks(model)
        self.device = next(model.parameters()).device
        fit = fitting(windows, random_windows(model, windows) if random else None, batch_size)
        self.held_out = [held_out for _, held_out in fit]
        self.hidden = [self.blocks.embed(ids.to(self.device)).cpu() for ids, _ in fit]
        self.dense: list[Tensor] | None = None

    def refit(self, kept: LayerPlan) -> list[Refit]:
        """Refit the layer at the front in place for the units ``kept`` of it, and step past it."""
        layer, index = self.blocks.layers[kept.index], kept.index
        parts = [
            (s.kind, s.linear(layer), kept_entries(s.output, kept.kept[s.kind]))
            for s in sublayers(layer)
        ]
        thinned = [linear for _, linear, columns in parts if len(columns) < linear.in_features]
        if thinned and self.dense is None:
            self.dense = [hidden.clone() for hidden in self.hidden]
        after: After = {}
        if self.dense is not None:
            after = advance(self.blocks, index, self.dense, thinned)
        refits: list[Refit] = []
        for name, linear, columns in parts:
            if not len(columns):
                linear.weight.zero_()
                if linear.bias is not None:
                    linear.bias.zero_()
            elif linear in thinned:
                fit, test = self.moments(index, linear, after)
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

    def moments(
        self, index: int, linear: nn.Linear, after: After | None = None
    ) -> tuple[Moments, Moments]:
        """Moments of the inputs of ``linear`` in layer ``index``: to fit, and held out."""
        return collect(self.blocks, index, [linear], self.hidden, self.held_out, after)[linear]

    def advance(self, index: int) -> None:
        """Carry the hidden states through layer ``index`` as it is now."""
        advance(self.blocks, index, self.hidden)


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
    (h, lacking, _), (judge, lacks, lost) = (_problem(weight, linear.bias, m) for m in (fit, test))
    removed = torch.ones(linear.in_features, dtype=torch.bool, device=weight.device)
    removed[kept] = False

    def error(trial: Tensor) -> float:
        """‖X·trialᵀ − X Wᵀ − E‖² of the held-out text, relative to ‖X Wᵀ‖²."""
        change = weight - trial
        return ((_square(change, judge) + 2 * (change * lacks).sum() + lost) / whole).item()

    masked = weight.clone()
    masked[:, removed] = 0
    whole = _square(weight, judge).clamp_min(torch.finfo(torch.float32).tiny)
    before = error(masked)
    best, strength, after = masked, None, before
    cross = weight[:, removed] @ h[removed][:, kept] + lacking[:, kept]
    for candidate in STRENGTHS:
        update = solve(h[kept][:, kept], cross, candidate)
        if update is None:
            continue
        trial = masked.clone()
        trial[:, kept] += update
        value = error(trial)
        if value < after:
            best, strength, after = trial, candidate, value
    bias = None
    if linear.bias is not None:
        bias = linear.bias + (weight - best) @ (fit.sums / max(fit.count, 1))
        if fit.cross is not None:
            bias = bias + MADE_UP * _mean_error(linear, fit)
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


def _problem(
    weight: Tensor, bias: Tensor | None, moments: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    """H (in, in), β·EᵀX (out, in) and ‖β·E‖²; centred where a bias absorbs the means."""
    h = moments.squares if bias is None else moments.centred()
    if moments.cross is None:
        return h, torch.zeros_like(weight), weight.new_zeros(())
    cross, square = (
        (moments.cross, moments.target_square) if bias is None else moments.centred_cross()
    )
    lacking = cross - weight @ h
    lost = square - ((cross + lacking) * weight).sum()  # ‖T − X Wᵀ‖²
    return h, MADE_UP * lacking, MADE_UP**2 * lost.clamp_min(0)


def _mean_error(linear: nn.Linear, moments: Moments) -> Tensor:
    """Mean of what the uncut layer's output lacks (out,)."""
    count = max(moments.count, 1)
    mean = linear.weight.float() @ (moments.sums / count)
    mean = mean if linear.bias is None else mean + linear.bias
    return moments.target_sums / count - mean


def _square(difference: Tensor, h: Tensor) -> Tensor:
    """‖X Dᵀ‖² = tr(D H Dᵀ)."""
    return torch.einsum("oi,oi->", difference @ h, difference).clamp_min(0)
