"""Apply a plan to the weights: the model becomes smaller in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprune.kernels import ops
from fastprune.models.conform import conform
from fastprune.models.families import decoder_layers, geometries, sublayers
from fastprune.models.units import Slice
from fastprune.progress import track
from fastprune.pruning.plan import LayerPlan, Plan


@torch.no_grad()
def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Cut ``model`` down to ``plan`` in place; InputError when the plan is of another model.

    Parameters are replaced one at a time, so the extra memory is one tensor. A sublayer of which
    nothing is kept is removed. The model's configuration follows the new sizes, so the result
    trains, generates, and saves like any other model.
    """
    plan.check_model(geometries(model))
    for layer, kept in zip(decoder_layers(model), plan.layers, strict=True):
        keep_scales(layer, kept)
    cut_units(model, plan)
    conform(model, plan.result())


@torch.no_grad()
def cut_units(model: nn.Module, plan: Plan) -> None:
    """Cut the parameters of ``model`` down to ``plan`` in place, those of removed sublayers aside.

    For a family that is not registered with the classes of `apply_plan`. InputError when the plan
    is of another model.
    """
    sizes = geometries(model)
    plan.check_model(sizes)
    layers = zip(decoder_layers(model), plan.layers, strict=True)
    for layer, kept in track(layers, "surgery", total=len(sizes)):
        _cut(layer, kept)


def kept_entries(s: Slice, units: Sequence[int]) -> Tensor:
    """Indices (int64, ascending) along ``s.dim`` that the kept ``units`` own."""
    starts = s.offset + torch.tensor(units, dtype=torch.int64) * s.width
    return (starts[:, None] + torch.arange(s.width)).flatten()


def cut_parameter(parameter: Tensor, slices: Sequence[Slice], units: Sequence[int]) -> Tensor:
    """``parameter`` with what the kept ``units`` own of its ``slices``, and all outside of them."""
    dim = slices[0].dim
    stays = torch.ones(parameter.shape[dim], dtype=torch.bool)
    for s in slices:
        stays[s.span] = False
        stays[kept_entries(s, units)] = True
    (kept,) = ops.gather([parameter.detach()], [stays.nonzero().flatten()], [dim])
    return kept


def _cut(layer: nn.Module, kept: LayerPlan) -> None:
    for sublayer in sublayers(layer):
        units = kept.kept[sublayer.kind]
        if not 0 < len(units) < sublayer.units:
            continue
        for name, slices in sublayer.owned.items():
            module, parameter = layer.get_submodule(slices[0].module), layer.get_parameter(name)
            new = nn.Parameter(cut_parameter(parameter, slices, units), parameter.requires_grad)
            setattr(module, slices[0].parameter, new)
            if new.dim() == 2:
                module.out_features, module.in_features = new.shape


@torch.no_grad()
def keep_scales(layer: nn.Module, plan: LayerPlan) -> None:
    """Scale norms over all heads so that what is left of their input keeps the size it had.

    Such a norm divides by the root mean square over all heads, which is another once some are gone.
    By how much follows from the rows of the projection that it reads, for inputs of no particular
    direction.
    """
    for sublayer in sublayers(layer):
        units = plan.kept[sublayer.kind]
        if not 0 < len(units) < sublayer.units:
            continue
        rows = (s for s in sublayer.inputs if s.parameter == "weight")
        for scale, read in zip(sublayer.scales, rows):
            energy = layer.get_parameter(read.name).double().square().mean(1)
            ratio = energy[kept_entries(read, units).to(energy.device)].mean() / energy.mean()
            layer.get_parameter(scale.name).mul_(ratio.sqrt())
