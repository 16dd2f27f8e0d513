"""Apply a plan to the weights: the model becomes smaller in place."""

from __future__ import annotations

import torch
from torch import nn

from fastprune.kernels import ops
from fastprune.models.conform import conform
from fastprune.models.families import (
    Slice,
    attention_slices,
    decoder_layers,
    geometries,
    mlp_slices,
)
from fastprune.progress import track
from fastprune.pruning.plan import Plan


@torch.no_grad()
def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Cut ``model`` down to ``plan`` in place; InputError when the plan is of another model.

    Parameters are replaced one at a time, so the extra memory is one tensor. A sublayer of which
    nothing is kept is removed. The model's configuration follows the new sizes, so the result
    trains, generates, and saves like any other model.
    """
    sizes = geometries(model)
    plan.check_model(sizes)
    layers = zip(decoder_layers(model), plan.layers, sizes, strict=True)
    for layer, kept, size in track(layers, "surgery", total=len(sizes)):
        if kept.kv_groups and len(kept.kv_groups) < size.kv_heads:
            _cut(layer, attention_slices(layer), kept.kv_groups)
        if kept.channels and len(kept.channels) < size.channels:
            _cut(layer, mlp_slices(layer), kept.channels)
    conform(model, plan.result())


def kept_entries(s: Slice, units: tuple[int, ...]) -> torch.Tensor:
    """Indices (int64, ascending) along ``s.dim`` that the kept ``units`` own."""
    starts = torch.tensor(units, dtype=torch.int64) * s.width
    return (starts[:, None] + torch.arange(s.width)).flatten()


def _cut(layer: nn.Module, slices: list[Slice], units: tuple[int, ...]) -> None:
    for s in slices:
        module, parameter = layer.get_submodule(s.module), layer.get_parameter(s.name)
        (kept,) = ops.gather([parameter.detach()], [kept_entries(s, units)], [s.dim])
        setattr(module, s.parameter, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        if s.parameter == "weight":
            module.out_features, module.in_features = kept.shape
