"""What a KV group and a channel are in each model family.

A family is a table: which parameters of a decoder layer belong to the attention
and which to the MLP, along which dimension a unit lies in them, and how many
rows or columns one unit takes. Everything that scores, cuts, or compensates
reads this table; nothing else in the package knows a parameter's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastprune.errors import InputError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""``config.model_type`` of the families that can be pruned."""

PRUNED_PREFIX = "fastprune_"
"""Per-layer checkpoints carry ``fastprune_<family>`` as their ``model_type``."""


QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{n}_proj" for n in "qkvo")
GATE, UP, DOWN = (f"mlp.{n}_proj" for n in ("gate", "up", "down"))
"""The projections of a decoder layer by name, for weights that lie in a file without a model."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one decoder layer; a removed sublayer has zero units."""

    query_heads: int
    kv_heads: int
    channels: int
    head_dim: int

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head (0 when the attention is removed)."""
        return self.query_heads // self.kv_heads if self.kv_heads else 0


@dataclass(frozen=True)
class Slice:
    """How the units of a sublayer lie in one parameter.

    ``dim`` is the dimension that units index; unit ``u`` owns the entries
    ``u * width`` to ``(u + 1) * width`` of it.
    """

    module: str
    parameter: str
    dim: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"


def family_of(model: nn.Module) -> str:
    """The family name of ``model``; InputError when it is not supported."""
    return family_of_config(model.config)


def family_of_config(config: Any) -> str:
    """The family name of the model that ``config`` describes; InputError when not supported."""
    model_type = getattr(config, "model_type", "")
    family = model_type.removeprefix(PRUNED_PREFIX)
    if family not in SUPPORTED:
        raise InputError(
            f"model type '{model_type}' is not supported; "
            f"fastprune prunes {', '.join(SUPPORTED)} models"
        )
    return family


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order."""
    return model.model.layers


def geometry(layer: nn.Module) -> Geometry:
    """Read the sizes of ``layer`` off its weights, so that they are never stale."""
    attention, mlp = layer.self_attn, layer.mlp
    head_dim = getattr(attention, "head_dim", 0)
    has_attention, has_mlp = hasattr(attention, "q_proj"), hasattr(mlp, "down_proj")
    return Geometry(
        query_heads=attention.q_proj.out_features // head_dim if has_attention else 0,
        kv_heads=attention.k_proj.out_features // head_dim if has_attention else 0,
        channels=mlp.down_proj.in_features if has_mlp else 0,
        head_dim=head_dim,
    )


def geometries(model: nn.Module) -> list[Geometry]:
    """The sizes of every decoder layer of ``model``."""
    family_of(model)
    return [geometry(layer) for layer in decoder_layers(model)]


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of one decoder layer: its units, and where they lie in its parameters.

    ``inputs`` are the slices whose rows make the units, ``output`` the columns through which they
    reach the hidden states; ``norms`` are the modules that nothing reads without the sublayer.
    """

    kind: str
    module: str
    norms: tuple[str, ...]
    inputs: tuple[Slice, ...]
    output: Slice
    units: int

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every slice, the output last."""
        return (*self.inputs, self.output)

    def linear(self, layer: nn.Module) -> nn.Linear:
        """The linear module of ``layer`` whose columns ``output`` describes."""
        return layer.get_submodule(self.output.module)


KINDS = ("attention", "mlp")
"""Kinds of sublayers, in the order in which a layer runs them."""


def sublayers(layer: nn.Module) -> list[Sublayer]:
    """The sublayers that ``layer`` has, in the order in which it runs them.

    Query head h is served by KV head ``h // queries_per_kv``, so the query rows of one KV group
    are contiguous. Per-head norms (Qwen3) are shared by all heads and stay whole.
    """
    g = geometry(layer)
    found = []
    if g.kv_heads:
        query = g.queries_per_kv * g.head_dim
        rows = {"q_proj": query, "k_proj": g.head_dim, "v_proj": g.head_dim}
        inputs = _rows(layer, "self_attn", rows)
        output = Slice("self_attn.o_proj", "weight", 1, query)
        norms = ("input_layernorm",)
        found.append(Sublayer("attention", "self_attn", norms, inputs, output, g.kv_heads))
    if g.channels:
        inputs = _rows(layer, "mlp", {"gate_proj": 1, "up_proj": 1})
        output = Slice("mlp.down_proj", "weight", 1, 1)
        norms = ("post_attention_layernorm",)
        found.append(Sublayer("mlp", "mlp", norms, inputs, output, g.channels))
    return found


def _rows(layer: nn.Module, parent: str, widths: Mapping[str, int]) -> tuple[Slice, ...]:
    """Slices of the weights, and biases, of linear modules in ``parent`` by rows a unit."""
    return tuple(
        Slice(f"{parent}.{name}", parameter, 0, width)
        for name, width in widths.items()
        for parameter in ("weight", "bias")
        if getattr(layer.get_submodule(f"{parent}.{name}"), parameter) is not None
    )


def attention_slices(layer: nn.Module) -> list[Slice]:
    """The parameters that a KV group owns a part of: q, k, v rows and o columns."""
    return [
        s for sublayer in sublayers(layer) if sublayer.kind == "attention" for s in sublayer.slices
    ]


def mlp_slices(layer: nn.Module) -> list[Slice]:
    """The parameters that a channel owns a part of: gate, up rows and down column."""
    return [s for sublayer in sublayers(layer) if sublayer.kind == "mlp" for s in sublayer.slices]


def block_parameters(model: nn.Module) -> int:
    """Number of parameters inside the decoder layers."""
    return sum(p.numel() for p in decoder_layers(model).parameters())


def unit_cost(layer: nn.Module, slices: Sequence[Slice]) -> int:
    """Parameters that one unit described by ``slices`` owns in ``layer``."""
    total = 0
    for s in slices:
        parameter = layer.get_parameter(s.name)
        total += s.width * parameter.numel() // parameter.shape[s.dim]
    return total


def sublayer_costs(layer: nn.Module) -> tuple[int, int]:
    """Parameters that leave ``layer`` with its whole attention and with its whole MLP.

    They include the norm before the sublayer, which nothing reads without it. A sublayer that is
    gone already costs 0.
    """
    g = geometry(layer)
    attention, mlp = (
        sum(p.numel() for module in modules for p in module.parameters())
        for modules in (
            (layer.self_attn, layer.input_layernorm),
            (layer.mlp, layer.post_attention_layernorm),
        )
    )
    return attention if g.kv_heads else 0, mlp if g.channels else 0
