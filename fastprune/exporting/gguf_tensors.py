"""The tensors of a `.gguf` file: what they are called, their shapes, and their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.exporting.gguf_layout import Layout
from fastprune.exporting.padding import padded
from fastprune.models.experts import OUTPUT as EXPERT_OUTPUT
from fastprune.models.experts import apart
from fastprune.models.families import (
    DOWN,
    GATE,
    KEY,
    OUTPUT,
    QUERY,
    UP,
    VALUE,
    Geometry,
    declaration,
    decoder_layers,
    sublayers,
)
from fastprune.models.gguf import LESS_ONE, PAIRED, ROUTERS, ROW, model_names, pair_neighbours
from fastprune.models.units import Slice


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its shape as torch has it, and its values, made when they are written.

    ``end`` says that it is the embedding or the head.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    end: bool = False

    @property
    def short(self) -> str:
        """What it is called in its layer, with "weight" or "bias" behind."""
        return ".".join(self.name.split(".")[-2:])

    @property
    def matrix(self) -> bool:
        """Whether the type asked for applies; vectors, and what routes tokens, are f32."""
        return len(self.shape) > 1 and self.short not in ROUTERS


def entries(model: nn.Module, found: Layout) -> list[Entry]:
    """The tensors of the file, but for those of the rotary embedding.

    Raises InputError for a weight that the architecture has no place for.
    """
    own, architecture = list(named_entries(model, found)), found.architecture
    names = model_names(architecture.name, len(found.layers), [entry.name for entry in own])
    short = {name: in_file for in_file, name in names.items()}
    result = []
    for entry in own:
        named = replace(entry, name=short.get(entry.name, ""))
        if not named.name or (
            named.name.endswith(".bias") and named.short not in architecture.biases
        ):
            raise InputError(
                f"llama.cpp's architecture {architecture.name} has no place for {entry.name}; "
                "export as hf"
            )
        result.append(_as_read(named, found))
    return result


def whole(name: str, weight: Tensor, end: bool = False) -> Entry:
    """The entry of a tensor that is written as it is."""
    return Entry(name, tuple(weight.shape), lambda: weight, end)


def _as_read(entry: Entry, found: Layout) -> Entry:
    """`entry` with its values in the order and the shape in which llama.cpp reads them."""
    architecture, make = found.architecture.name, entry.make
    if entry.short.partition(".")[0] in PAIRED.get(architecture, ()):
        return replace(entry, make=lambda: pair_neighbours(make(), found.head_dim))
    if architecture in LESS_ONE and entry.short.endswith("norm.weight"):
        return replace(entry, make=lambda: make().float() + 1)
    if entry.short in ROW:
        return replace(entry, shape=entry.shape[1:], make=lambda: make()[0])
    return entry


def named_entries(model: nn.Module, found: Layout) -> Iterator[Entry]:
    """The tensors by transformers' names, with the layers numbered as in the file."""
    family, layers = declaration(model), decoder_layers(model)
    yield whole(f"{family.embeddings}.weight", model.get_input_embeddings().weight, end=True)
    for number, (index, size) in enumerate(found.layers.items()):
        zeros = _zeros(found.own[index], size, model.config.hidden_size)
        for entry in (*_of_layer(layers[index], size), *zeros):
            yield replace(entry, name=f"{family.layers}.{number}.{entry.name}")
    for name, parameter in model.get_submodule(family.norm).named_parameters():
        yield whole(f"{family.norm}.{name}", parameter)
    if found.architecture.head == "own" or not model.config.tie_word_embeddings:
        yield whole(f"{family.head}.weight", model.get_output_embeddings().weight, end=True)


def _of_layer(layer: nn.Module, size: Geometry) -> Iterator[Entry]:
    """The weights of `layer`, filled up with zeros to `size`, by their names in it."""
    owned = {
        name: (slices, size.units[sublayer.kind])
        for sublayer in sublayers(layer)
        for name, slices in sublayer.owned.items()
    }
    for name, parameter in layer.named_parameters():
        slices, units = owned.get(name, ((), 0))
        if parts := apart(name, parameter):
            for part, tensor in parts.items():
                shape = list(tensor.shape)
                shape[-1 if EXPERT_OUTPUT in part else -2] = size.channels
                yield _padded(part, tensor, shape)
        elif len(slices) == 1:
            shape = list(parameter.shape)
            shape[slices[0].dim] = units * slices[0].width
            yield _padded(name, parameter, shape)
        elif slices:
            rows = units * sum(s.width for s in slices)
            yield Entry(name, (rows, *parameter.shape[1:]), _fused(parameter, slices, units))
        else:
            yield whole(name, parameter)


def _padded(name: str, tensor: Tensor, shape: Sequence[int]) -> Entry:
    return Entry(name, tuple(shape), lambda: padded(tensor, shape))


def _fused(tensor: Tensor, slices: Sequence[Slice], units: int) -> Callable[[], Tensor]:
    """Makes the rows of `slices`, one behind the other, each with zeros up to so many `units`."""

    def make() -> Tensor:
        parts = [tensor[s.span] for s in slices]
        shapes = [(units * s.width, *tensor.shape[1:]) for s in slices]
        return torch.cat([padded(part, shape) for part, shape in zip(parts, shapes)])

    return make


def _zeros(own: Geometry, size: Geometry, hidden: int) -> Iterator[Entry]:
    """What a Llama's layer of `size` has in place of the sublayers that `own` lacks."""
    shapes: dict[str, tuple[int, ...]] = {}
    if size.query_heads and not own.query_heads:
        queries, keys = size.query_heads * size.head_dim, size.kv_heads * size.head_dim
        shapes |= {"input_layernorm": (hidden,), QUERY: (queries, hidden), KEY: (keys, hidden)}
        shapes |= {VALUE: (keys, hidden), OUTPUT: (hidden, queries)}
    if size.channels and not own.channels:
        shapes |= {"post_attention_layernorm": (hidden,), GATE: (size.channels, hidden)}
        shapes |= {UP: (size.channels, hidden), DOWN: (hidden, size.channels)}
    for name, shape in shapes.items():
        fill = torch.ones if "norm" in name else torch.zeros
        yield Entry(f"{name}.weight", shape, lambda fill=fill, shape=shape: fill(shape))
