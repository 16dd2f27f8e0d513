"""Decode latency: what each sublayer costs at each width, measured by running it here.

One token at a time at batch 1, as `fastprune eval --speed` decodes. A stack of equal decoder layers
runs with all its heads and channels, and with fewer; the differences, per layer, make the table.
Every step of a stack is timed beside a step of the full one and only the ratio of the two is used,
so a machine that changes its speed from minute to minute disturbs little. Stacks are large enough
not to stay in a cache between two steps, as the model's own weights do not.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fastprune.inspect.speed import WARM_UP, Decoding, fitting
from fastprune.models.families import Geometry, decoder_layers, geometries
from fastprune.models.modeling import per_layer_config
from fastprune.models.quiet import quiet_libraries
from fastprune.models.streamed import skeleton
from fastprune.progress import track
from fastprune.pruning.sizes import Removal

COLD_BYTES = 256 * 2**20
"""Weights of a stack, where the model has as many: more than the caches of a CPU hold."""
ROUNDS = 15
"""Steps that the clock counts."""
GROUP_LEVELS, CHANNEL_LEVELS = 8, 8
"""Widths at which a sublayer is measured, none and all of it aside."""


@dataclass(frozen=True)
class CostTable:
    """Milliseconds a token of the whole uncut model (``dense``), and of one sublayer by width.

    ``attention`` and ``mlp`` are (kept units, milliseconds), ascending from (0, 0). ``stack`` is
    what the ratios are taken to: the sizes of its layers, their number, and its milliseconds.
    """

    dense: float
    attention: tuple[tuple[int, float], ...]
    mlp: tuple[tuple[int, float], ...]
    sizes: tuple[Geometry, ...]
    stack: tuple[Geometry, int, float]
    context: int

    def sublayers(self, groups: int, channels: int) -> float:
        """Milliseconds of a layer's sublayers at this width, linear between measured ones."""
        return _at(self.attention, groups) + _at(self.mlp, channels)

    def saved(self, layer: int, removal: Removal) -> float:
        """Milliseconds a token that ``removal`` takes off ``layer``."""
        size = self.sizes[layer]
        groups = 0 if removal.attention else size.kv_heads - removal.groups
        channels = 0 if removal.mlp else size.channels - removal.channels
        return self.sublayers(size.kv_heads, size.channels) - self.sublayers(groups, channels)

    def predicted(self, sizes: Sequence[Geometry]) -> float:
        """Milliseconds a token of the model when its layers have ``sizes``."""
        return self.dense - sum(
            self.sublayers(a.kv_heads, a.channels) - self.sublayers(b.kv_heads, b.channels)
            for a, b in zip(self.sizes, sizes, strict=True)
        )


def measure(model: nn.Module, context: int) -> CostTable:
    """The cost table of ``model`` on the device where it is, behind ``context`` tokens.

    Layers of any sizes share one table: it reaches to the largest of them. The model is left as it
    was; two stacks of `COLD_BYTES`, or of the model's size if that is less, stand beside it.
    """
    sizes = geometries(model)
    full = max(sizes, key=lambda g: g.kv_heads)
    full = replace(full, channels=max(g.channels for g in sizes))
    layers = decoder_layers(model)
    bytes_of_layer = max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
    count = min(len(sizes), math.ceil(COLD_BYTES / max(bytes_of_layer, 1)))
    context = fitting(model, context, WARM_UP + ROUNDS)
    reference = decoder_stack(model, full, count)
    reference_times: list[float] = []

    def milliseconds(module: nn.Module) -> float:
        ratio, times = _beside(module, reference, context)
        reference_times.extend(times)
        return ratio

    groups = {g: _with_groups(full, g) for g in _levels(full.kv_heads, GROUP_LEVELS)}
    channels = {c: replace(full, channels=c) for c in _levels(full.channels, CHANNEL_LEVELS)}
    ratios = {}
    narrower = {size for size in [*groups.values(), *channels.values()] if size != full}
    for size in track(sorted(narrower, key=str), "measuring decode latency"):
        ratios[size] = milliseconds(decoder_stack(model, size, count))
    ratios[full] = 1.0
    dense = milliseconds(model)
    unit = statistics.median(reference_times)
    return CostTable(
        dense=dense * unit,
        attention=_points({g: ratios[size] * unit / count for g, size in groups.items()}),
        mlp=_points({c: ratios[size] * unit / count for c, size in channels.items()}),
        sizes=tuple(sizes),
        stack=(full, count, unit),
        context=context,
    )


def measure_again(model: nn.Module, table: CostTable) -> float:
    """Milliseconds a token of ``model``, a pruned form of the model that ``table`` is of."""
    size, count, unit = table.stack
    ratio, _ = _beside(model, decoder_stack(model, size, count), table.context)
    return ratio * unit


def decoder_stack(model: nn.Module, size: Geometry, count: int) -> nn.Module:
    """A decoder of ``count`` layers of ``size`` like those of ``model``, on its device.

    Every weight is the same small number: speed does not depend on values.
    """
    weight = next(decoder_layers(model).parameters())
    config = copy.deepcopy(model.config)
    config.per_layer_config = None
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    config.vocab_size, config.pad_token_id = 8, None  # embeddings play no part
    config = per_layer_config(config, [size] * count)
    return with_equal_weights(skeleton(config, weight.dtype), weight.device).model


def with_equal_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """``model``, which is on the meta device, on ``device``; every weight the same small number."""
    state = {
        name: torch.full(p.shape, 1e-2, dtype=p.dtype, device=device)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    rotary = model.model.rotary_emb
    with quiet_libraries():
        model.model.rotary_emb = type(rotary)(config=rotary.config).to(device)
    return model


def _beside(module: nn.Module, reference: nn.Module, context: int) -> tuple[float, list[float]]:
    """Median ratio of the step times of the two, and those of the reference in milliseconds."""
    one, other = (Decoding(m, context, steps=ROUNDS) for m in (module, reference))
    pairs = [(one.step(), other.step()) for _ in range(ROUNDS)]
    return statistics.median(a / b for a, b in pairs), [b for _, b in pairs]


def _with_groups(size: Geometry, groups: int) -> Geometry:
    return replace(size, kv_heads=groups, query_heads=groups * size.queries_per_kv)


def _levels(units: int, between: int) -> list[int]:
    """Numbers of units at equal distances from none to all."""
    return sorted({round(units * step / (between + 1)) for step in range(between + 2)})


def _points(times: dict[int, float]) -> tuple[tuple[int, float], ...]:
    """(units, milliseconds above none), never falling with the number of units."""
    found, most = [], 0.0
    for units, value in sorted(times.items()):
        most = max(most, value - times[0])
        found.append((units, most))
    return tuple(found)


def _at(points: Sequence[tuple[int, float]], units: int) -> float:
    return float(np.interp(units, [n for n, _ in points], [ms for _, ms in points]))
