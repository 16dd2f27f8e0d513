"""`hf-uniform`: a per-layer model as a stock architecture, its layers padded to one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastprune.errors import InputError
from fastprune.exporting.padding import added_bytes, padded_state
from fastprune.models.adopted import config_with
from fastprune.models.checkpoint import (
    Form,
    has_stock_form,
    save_checkpoint,
    settle_tie,
    weight_bytes,
    write_weights,
)
from fastprune.models.families import Geometry, declaration, geometries
from fastprune.models.readback import check_read_back
from fastprune.models.skeleton import skeleton

if TYPE_CHECKING:
    from fastprune.exporting.config import ExportConfig


def check(model: nn.Module, config: ExportConfig) -> None:
    """InputError when no stock architecture has layers of one size that hold those of `model`."""
    uniform_size(model)


def write(model: nn.Module, tokenizer: Any, path: Path, config: ExportConfig) -> dict[str, Any]:
    """Write `model`, its layers padded with exact zeros to one size, into the folder `path`.

    The folder is that of a stock architecture; layers of which nothing is left are dropped. Returns
    "bytes" (of the weight files), "padding_bytes" (how many of them are zeros that were added) and
    "notes" (sentences). Raises InputError as `check`, and ReadBackError when `config.read_back`
    asks for a comparison and the folder does not give the same logits.
    """
    size, padding = uniform_size(model), 0
    settle_tie(model)
    nothing = replace(size, query_heads=0, kv_heads=0, channels=0)
    sizes = [size if own.kv_heads or own.channels else nothing for own in geometries(model)]
    shape = skeleton(config_with(model.config, sizes), model.dtype)
    if getattr(model, "generation_config", None) is not None:
        shape.generation_config = model.generation_config

    def write_padded(form: Form, directory: Path) -> None:
        nonlocal padding
        state = padded_state(model, form.state, form.layers)
        padding = added_bytes(model, state)
        write_weights(replace(form, state=state), directory)

    save_checkpoint(shape, tokenizer, path, write_padded)
    if config.read_back:
        check_read_back(model, path)
    written = weight_bytes(path)
    return {"bytes": written, "padding_bytes": padding, "notes": _notes(size, sizes, padding)}


def uniform_size(model: nn.Module) -> Geometry:
    """The smallest size that holds every layer of `model` and that a stock architecture can have.

    Raises InputError when there is none.
    """
    sizes = geometries(model)
    if any(size.experts for size in sizes):
        raise InputError(
            "hf-uniform: experts are not filled up with zeros; use --format hf, which is a stock "
            "model where the layers have one size, as after prune --layout uniform"
        )
    attentions = [size for size in sizes if size.kv_heads]
    channels = max((size.channels for size in sizes), default=0)
    if not attentions or not channels:
        what = "attention" if not attentions else "feed-forward"
        raise InputError(
            f"hf-uniform: a stock architecture has an attention and a feed-forward in every layer, "
            f"and no layer of this model has {what} left; use --format hf"
        )
    ratio = attentions[0].queries_per_kv
    if any(size.queries_per_kv != ratio for size in attentions):
        raise InputError(
            "hf-uniform: the layers differ in how many query heads share a KV head, which padding "
            "cannot make equal; use --format hf or nemotron-nas"
        )
    most, head_dim = max(size.kv_heads for size in attentions), attentions[0].head_dim
    for groups in range(most, max(most, model.config.hidden_size // ratio) + 1):
        size = Geometry(groups * ratio, groups, channels, head_dim)
        if has_stock_form(model, size):
            _check_padding(model, sizes, size)
            return size
    raise InputError(
        f"hf-uniform: no stock architecture has the biases of this model and query heads in "
        f"multiples of {ratio} on a hidden size of {model.config.hidden_size}; use --format hf"
    )


def _check_padding(model: nn.Module, sizes: Sequence[Geometry], size: Geometry) -> None:
    """InputError when `model` needs padding to `size` and zeros would change what it computes."""
    if all(own == size for own in sizes if own.kv_heads or own.channels):
        return
    for declared in declaration(model).sublayers:
        modules = [module for module, _ in declared.inputs]
        if declared.scales or len(set(modules)) < len(modules):
            what = "norms over all heads" if declared.scales else "fused projections"
            raise InputError(
                f"hf-uniform: the layers differ in size, and {what} cannot be filled up with "
                "zeros; prune with --layout uniform, or use --format hf"
            )


def _notes(size: Geometry, sizes: Sequence[Geometry], padding: int) -> list[str]:
    dropped = sum(not own.channels for own in sizes)
    every = (
        f"every layer has {size.query_heads} query heads, {size.kv_heads} KV heads and "
        f"{size.channels} channels"
    )
    notes = [f"{every}; {padding} bytes of it are zeros" if padding else every]
    if dropped:
        notes.append(f"layers dropped because nothing is left of them: {dropped}")
    return notes
