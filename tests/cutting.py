"""The simplest surgery there is, to make models whose layers differ in size; and a simple plan."""

from torch import nn

from fastprune.models.conform import conform
from fastprune.models.families import Geometry, geometries
from fastprune.pruning.plan import LayerPlan, Plan

HEAD = 16  # size of every head


def cut(model: nn.Module, sizes: list[tuple[int, int, int]]) -> nn.Module:
    """Keep the first heads and channels of every layer: the simplest surgery there is."""
    for layer, (query, kv, channels) in zip(model.model.layers, sizes, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        if query:
            for name, heads in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
                keep_rows(getattr(attention, name), heads * HEAD)
            keep_columns(attention.o_proj, query * HEAD)
        if channels:
            keep_rows(mlp.gate_proj, channels)
            keep_rows(mlp.up_proj, channels)
            keep_columns(mlp.down_proj, channels)
    conform(model, [Geometry(query, kv, c, HEAD) for query, kv, c in sizes])
    return model


def every_second(model: nn.Module, kind: str, layers: tuple[int, ...] | None = None) -> Plan:
    """A plan by which every second unit of `kind` goes, from all layers or from `layers`."""
    sizes, plans = geometries(model), []
    for index, size in enumerate(sizes):
        kept = {name: tuple(range(units)) for name, units in size.units.items()}
        if layers is None or index in layers:
            kept[kind] = kept[kind][1::2]
        plans.append(LayerPlan(index, kept))
    return Plan(tuple(sizes), tuple(plans))


def keep_rows(linear: nn.Linear, n: int) -> None:
    linear.weight = nn.Parameter(linear.weight[:n].detach().clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[:n].detach().clone())
    linear.out_features = n


def keep_columns(linear: nn.Linear, n: int) -> None:
    linear.weight = nn.Parameter(linear.weight[:, :n].detach().clone())
    linear.in_features = n
