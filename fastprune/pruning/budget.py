"""What the result may cost: a share or a number of parameters, bytes as saved, or decode latency.

A budget says how much must be saved, in parameters or in milliseconds, and what a removal saves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from fastprune.errors import InputError
from fastprune.models.adopted import config_with
from fastprune.models.checkpoint import written_form
from fastprune.models.families import (
    COARSE,
    FINEST,
    KINDS,
    UNITS,
    Geometry,
    block_parameters,
    decoder_layers,
    shared_norms,
    sublayers,
)
from fastprune.models.multimodal import outside
from fastprune.models.shards import stored_bytes
from fastprune.models.skeleton import skeleton
from fastprune.pruning.config import ALL, PruneConfig
from fastprune.pruning.latency import CostTable
from fastprune.pruning.sizes import (
    BudgetError,
    LayerSize,
    Limits,
    Removal,
    SublayerSize,
    check_align,
    parameters,
    reachable,
    smallest_unit,
)

BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


NEAR = 0.01
"""Of the block parameters: what is removed beyond or short of the budget by less needs no word."""


@dataclass(frozen=True)
class Budget:
    """``need`` must be saved: milliseconds where there is a ``table``, else parameters.

    ``unit`` and ``requested`` are what the user asked for. With ``at_least`` a little more may go
    but not less; without, the nearest is taken.
    """

    unit: str
    requested: float
    need: float
    at_least: bool = False
    table: CostTable | None = None

    def saved(self, layer: int, size: LayerSize, removal: Removal) -> float:
        """What ``removal`` saves in ``layer``, in the currency of ``need``."""
        if self.table is None:
            return parameters(size, removal)
        return self.table.saved(layer, removal)

    def total(self, sizes: Sequence[LayerSize], removals: Sequence[Removal]) -> float:
        """What ``removals`` save in all layers."""
        pairs = zip(sizes, removals, strict=True)
        return sum(self.saved(layer, size, removal) for layer, (size, removal) in enumerate(pairs))

    def part(self, share: float) -> Budget:
        """The budget of a step on the way: this ``share`` of the saving."""
        return replace(self, need=self.need * share)

    def unreachable(self, error: BudgetError, model: nn.Module, config: PruneConfig) -> InputError:
        """What to tell the user who asked for it of ``model``, with ``config``."""
        block = block_parameters(model)
        within = "within these structures, layers and limits"
        if self.table is not None:
            return InputError(
                f"{self.requested:.3g} ms a token cannot be reached: {within} "
                f"{self.table.dense - error.high:.3g} is the least, of {self.table.dense:.3g} now; "
                "give a larger --target-latency"
            )
        return InputError(
            f"removing {self.need / block:.1%} of the block parameters cannot be reached: {within} "
            f"{error.low / block:.1%} to {error.high / block:.1%} can be removed"
            f"{_as_share_of_structures(error, model, config)}"
        )

    def check_removes(self, model: nn.Module, config: PruneConfig) -> None:
        """InputError for a saving of parameters that is nearer to none than to one unit."""
        sizes, limits = layer_sizes(model, config), limits_of(config)
        check_align(sizes, limits)
        least = smallest_unit(sizes, limits)
        none_must_go = reachable(sizes, limits)[0] == 0
        if self.table is None and not self.at_least and none_must_go and self.need < least / 2:
            ratio = least / block_parameters(model)
            raise InputError(
                f"a removal of {self.need:.0f} parameters rounds to nothing: the smallest unit has "
                f"{least} parameters; give a --ratio of {ratio:.2g} or more"
            )


def _as_share_of_structures(error: BudgetError, model: nn.Module, config: PruneConfig) -> str:
    """How to say ``--ratio`` where it was meant of the structures alone; empty where it was not."""
    if config.ratio is None or config.ratio_of != "block" or "sublayer" in config.structures:
        return ""
    part = structure_parameters(model, config)
    need = config.ratio * part
    if part == block_parameters(model) or not error.low <= need <= error.high:
        return ""
    names = {"attention": "attention", "experts": "experts", "mlp": "MLPs"}
    named = " and ".join(names[s] for s in config.structures)
    where = f" in layers {config.layers}" if config.layers not in (None, ALL) else ""
    return (
        f"; if {config.ratio:.0%} of the {named}{where} is meant, that is --ratio "
        f"{need / block_parameters(model):.2g}, or --ratio {config.ratio:g} --ratio-of structures"
    )


def structure_parameters(model: nn.Module, config: PruneConfig) -> int:
    """Parameters of what ``config`` lets go, in the layers it selects."""
    return sum(size.whole or size.prunable for size in layer_sizes(model, config))


def layer_sizes(model: nn.Module, config: PruneConfig) -> list[LayerSize]:
    """What ``config`` lets go of each layer of ``model``.

    Readers of the deci layout need the first sublayer of the first layer, its attention.
    """
    layers = decoder_layers(model)
    selected = config.selected_layers(len(layers))
    sizes = [
        layer_size(layer, config.structures if i in selected else ())
        for i, layer in enumerate(layers)
    ]
    if config.layout == "deci":
        first = sizes[0].sublayers
        sizes[0] = LayerSize({**first, KINDS[0]: replace(first[KINDS[0]], whole=0)})
    return sizes


def limits_of(config: PruneConfig) -> Limits:
    """What ``config`` allows a layer to lose."""
    assert config.max_layer_ratio is not None and config.align is not None  # decided by `effort`
    return Limits(config.min_layer_ratio, config.max_layer_ratio, config.align)


def layer_size(layer: nn.Module, structures: Sequence[str]) -> LayerSize:
    """What may be removed from ``layer`` when only ``structures`` may be touched.

    Of a mixture that may lose experts no channels go; else a channel of every expert is one unit.
    """
    whole, found = "sublayer" in structures, {}
    for s in sublayers(layer):
        thin = s.kind in structures
        found[s.kind] = SublayerSize(
            units=s.units if thin else 0,
            cost=s.unit_cost(layer) if thin else 0,
            whole=s.parameters(layer) if whole else 0,
            least=s.least,
        )
        if s.mixture is not None and FINEST in structures and not thin:
            found[FINEST] = SublayerSize(s.channels, s.channel_cost(layer))
    norms = map(layer.get_submodule, shared_norms(layer) if whole else ())
    return LayerSize(found, sum(p.numel() for norm in norms for p in norm.parameters()))


def far_off(budget: Budget, config: PruneConfig, removed: int, block: int) -> str | None:
    """How and why ``removed`` of ``block`` parameters are not what ``budget`` asks for; None where
    they are near, or where it is one of milliseconds."""
    if budget.table is not None or abs(removed - budget.need) <= NEAR * block:
        return None
    if FINEST in config.structures and config.align is not None and config.align > 1:
        align = config.align
        why = f"--align {align} keeps {UNITS[FINEST]} in multiples of {align} in every layer"
        why += "; a smaller --align comes nearer"
    elif config.layout == "uniform":
        why = "--layout uniform takes the same from every layer; --layout per-layer comes nearer"
    elif FINEST in config.structures:
        why = "the limits of a layer leave no finer step; a smaller --min-layer-ratio or a larger "
        why += "--max-layer-ratio comes nearer"
    else:
        coarse = " and ".join(UNITS[kind] for kind in COARSE if kind in config.structures)
        if "sublayer" in config.structures or not coarse:
            coarse = f"{coarse} and sublayers" if coarse else "sublayers"
        why = f"{coarse} go as a whole"
        if "experts" not in config.structures:
            why += f"; --structures with {FINEST} comes nearer"
    asked, gone = budget.need / block, removed / block
    return f"asked to remove {asked:.1%} of the block parameters, {gone:.1%} go: {why}"


def budget_of(config: PruneConfig, model: nn.Module, table: CostTable | None) -> Budget | None:
    """The budget that ``config`` sets for ``model``; None when a given plan decides.

    Raises InputError for one that ``model`` meets already, or that its blocks cannot meet.
    """
    block = block_parameters(model)
    if config.ratio is not None:
        of = block if config.ratio_of == "block" else structure_parameters(model, config)
        return Budget("ratio", config.ratio * of / block, round(config.ratio * of))
    if config.target_params is not None:
        params = total_parameters(model)
        return _parameters(config.target_params, params, block)
    if config.target_bytes is not None:
        return _bytes(parse_bytes(config.target_bytes), model, block)
    if config.target_latency is not None:
        assert table is not None  # measured whenever a latency is asked for
        return _latency(config.target_latency, table)
    return None


def _parameters(requested: int, params: int, block: int) -> Budget:
    if not 0 < params - requested < block:
        raise InputError(
            f"--target-params {requested} cannot be reached: the model has {params} parameters, "
            f"{block} of them in its blocks; give a number between {params - block} and {params}"
        )
    return Budget("parameters", requested, params - requested)


def _bytes(requested: int, model: nn.Module, block: int) -> Budget:
    size = next(decoder_layers(model).parameters()).element_size()
    before = saved_bytes(model)
    need = -(-(before - requested) // size)  # a started parameter must go
    if not 0 < need < block:
        raise InputError(
            f"--target-bytes {requested} cannot be reached: the weights take {before} bytes, "
            f"{block * size} of them in the blocks; give a number between "
            f"{before - block * size} and {before}"
        )
    return Budget("bytes", requested, need, at_least=True)


def _latency(requested: float, table: CostTable) -> Budget:
    if not requested < table.dense:
        raise InputError(
            f"--target-latency {requested:g}: the model takes only {table.dense:.3g} ms a token "
            "as it is; give less than that"
        )
    return Budget("ms/token", requested, table.dense - requested, at_least=True, table=table)


def parse_bytes(text: str) -> int:
    """``text`` such as 200MB or 1.5GiB in bytes; InputError when it is not a size."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{0,18})?)\s*([a-z]*)\s*", text.lower())
    unit = BYTES.get(match[2] or "b") if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise InputError(
            f"--target-bytes {text!r} is not a size; write bytes, or a number with KB, MB, GB, "
            "KiB, MiB or GiB, for example 200MB"
        )
    return round(float(match[1]) * unit)


def saved_bytes(model: nn.Module, sizes: Sequence[Geometry] | None = None) -> int:
    """Bytes of the weight files of ``model``, or of what is left of it when its layers have
    ``sizes``. Values are not looked at, so the model may lie on the meta device."""
    around = sum(p.numel() * p.element_size() for p in outside(model))
    if sizes is not None:
        dtype = next(decoder_layers(model).parameters()).dtype
        model = skeleton(config_with(model.config, sizes), dtype)
    return around + stored_bytes(written_form(model).state)


def total_parameters(model: nn.Module) -> int:
    """Parameters of ``model``, and of the multimodal one around it, if there is one."""
    return sum(p.numel() for p in (*model.parameters(), *outside(model)))
