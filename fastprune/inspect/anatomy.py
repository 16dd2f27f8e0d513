"""Layers of a checkpoint by the names and shapes of its weights, no model built.

Query and KV heads and their ratio, MLP channels, heads and channels that can add nothing, and what
does not fit together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from fastprune.inspect.health import TensorHealth
from fastprune.messages import Message
from fastprune.models.families import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE

LAYER = re.compile(r"((?:.*?\.)?(?:layers?|h|blocks?)\.\d+)\.(.+)")
"""A weight of a layer: the layer's name and the weight's own, of any transformer."""
FUSED_QKV, FUSED_GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
"""Projections that some families have in one, by the names of Phi-3."""
READ_BY_LINES = tuple(f"{name}." for name in (VALUE, OUTPUT, GATE, UP, DOWN))
"""Projections whose zero rows or columns make a head or channel dead."""


@dataclass(frozen=True)
class LayerHealth:
    """One layer: what its tensors hold together, and its sizes where the names tell them.

    ``ratio`` is query heads per KV head. Dead heads and channels add nothing to the output,
    whatever goes in. ``problem`` says what does not fit together.
    """

    name: str
    params: int
    nan: int
    inf: int
    zeros: int
    outliers: int
    absmax: float
    query_heads: int | None = None
    kv_heads: int | None = None
    ratio: int | None = None
    channels: int | None = None
    dead_heads: tuple[int, ...] = ()
    dead_channels: int = 0
    problem: Message | None = None

    @property
    def finite(self) -> bool:
        return not (self.nan or self.inf)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready data."""
        return {**asdict(self), "dead_heads": list(self.dead_heads)}


@dataclass(frozen=True)
class Heads:
    """What a config says of attention: the size of a head, and query heads per KV head."""

    size: int | None
    ratio: int | None

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Heads:
        """As the global settings of a config say, of a multimodal one those of its decoder; None
        for what they do not."""
        inner = settings.get("text_config")
        settings = inner if isinstance(inner, Mapping) and inner else settings
        queries, kv, size, hidden = (
            value if isinstance(value := settings.get(name), int) and value > 0 else None
            for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
        )
        if not size and hidden and queries:
            size = hidden // queries
        return Heads(size or None, queries // (kv or queries) if queries else None)


def wants_lines(name: str) -> bool:
    """Whether zero rows and columns of the weight ``name`` matter to ``layer_health``."""
    match = LAYER.fullmatch(name)
    return match is not None and match[2].startswith(READ_BY_LINES)


def layer_health(tensors: Sequence[TensorHealth], heads: Heads) -> list[LayerHealth]:
    """The layers of a model in the order of their numbers, from the health of its tensors."""
    layers: dict[str, dict[str, TensorHealth]] = {}
    for tensor in tensors:
        if match := LAYER.fullmatch(tensor.name):
            layers.setdefault(match[1], {})[match[2]] = tensor
    found = [_layer(name, layers[name], heads) for name in sorted(layers, key=_by_number)]
    stacks = {_by_number(layer.name)[0] for layer in found if layer.query_heads}
    if stacks:  # others are towers beside the decoder, whose modules have other names
        found = [_named_in(layer, stacks) for layer in found]
    # Nothing under these names in any layer is another architecture, in some a removed sublayer.
    if not any(layer.query_heads for layer in found):
        found = [replace(layer, query_heads=None, kv_heads=None) for layer in found]
    if not any(layer.channels for layer in found):
        found = [replace(layer, channels=None) for layer in found]
    return found


def _by_number(name: str) -> tuple[str, int]:
    stack, _, number = name.rpartition(".")
    return stack, int(number)


def _named_in(layer: LayerHealth, stacks: set[str]) -> LayerHealth:
    """``layer``, without sizes and problems when it belongs to none of ``stacks``."""
    if _by_number(layer.name)[0] in stacks:
        return layer
    return replace(layer, query_heads=None, kv_heads=None, channels=None, problem=None)


def _layer(name: str, tensors: Mapping[str, TensorHealth], heads: Heads) -> LayerHealth:
    scans = [t.scan for t in tensors.values() if t.scan is not None]
    largest = [s.absmax for s in scans if s.absmax == s.absmax]  # NaN where nothing is finite
    totals: dict[str, Any] = {
        kind: sum(getattr(scan, kind) for scan in scans)
        for kind in ("nan", "inf", "zeros", "outliers")
    }
    attention, complaint = _attention(tensors, heads)
    mlp, other = _mlp(tensors)
    return LayerHealth(
        name=name,
        params=sum(t.numel for t in tensors.values()),
        absmax=max(largest, default=0.0),
        problem=_both(complaint, other),
        **totals,
        **attention,
        **mlp,
    )


def _attention(
    tensors: Mapping[str, TensorHealth], heads: Heads
) -> tuple[dict[str, Any], Message | None]:
    names = (QUERY, KEY, VALUE, OUTPUT)
    shapes = _shapes(tensors, names)
    if not shapes:
        return {"query_heads": 0, "kv_heads": 0}, None
    if fused := _shapes(tensors, [FUSED_QKV]):
        return _fused_attention(fused[FUSED_QKV][0], shapes[OUTPUT][1], heads)
    if missing := [name for name in names if name not in shapes]:
        return {}, _missing(missing)
    q, k, v, o = shapes[QUERY][0], shapes[KEY][0], shapes[VALUE][0], shapes[OUTPUT][1]
    if k != v or q != o:
        return {}, Message(
            "q, k, v have {q}, {k}, {v} rows and o {o} columns, which do not fit together",
            q=q, k=k, v=v, o=o,
        )  # fmt: skip
    if heads.size is None:
        return {}, None
    if q % heads.size or k % heads.size:
        return {}, Message(
            "{q} query and {k} key rows are not whole heads of {size}", q=q, k=k, size=heads.size
        )
    query, kv = q // heads.size, k // heads.size
    sizes = {"query_heads": query, "kv_heads": kv}
    if not kv or query % kv:
        return sizes, Message(
            "{query} query heads cannot share {kv} KV heads evenly", query=query, kv=kv
        )
    sizes["ratio"] = query // kv
    dead = {"dead_heads": _dead_heads(tensors, query // kv, heads.size)}
    if heads.ratio is not None and query // kv != heads.ratio:
        return sizes | dead, _another_ratio(query // kv, heads.ratio)
    return sizes | dead, None


def _fused_attention(
    rows: int, columns: int, heads: Heads
) -> tuple[dict[str, Any], Message | None]:
    """Sizes where queries, keys and values are one projection of so many ``rows``."""
    if heads.size is None:
        return {}, None
    query, kv = columns // heads.size, (rows - columns) // 2 // heads.size
    if not kv or query % kv or (query + 2 * kv) * heads.size != rows:
        return {}, Message(
            "{rows} rows of q, k, v and {columns} columns of o do not fit together",
            rows=rows,
            columns=columns,
        )
    sizes = {"query_heads": query, "kv_heads": kv, "ratio": query // kv}
    if heads.ratio is not None and query // kv != heads.ratio:
        return sizes, _another_ratio(query // kv, heads.ratio)
    return sizes, None


def _dead_heads(tensors: Mapping[str, TensorHealth], ratio: int, size: int) -> tuple[int, ...]:
    """Query heads whose values or whose columns of the output projection are zero throughout."""
    values, columns = _zero_rows(tensors, VALUE), tensors[f"{OUTPUT}.weight"].zero_columns
    if values is None or columns is None:
        return ()
    silent = values.view(-1, size).all(1).repeat_interleave(ratio)
    unread = columns.view(-1, size).all(1)
    return tuple((silent | unread).nonzero().flatten().tolist())


def _mlp(tensors: Mapping[str, TensorHealth]) -> tuple[dict[str, Any], Message | None]:
    names = (GATE, UP, DOWN)
    shapes = _shapes(tensors, names)
    if not shapes:
        return {"channels": 0}, None
    if fused := _shapes(tensors, [FUSED_GATE_UP]):
        rows, down = fused[FUSED_GATE_UP][0], shapes[DOWN][1]
        fits = rows == 2 * down
        complaint = Message(
            "gate and up have {rows} rows, down {down} columns, which do not fit together",
            rows=rows,
            down=down,
        )
        return ({"channels": down}, None) if fits else ({}, complaint)
    if missing := [name for name in names if name not in shapes]:
        return {}, _missing(missing)
    gate, up, down = shapes[GATE][0], shapes[UP][0], shapes[DOWN][1]
    if not gate == up == down:
        return {}, Message(
            "gate, up, down have {gate}, {up}, {down} channels, which do not fit together",
            gate=gate,
            up=up,
            down=down,
        )
    ways = (_zero_rows(tensors, GATE), _zero_rows(tensors, UP))
    dead = tensors[f"{DOWN}.weight"].zero_columns
    for zero in ways:
        dead = zero if dead is None else dead if zero is None else dead | zero
    return {"channels": gate, "dead_channels": 0 if dead is None else int(dead.sum())}, None


def _missing(names: Sequence[str]) -> Message:
    return Message("{names} missing", names=" and ".join(names))


def _another_ratio(here: int, ratio: int) -> Message:
    return Message("{here} query heads to a KV head; the model has {ratio}", here=here, ratio=ratio)


def _both(one: Message | None, other: Message | None) -> Message | None:
    if one is None or other is None:
        return one or other
    return Message("{one}; {other}", one=one, other=other)


def _shapes(
    tensors: Mapping[str, TensorHealth], names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Shapes of those projections that are there as plain matrices."""
    found = {name: tensors.get(f"{name}.weight") for name in names}
    return {name: t.shape for name, t in found.items() if t is not None and len(t.shape) == 2}


def _zero_rows(tensors: Mapping[str, TensorHealth], name: str) -> Tensor | None:
    """Rows of a projection that are zero together with their bias; None where not known."""
    rows = tensors[f"{name}.weight"].zero_rows
    bias = tensors.get(f"{name}.bias")
    if rows is None or bias is None:
        return rows
    return None if bias.zero_rows is None else rows & bias.zero_rows
