"""Which architecture of llama.cpp a model is written as, with which sizes, tensor by tensor.

Layers of one size are written as the family's own architecture, if that takes them. Others need
`deci`, whose loader has three peculiarities:

- a layer without feed-forward is left before its residual addition, so its attention would be lost:
  it gets a feed-forward of zeros
- head sizes are read only if the first layer has an attention: it gets one of zeros
- a layer of which nothing is left has no use: it is dropped
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.exporting.gguf_types import Quant
from fastprune.exporting.padding import padded
from fastprune.models.families import PRUNED_PREFIX, Geometry, decoder_layers, geometries
from fastprune.models.gguf import BIASES, DECI, LAYER_TENSORS, PAIRED, pair_neighbours

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""What llama.cpp calls the families; it computes a Mistral as a Llama."""
SMALLEST = 32
"""Width of a feed-forward of zeros: the smallest that every kind of matrix can have."""


@dataclass(frozen=True)
class Layout:
    """``layers`` maps the numbers of the layers that are written, in order, to the sizes they get.

    ``own`` are the sizes that the layers have without padding and zeros, by the same numbers.
    """

    architecture: str
    layers: dict[int, Geometry]
    own: dict[int, Geometry]

    @property
    def uniform(self) -> bool:
        return self.architecture != DECI

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
    grown = {index: _grown(index, size, quant.block, pad) for index, size in own.items()}
    whole = all(size.query_heads and size.channels for size in grown.values())
    if len(set(grown.values())) == 1 and whole and _is_stock(family, grown, hidden):
        return Layout(ARCHITECTURES[family], grown, own)
    if family == "qwen3":
        raise InputError(
            "layers of a Qwen3 that differ in size cannot be a .gguf file (deci, llama.cpp's "
            "architecture for such layers, has no norms of queries and keys); prune with "
            "--layout uniform and without --structures sublayer, or export as hf"
        )
    return Layout(DECI, _filled(grown, quant.block), own)


def _is_stock(family: str, sizes: dict[int, Geometry], hidden: int) -> bool:
    """Whether the family's own loader takes the heads: Qwen2's are as wide as the model."""
    size = next(iter(sizes.values()))
    return family != "qwen2" or size.query_heads * size.head_dim == hidden


def _grown(index: int, size: Geometry, block: int, pad: bool) -> Geometry:
    """`size` with widths that are multiples of `block`. Raises InputError unless `pad`."""
    groups = _groups(size, size.kv_heads, block)
    channels = -(-size.channels // block) * block
    found = size.keeping({"attention": groups, "mlp": channels})
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


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its shape as torch has it, and its values, made when they are written.

    ``matrix`` says that the type asked for applies; ``end`` that it is the embedding or the head.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    end: bool = False

    @property
    def matrix(self) -> bool:
        return len(self.shape) == 2


def entries(model: nn.Module, found: Layout) -> Iterator[Entry]:
    """The tensors of the file, but for those of the rotary embedding."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    yield whole("token_embd.weight", embedding, end=True)
    layers = decoder_layers(model)
    for number, (index, size) in enumerate(found.layers.items()):
        for name, shape in _shapes(size, model.config.hidden_size):
            yield from _of_layer(layers[index], f"blk.{number}.", name, shape, found)
    yield whole("output_norm.weight", model.model.norm.weight)
    if not model.config.tie_word_embeddings:
        yield whole("output.weight", head, end=True)


def whole(name: str, weight: Tensor, end: bool = False) -> Entry:
    """The entry of a tensor that is written as it is."""
    return Entry(name, tuple(weight.shape), lambda: weight, end)


def _shapes(size: Geometry, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of a layer's weights by the modules they belong to."""
    queries, keys = size.query_heads * size.head_dim, size.kv_heads * size.head_dim
    if size.query_heads:
        yield "input_layernorm", (hidden,)
        yield "self_attn.q_proj", (queries, hidden)
        yield "self_attn.k_proj", (keys, hidden)
        yield "self_attn.v_proj", (keys, hidden)
        yield "self_attn.o_proj", (hidden, queries)
        yield "self_attn.q_norm", (size.head_dim,)
        yield "self_attn.k_norm", (size.head_dim,)
    yield "post_attention_layernorm", (hidden,)
    yield "mlp.gate_proj", (size.channels, hidden)
    yield "mlp.up_proj", (size.channels, hidden)
    yield "mlp.down_proj", (hidden, size.channels)


def _of_layer(
    layer: nn.Module, prefix: str, name: str, shape: tuple[int, ...], found: Layout
) -> Iterator[Entry]:
    """Weight and bias of the module `name`; zeros where the layer has no such sublayer."""
    short = LAYER_TENSORS[name]
    module: Any = layer
    for part in name.split("."):
        module = getattr(module, part, None)
    paired = short in PAIRED[found.architecture]

    def made(tensor: Tensor, wanted: tuple[int, ...]) -> Callable[[], Tensor]:
        def make() -> Tensor:
            turned = pair_neighbours(tensor, found.head_dim) if paired else tensor
            return padded(turned, wanted)

        return make

    weight, bias = (getattr(module, kind, None) for kind in ("weight", "bias"))
    if weight is not None:
        yield Entry(f"{prefix}{short}.weight", shape, made(weight, shape))
    elif len(shape) == 2 or "layernorm" in name:
        fill = torch.zeros if len(shape) == 2 else torch.ones
        yield Entry(f"{prefix}{short}.weight", shape, lambda: fill(shape))
    if bias is not None:
        yield Entry(f"{prefix}{short}.bias", shape[:1], made(bias, shape[:1]))


def check_biases(model: nn.Module, found: Layout) -> None:
    """InputError where layers have biases that the loader of the architecture does not read."""
    if found.architecture != "qwen3":
        return
    for field in BIASES:
        if getattr(model.config, field, False):
            raise InputError(
                "a Qwen3 with biases in its projections cannot be a .gguf file; export as hf"
            )
