"""Optimal Brain Surgeon scores: what a unit's removal costs when the others take over.

With X the inputs of a sublayer's output module and H = XᵀX + λI, removing the columns g of W and
refitting the rest changes the output by tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ) (squared). Units leave in steps,
cheapest first; after each step W is refitted and H⁻¹ loses the removed columns by its Schur
complement, so the next costs are those of the thinned layer. A unit's score is its cost when it
left. Source: Hassibi and Stork, "Optimal Brain Surgeon", 1993; in blocks as in ZipLM (arXiv
2302.04089).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune.models.families import sublayers
from fastprune.pruning.calibration import Prefix

DAMPING = 1e-2
"""λ in units of the mean diagonal of H."""
STEPS = 32
"""Steps in which a layer's units leave; a unit's cost is exact at the start of its step."""


def obs(prefix: Prefix, index: int) -> dict[str, Tensor]:
    """Scores (units,) fp64 of the layer at the front of ``prefix``, by kind of sublayer.

    Steps past the layer, which is not changed: inputs are the dense model's.
    """
    layer, found = prefix.layers.modules[index], {}
    for sublayer in sublayers(layer):
        linear = sublayer.linear(layer)
        fit, held_out = prefix.moments(index, [linear])[linear]
        h = fit.squares if fit is held_out else fit.squares + held_out.squares
        found[sublayer.kind] = elimination_costs(linear.weight, h, sublayer.output.width).cpu()
    prefix.advance(index)
    return found


def elimination_costs(weight: Tensor, h: Tensor, width: int, steps: int = STEPS) -> Tensor:
    """Cost (units,) fp64 of each unit of ``width`` columns of ``weight`` (out, in) as it leaves.

    ``h`` (in, in) is XᵀX. Costs never fall in the order of leaving and are never equal, so their
    ranking is that order. In fp64: the inverse of a nearly singular H needs it.
    """
    inverse = h.double().clone()
    inverse.diagonal().add_(DAMPING * inverse.diagonal().mean().clamp_min(1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    w = weight.double()
    alive = torch.arange(w.shape[1] // width, device=w.device)
    costs = torch.zeros(len(alive), dtype=torch.float64, device=w.device)
    floor = torch.zeros((), dtype=torch.float64, device=w.device)
    share = max(1, len(alive) // steps)
    while len(alive):
        now = _costs(w, inverse, width)
        order = torch.argsort(now, stable=True)
        leaving = order[:share]
        rank = torch.arange(1, len(leaving) + 1, device=w.device, dtype=torch.float64)
        risen = torch.maximum(now[leaving], floor).cummax(0).values
        costs[alive[leaving]] = risen * (1 + 1e-12 * rank) + 1e-300 * rank
        floor = costs[alive[leaving]].max()
        kept = order[share:].sort().values
        gone, stay = _columns(leaving.sort().values, width), _columns(kept, width)
        factor = torch.linalg.cholesky(inverse[gone][:, gone])
        shift = torch.cholesky_solve(inverse[gone][:, stay], factor)
        w = w[:, stay] - w[:, gone] @ shift
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ shift
        alive = alive[kept]
    return costs


def _costs(w: Tensor, inverse: Tensor, width: int) -> Tensor:
    units = w.shape[1] // width
    if width == 1:
        return w.square().sum(0) / inverse.diagonal()
    blocks = inverse.view(units, width, units, width)
    diagonal = blocks[torch.arange(units), :, torch.arange(units)]
    mine = w.view(-1, units, width).permute(1, 2, 0)
    return (mine * torch.cholesky_solve(mine, torch.linalg.cholesky(diagonal))).sum((1, 2))


def _columns(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
