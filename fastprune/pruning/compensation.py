"""Least-squares compensation: what is kept takes over what it can of what is removed.

Layer by layer, from the already pruned prefix: with X the inputs of a sublayer's output module on
calibration tokens, H = XᵀX, and E the propagated error, which is what the hidden states behind the
uncut sublayer would lack of the dense model's, the kept columns become

    W_K ← W_K + (W_R H_RK + β·(EᵀX)_K) (H_KK + λ·mean(diag H)·I)⁻¹

which minimises ‖X_K W_Kᵀ − X Wᵀ − β·E‖² with a pull of strength λ toward the original kept weights:
the reconstruction target is the uncut sublayer's output and a share β of the propagated error (as
in Quantization Error Propagation, arXiv 2504.09629). Windows of random tokens enter H beside the
text, for words that the text does not have. λ is chosen per sublayer on calibration windows kept
out of H, among values that include "change nothing", so a sublayer's error on unseen text never
grows. Where experts lose channels, the output matrix of each is refitted on the tokens routed to
it, with their gates, and without E; experts do not take over for others that go.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastprune.models.families import Sublayer, sublayers
from fastprune.pruning.calibration import Calibration, Prefix
from fastprune.pruning.moments import Moments
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.surgery import kept_entries, take_out

log = logging.getLogger("fastprune")

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Pull toward the original weights, in units of the mean diagonal of H."""

ROUTED_BYTES = 2**30
"""Moments of experts that stand at a time, one expert's at least."""

PROPAGATED = 0.25
"""β: the share of the propagated error that a sublayer's reconstruction target takes in."""


@dataclass(frozen=True)
class Refit:
    """What compensation did to one sublayer, measured on held-out calibration text.

    Errors are squared output errors relative to the squared output: of plain removal, and after.
    A sublayer's share of the propagated error is a part of its output here.
    """

    layer: int
    sublayer: str
    strength: float | None
    error_before: float
    error_after: float


@torch.no_grad()
def compensate(
    calibration: Calibration, plan: Plan, *, batch_size: int | None = None, random: bool = True
) -> list[Refit]:
    """Refit the output modules of the uncut model in place for the units that ``plan`` keeps.

    With ``random`` windows of random tokens go beside those of the text. The columns of removed
    units become zero, so that surgery afterwards changes nothing any more. Hidden states of all
    windows, as they become and as the dense model's are, stay on the host; the device holds one
    layer's activations of a batch and its moments. What is refitted of weights that are fetched
    layer by layer is kept.
    """
    prefix = Prefix(calibration, batch_size=batch_size, random=random)
    refits: list[Refit] = []
    for index, _ in calibration.layers.walk("compensating"):
        refits += refit_layer(prefix, plan.layers[index])
        calibration.layers.keep(index)
    return refits


def refit_layer(prefix: Prefix, plan: LayerPlan) -> list[Refit]:
    """Refit the layer at the front of ``prefix`` in place by ``plan``, and step past it."""
    index = plan.index
    layer = prefix.layers.modules[index]
    changed = [s for s in sublayers(layer) if _loses(s, plan)]
    if changed:
        prefix.part_from_dense()
    thinned = {s.kind: s.linear(layer) for s in changed if s.mixture is None}
    after = prefix.advance_dense(index, list(thinned.values()))
    refits: list[Refit] = []
    for sublayer in changed:
        kind, kept = sublayer.kind, plan.kept[sublayer.kind]
        if sublayer.mixture is not None:
            take_out(sublayer, layer, replace(plan, inside=()))
            refits += _refit_experts(prefix, sublayer, plan)
        elif not kept:
            take_out(sublayer, layer, plan)
        else:
            linear, columns = thinned[kind], kept_entries(sublayer.output, kept)
            fit, test = prefix.moments(index, [linear], after)[linear]
            solution = refit(linear, columns.to(linear.weight.device), fit, test)
            solution.write(linear)
            errors = solution.error_before, solution.error_after
            refits.append(Refit(index, kind, solution.strength, *errors))
            log.debug("%s", refits[-1])
    prefix.advance(index)
    return refits


def _refit_experts(prefix: Prefix, sublayer: Sublayer, plan: LayerPlan) -> list[Refit]:
    """Refit the down columns that each kept expert of a layer keeps, on the tokens routed to it.

    Nothing is refitted where experts keep all of their channels. So many experts go at a time as
    have moments of `ROUTED_BYTES`.
    """
    layer = prefix.layers.modules[plan.index]
    experts = layer.get_submodule(sublayer.output.module)
    down = layer.get_parameter(sublayer.output.name).detach()
    kept = dict(zip(plan.kept[sublayer.kind], plan.inside))
    together = max(1, ROUTED_BYTES // (8 * sublayer.channels**2))
    numbers, refits = list(kept), []
    for start in range(0, len(numbers), together):
        linears = {expert: _as_linear(down[expert]) for expert in numbers[start : start + together]}
        moments = prefix.routed_moments(plan.index, experts, linears)
        for expert, linear in linears.items():
            columns = torch.tensor(kept[expert], dtype=torch.int64, device=down.device)
            solution = refit(linear, columns, *moments[expert])
            solution.write(linear)
            errors = solution.error_before, solution.error_after
            refits.append(Refit(plan.index, f"expert {expert}", solution.strength, *errors))
            log.debug("%s", refits[-1])
    return refits


def _as_linear(matrix: Tensor) -> nn.Linear:
    """The linear layer without a bias whose weight is ``matrix`` (out, in), in the same memory."""
    rows, columns = matrix.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return linear


def _loses(sublayer: Sublayer, plan: LayerPlan) -> bool:
    """Whether ``plan`` removes anything of ``sublayer``."""
    inside = plan.inside if sublayer.mixture is not None else ()
    return len(plan.kept[sublayer.kind]) < sublayer.units or bool(inside)


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
        trial = trial.to(linear.weight.dtype).float()  # judged as it will be written
        value = error(trial)
        if value < after:
            best, strength, after = trial, candidate, value
    bias = None
    if linear.bias is not None:
        bias = linear.bias + (weight - best) @ (fit.sums / max(fit.count, 1))
        if fit.cross is not None:
            bias = bias + PROPAGATED * _mean_error(linear, fit)
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
    return h, PROPAGATED * lacking, PROPAGATED**2 * lost.clamp_min(0)


def _mean_error(linear: nn.Linear, moments: Moments) -> Tensor:
    """Mean of what the uncut layer's output lacks (out,)."""
    count = max(moments.count, 1)
    mean = linear.weight.float() @ (moments.sums / count)
    mean = mean if linear.bias is None else mean + linear.bias
    return moments.target_sums / count - mean


def _square(difference: Tensor, h: Tensor) -> Tensor:
    """‖X Dᵀ‖² = tr(D H Dᵀ)."""
    return torch.einsum("oi,oi->", difference @ h, difference).clamp_min(0)
