"""Apply a plan to the weights: the model becomes smaller in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprune.kernels import ops
from fastprune.models.conform import conform
from fastprune.models.families import decoder_layers, geometries, sublayers
from fastprune.models.units import Slice, Sublayer
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
    matrix = parameter.detach()
    if matrix.dim() > 2:  # of each expert one
        matrix = matrix.flatten(1)
    (kept,) = ops.gather([matrix], [stays.nonzero().flatten()], [dim])
    return kept.unflatten(1, parameter.shape[1:]) if parameter.dim() > 2 else kept


@torch.no_grad()
def take_out(sublayer: Sublayer, layer: nn.Module, plan: LayerPlan) -> None:
    """Make the uncut ``sublayer`` of ``layer`` compute what it will after ``plan``.

    Columns of removed units become zero. Of a removed expert that is its row in the router, which
    `routing` takes for an expert that is absent. Without any unit left the sublayer adds nothing.
    """
    kept, mixture = plan.kept[sublayer.kind], sublayer.mixture
    if mixture is None:
        zero_removed(sublayer.linear(layer), kept_entries(sublayer.output, kept))
        return
    router = layer.get_parameter(f"{mixture.router}.weight")
    router[_removed(sublayer.units, kept)] = 0
    matrices = layer.get_parameter(sublayer.output.name)
    for expert, channels in zip(kept, plan.inside):
        matrices[expert][:, _removed(sublayer.channels, channels)] = 0
    if not kept and mixture.always is not None:
        zero_removed(layer.get_submodule(mixture.always), torch.tensor([], dtype=torch.int64))


@torch.no_grad()
def zero_removed(linear: nn.Linear, kept: Tensor) -> None:
    """Zero all columns but ``kept`` (int64); without any left the sublayer is gone, bias too."""
    removed = _removed(linear.in_features, kept)
    linear.weight[:, removed.to(linear.weight.device)] = 0
    if removed.all() and linear.bias is not None:
        linear.bias.zero_()


def _removed(count: int, kept: Sequence[int] | Tensor) -> Tensor:
    """Which (count,) of so many are not among ``kept``."""
    removed = torch.ones(count, dtype=torch.bool)
    removed[torch.as_tensor(kept, dtype=torch.int64).cpu()] = False
    return removed


@torch.no_grad()
def cut_channels(sublayer: Sublayer, layer: nn.Module, channels: Sequence[Sequence[int]]) -> None:
    """Cut the experts of ``layer`` to the kept ``channels`` of each, as many in all, in place."""
    first, last = sublayer.inputs[-1], sublayer.output
    kept = torch.tensor(channels, dtype=torch.int64)  # (experts, kept)
    columns = _cut_matrices(layer.get_parameter(last.name), kept, 1)
    both = torch.cat([kept, kept + sublayer.channels], dim=1)  # gate rows, then up rows
    rows = _cut_matrices(layer.get_parameter(first.name), both, 0)
    for s, new in ((last, columns), (first, rows)):
        old = layer.get_parameter(s.name)
        module = layer.get_submodule(s.module)
        setattr(module, s.parameter, nn.Parameter(new, old.requires_grad))


def _cut_matrices(parameter: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Of each matrix of ``parameter`` the rows or columns that its row of ``indices`` names."""
    matrices = list(parameter.detach())
    return torch.stack(ops.gather(matrices, list(indices), [dim] * len(matrices)))


def _cut(layer: nn.Module, kept: LayerPlan) -> None:
    for sublayer in sublayers(layer):
        units = kept.kept[sublayer.kind]
        if 0 < len(units) < sublayer.units:
            _cut_units(sublayer, layer, units)
        if kept.inside and sublayer.mixture is not None:
            cut_channels(sublayer, layer, kept.inside)


def _cut_units(sublayer: Sublayer, layer: nn.Module, units: Sequence[int]) -> None:
    for name, slices in sublayer.owned.items():
        module, parameter = layer.get_submodule(slices[0].module), layer.get_parameter(name)
        new = nn.Parameter(cut_parameter(parameter, slices, units), parameter.requires_grad)
        setattr(module, slices[0].parameter, new)
        if new.dim() == 2 and hasattr(module, "out_features"):
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
