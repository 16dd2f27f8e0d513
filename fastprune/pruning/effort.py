"""What `--effort` chooses where nothing is said: the best that is known for the time it takes.

Measured on SmolLM2-135M (research/LOG.md). Channels cost less than KV groups as long as the middle
layers have enough of them. Equal shares of the middle layers are found at once; a search over all
layers leaves more; more calibration text makes the refit better on other text than its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from fastprune.models.decilm import WIDTH_MULTIPLE
from fastprune.models.families import FINEST, block_parameters, decoder_layers, geometries
from fastprune.pruning.budget import layer_size
from fastprune.pruning.config import ALL, PruneConfig
from fastprune.pruning.mixtures import has_experts, smallest_align

ENDS = 1 / 10
"""Share of the layers at either end that equal shares leave untouched."""
CHANNELS_ALONE = 0.4
"""Share of the block parameters up to which channels alone are removed."""
ROOM = 0.8
"""Share of all channels beyond which they are too few to choose among."""
UNBOUNDED = 0.9
"""Largest share of a layer that may go where nothing closer is known to be better."""
BOUNDED_FROM, BOUND = 0.25, 0.6
"""From this share of channels on, a search that may take more than the bound from a layer is led
astray."""
BOTH_ALPHA = 0.3
"""How much of the difference between layers counts when both structures are ranked together."""
ALIGN, WIDE = 32, 512
"""Channels are kept in multiples of ALIGN, which matrix kernels and quantised formats want, where
the model has at least WIDE of them."""
WINDOWS = {"fast": 128, "balanced": 512, "thorough": 512}
ROUNDS = {"fast": 0, "balanced": 0, "thorough": 1}
Allocation = Literal["uniform", "global", "search"]


def decided(config: PruneConfig, model: nn.Module, share: float) -> PruneConfig:
    """``config`` with everything chosen that was left open.

    ``share`` is the part of the block parameters that the budget takes. What was given stays.
    """
    layers = config.selected_layers(len(decoder_layers(model)))
    structures = config.structures or _structures(config, model, share, layers)
    channels_alone = tuple(structures) == ("mlp",)
    allocation: Any = config.allocation
    if allocation == "auto":
        allocation = "uniform" if has_experts(model) else _allocation(config, structures)
    chosen: dict[str, Any] = {
        "structures": structures,
        "allocation": allocation,
        "exchange_rounds": ROUNDS[config.effort],
        "alpha": BOTH_ALPHA if config.allocation == "auto" and allocation == "global" else 1.0,
        "max_layer_ratio": UNBOUNDED,
        "layers": ALL,
        "align": WIDTH_MULTIPLE if config.layout == "deci" else _align(model),
        "calib_samples": WINDOWS[config.effort],
    }
    if allocation == "search" and channels_alone and share >= BOUNDED_FROM:
        chosen["max_layer_ratio"] = max(BOUND, _needed(model, share, layers))
    if config.allocation == "auto" and allocation == "uniform" and channels_alone:
        chosen["layers"] = _middle(config, model, share)
    open_fields = {
        name: value for name, value in chosen.items() if getattr(config, name) in (None, (), "auto")
    }
    return replace(config, **open_fields)


def _structures(
    config: PruneConfig, model: nn.Module, share: float, layers: range
) -> tuple[str, ...]:
    """Channels alone as far as they go, with room to choose; then KV groups too, or sublayers.

    Of a mixture experts alone as far as they go, then everything.
    """
    if has_experts(model):
        blocks = decoder_layers(model)
        experts = [layer_size(blocks[i], ("experts",)).sublayers["experts"] for i in layers]
        able = sum((part.units - part.least) * part.cost for part in experts if part.units)
        enough = share * block_parameters(model) <= able
        return ("experts",) if enough else ("attention", "experts", "mlp")
    if share <= CHANNELS_ALONE and _needed(model, share, layers) <= ROOM:
        return ("mlp",)
    return ("mlp", "sublayer") if config.layout == "deci" else ("attention", "mlp")


def _allocation(config: PruneConfig, structures: tuple[str, ...]) -> Allocation:
    if config.layout == "uniform" or "sublayer" in structures:
        return "uniform"
    judged = config.calib_samples is None or config.calib_samples > 1  # by windows of their own
    if config.effort != "fast" and judged and not config.stream:
        return "search"
    return "uniform" if tuple(structures) == ("mlp",) else "global"


def _middle(config: PruneConfig, model: nn.Module, share: float) -> str:
    """All layers but a tenth at either end, where those have enough channels and may differ."""
    count = len(decoder_layers(model))
    ends = round(ENDS * count)
    limit = config.max_layer_ratio or UNBOUNDED
    middle = range(ends, count - ends)
    if config.layout == "uniform" or not ends or _needed(model, share, middle) > limit:
        return ALL
    multiple = config.align or WIDTH_MULTIPLE
    if config.layout == "deci" and any(size.channels % multiple for size in geometries(model)):
        return ALL  # the ends must be aligned too
    return f"{ends}:{count - ends}"


def _needed(model: nn.Module, share: float, layers: Iterable[int]) -> float:
    """The share of the channels of ``layers`` that is ``share`` of all block parameters."""
    blocks = decoder_layers(model)
    channels = sum(layer_size(blocks[i], (FINEST,)).prunable for i in layers)
    return share * block_parameters(model) / channels if channels else math.inf


def _align(model: nn.Module) -> int:
    """ALIGN where every layer that has channels has many, in multiples of it; else the least."""
    widths = {size.channels for size in geometries(model) if size.channels}
    wide = widths and all(w >= WIDE and w % ALIGN == 0 for w in widths)
    return ALIGN if wide else smallest_align(model)
