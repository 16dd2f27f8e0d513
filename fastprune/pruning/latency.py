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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastprune.inspect.speed import WARM_UP, Decoding, fitting
from fastprune.models.families import KINDS, Geometry, decoder_layers, geometries
from fastprune.models.modeling import per_layer_config
from fastprune.models.quiet import quiet_libraries
from fastprune.models.skeleton import skeleton
from fastprune.progress import track
from fastprune.pruning.sizes import Removal

COLD_BYTES = 256 * 2**20
"""Weights of a stack, where the model has as many: more than the caches of a CPU hold."""
ROUNDS = 15
"""Steps that the clock counts."""
LEVELS = 8
"""Widths at which a sublayer is measured, none and all of it aside."""


@dataclass(frozen=True)
class CostTable:
    """Milliseconds a token of the uncut model (``dense``), and of one sublayer by width.

    ``widths`` are, by kind of sublayer, (kept units, milliseconds), ascending from (0, 0).
    ``stack`` is what the ratios are taken to: the sizes of its layers, their number, and its
    milliseconds.
    """

    dense: float
    widths: Mapping[str, tuple[tuple[int, float], ...]]
    sizes: tuple[Geometry, ...]
    stack: tuple[Geometry, int, float]
    context: int

    def milliseconds(self, units: Mapping[str, int]) -> float:
        """Milliseconds of a layer's sublayers of so many ``units`` each, by kind; linear between
        measured widths."""
        return sum(_at(points, units[kind]) for kind, points in self.widths.items())

    def saved(self, layer: int, removal: Removal) -> float:
        """Milliseconds a token that ``removal`` takes off ``layer``."""
        units = self.sizes[layer].units
        kept = {k: 0 if k in removal.gone else n - removal.count(k) for k, n in units.items()}
        return self.milliseconds(units) - self.milliseconds(kept)

    def predicted(self, sizes: Sequence[Geometry]) -> float:
        """Milliseconds a token of the model when its layers have ``sizes``."""
        return self.dense - sum(
            self.milliseconds(a.units) - self.milliseconds(b.units)
            for a, b in zip(self.sizes, sizes, strict=True)
        )


def measure(model: nn.Module, context: int) -> CostTable:
    """The cost table of ``model`` on the device where it is, behind ``context`` tokens.

    Layers of any sizes share one table: it reaches to the largest of them. The model is left as it
    was; two stacks of `COLD_BYTES`, or of the model's size if that is less, stand beside it.
    """
    sizes = geometries(model)
    full = max(sizes, key=lambda g: g.kv_heads)  # one that has an attention, for its ratio of heads
    full = full.keeping({kind: max(g.units[kind] for g in sizes) for kind in KINDS})
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

    levels = {
        kind: {n: full.keeping({kind: n}) for n in _levels(full.units[kind], LEVELS)}
        for kind in KINDS
    }
    ratios = {}
    narrower = {size for own in levels.values() for size in own.values()} - {full}
    for size in track(sorted(narrower, key=str), "measuring decode latency"):
        ratios[size] = milliseconds(decoder_stack(model, size, count))
    ratios[full] = 1.0
    dense = milliseconds(model)
    unit = statistics.median(reference_times)
    return CostTable(
        dense=dense * unit,
        widths={
            kind: _points({n: ratios[size] * unit / count for n, size in own.items()})
            for kind, own in levels.items()
        },
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
