"""Which architecture of llama.cpp a model is written as, and with which sizes.

Layers of one size are written as the family's own architecture, if that takes them. Others need
`deci`, which computes Llamas, and whose loader has three peculiarities:

- a layer without feed-forward is left before its residual addition, so its attention would be lost:
  it gets a feed-forward of zeros
- head sizes are read only if the first layer has an attention: it gets one of zeros
- a layer of which nothing is left has no use: it is dropped
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fastprune.errors import InputError
from fastprune.exporting.gguf_architectures import (
    ARCHITECTURES,
    PER_LAYER,
    PER_LAYER_FAMILIES,
    Architecture,
    check_config,
    check_heads,
    check_mixture,
)
from fastprune.exporting.gguf_types import Quant
from fastprune.models.families import FAMILIES, PRUNED_PREFIX, Geometry, geometries

SMALLEST = 32
"""Width of a feed-forward of zeros: the smallest that every kind of matrix can have."""


@dataclass(frozen=True)
class Layout:
    """``layers`` maps the numbers of the layers that are written, in order, to the sizes they get.

    ``own`` are the sizes that the layers have without padding and zeros, by the same numbers.
    """

    architecture: Architecture
    layers: dict[int, Geometry]
    own: dict[int, Geometry]

    @property
    def uniform(self) -> bool:
        return self.architecture is not PER_LAYER

    @property
    def head_dim(self) -> int:
        return next(iter(self.layers.values())).head_dim

    def notes(self) -> list[str]:
        """Sentences on what the file holds besides the model's own weights."""
        changed = [own for index, own in self.own.items() if own != self.layers[index]]
        filled = sum(not (own.query_heads and own.channels) for own in changed)
        found = []
        if padded := len(changed) - filled:
            found.append(f"{padded} layers are padded with zeros to the widths the type needs")
        if filled:
            found.append(f"{filled} layers hold zeros in place of a removed sublayer")
        return found


def layout(model: nn.Module, quant: Quant, pad: bool) -> Layout:
    """How `model` is written. Raises InputError where that cannot be."""
    family = model.config.model_type.removeprefix(PRUNED_PREFIX)
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"a {family} cannot be exported as gguf, only {known}; choose --format hf")
    hidden = model.config.hidden_size
    if hidden % quant.block:
        raise InputError(
            f"--quant {quant.name} needs widths in multiples of {quant.block}, and the model's "
            f"hidden size is {hidden}; choose another type, such as f16"
        )
    sizes = geometries(model)
    head_dim = next((size.head_dim for size in sizes if size.head_dim), 0)
    own = {
        index: replace(size, head_dim=head_dim)
        for index, size in enumerate(sizes)
        if size.query_heads or size.channels
    }
    if not any(size.query_heads for size in own.values()):
        raise InputError("the model has no attention left, which llama.cpp cannot run; prune less")
    check_mixture(ARCHITECTURES[family], FAMILIES[family], own.values())
    grown = {index: _grown(index, size, quant.block, pad) for index, size in own.items()}
    found = Layout(ARCHITECTURES[family], grown, own)
    if len(set(grown.values())) > 1 or not all(s.query_heads and s.channels for s in own.values()):
        if family not in PER_LAYER_FAMILIES:
            raise InputError(
                f"layers of a {family} that differ in size cannot be a .gguf file (deci, "
                "llama.cpp's architecture for such layers, computes a Llama); prune with --layout "
                "uniform and without --structures sublayer, or export as hf"
            )
        found = Layout(PER_LAYER, _filled(grown, quant.block), own)
    elif family in PER_LAYER_FAMILIES and not _is_stock(found, hidden):
        found = Layout(PER_LAYER, grown, own)
    check_config(model.config, found.architecture, found.layers)
    check_heads(model.config, found.architecture, next(iter(own.values())))
    return found


def _is_stock(found: Layout, hidden: int) -> bool:
    """Whether the family's own loader takes the heads: Qwen2's are as wide as the model."""
    size = next(iter(found.layers.values()))
    return not found.architecture.full_queries or size.query_heads * size.head_dim == hidden


def _grown(index: int, size: Geometry, block: int, pad: bool) -> Geometry:
    """`size` with widths that are multiples of `block`. Raises InputError unless `pad`."""
    groups = _groups(size, size.kv_heads, block)
    channels = -(-size.channels // block) * block
    units = {"attention": groups} if size.experts else {"attention": groups, "mlp": channels}
    found = size.keeping(units, channels)
    if found == size or pad:
        return found
    what, advice = (
        (f"{size.channels} channels", f"prune with --align {block}")
        if channels != size.channels
        else (f"heads of {size.query_heads} × {size.head_dim} values", "choose --quant f16")
    )
    raise InputError(
        f"layer {index} has {what}, and this --quant needs multiples of {block}; {advice}, or pass "
        "--pad to fill up with zeros"
    )


def _filled(sizes: dict[int, Geometry], block: int) -> dict[int, Geometry]:
    """`sizes` with the zeros that the loader of `deci` needs."""
    usual = next(size for size in sizes.values() if size.query_heads)
    groups = _groups(usual, 1, block)
    found: dict[int, Geometry] = {}
    for index, size in sizes.items():
        if not found and not size.query_heads:
            size = usual.keeping({"attention": groups, "mlp": size.channels})
        if not size.channels:
            size = replace(size, channels=max(SMALLEST, block))
        found[index] = size
    return found


def _groups(size: Geometry, least: int, block: int) -> int:
    """The smallest number of KV groups, not below `least`, that makes whole blocks of values."""
    while least * size.queries_per_kv * size.head_dim % block:
        least += 1
    return least
