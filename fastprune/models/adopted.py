"""Model types that are not declared, but whose decoder layers are built as those of a family.

Such a type is adopted: its layers are scored and cut by the family's declaration. Its results are
written with its own stock classes, so all their layers have one size. Which family it was adopted
as stands in the config of what is written, where transformers passes over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fastprune.errors import InputError
from fastprune.models.families import (
    ADOPTED,
    ADOPTED_AS,
    DECLARED,
    FAMILIES,
    PRUNED_PREFIX,
    SUPPORTED,
    Family,
    Geometry,
    decoder_layers,
    family_of_config,
    geometry,
    is_adopted,
    sublayers,
)
from fastprune.models.modeling import per_layer_config

TEXT_PARTS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Types of decoders inside multimodal models, and the families that they are adopted as."""


def adopt(model: nn.Module, family: str | None = None) -> None:
    """Let the layers of `model` be known as those of `family`.

    Without `family` it is the one that the model's config remembers or that `TEXT_PARTS` names;
    otherwise nothing happens. Weights are not looked at, so the model may lie on the meta device.
    Raises InputError when there is no such family, when the type is a declared one, and when the
    layers differ from those of `family` in their modules or shapes.
    """
    kind = _kind(model.config)
    if kind in SUPPORTED:
        if family not in (None, kind):
            raise InputError(
                f"--family {family}: models of type '{kind}' have a declaration of their own; "
                "leave --family out"
            )
        return
    name = family or getattr(model.config, ADOPTED_AS, None) or TEXT_PARTS.get(kind)
    if name is None:
        return
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"--family {name}: not one of {', '.join(SUPPORTED)}")
    if problem := misfit(model, FAMILIES[name]):
        raise InputError(
            f"--family {name}: the layers of this {kind} differ from it: {problem}; only models "
            "whose layers are like those of a family can be pruned"
        )
    layer = type(decoder_layers(model)[0]).__name__
    ADOPTED[kind] = replace(FAMILIES[name], layer_class=layer)
    setattr(model.config, ADOPTED_AS, name)


def check_known(model: nn.Module, family: str | None = None) -> None:
    """`adopt`, and InputError for a model whose type is neither declared nor adopted.

    The error names the family that its layers look like, if there is one.
    """
    adopt(model, family)
    try:
        family_of_config(model.config)
    except InputError as error:
        if is_known(model.config):
            raise
        names = ("llama", *SUPPORTED)  # several families have Llama's layers
        alike = next((name for name in names if misfit(model, FAMILIES[name]) is None), None)
        if alike is None:
            raise
        raise InputError(
            f"{error}; its layers look like those of {alike}: try --family {alike}"
        ) from error


def is_known(config: Any) -> bool:
    """Whether the model that `config` describes is of a declared or an adopted type."""
    return _kind(config) in SUPPORTED or is_adopted(config)


def config_with(config: Any, sizes: Sequence[Geometry]) -> Any:
    """The config of a model like that of `config` whose decoder layers have `sizes`.

    It is a stock config for an adopted type, else a per-layer one. Raises InputError for sizes that
    an adopted type cannot have.
    """
    return (adopted_config if is_adopted(config) else per_layer_config)(config, sizes)


def adopted_config(config: Any, sizes: Sequence[Geometry]) -> Any:
    """The stock config of a model like that of `config`, of an adopted type, whose decoder layers
    have `sizes`.

    Raises InputError when the sizes differ, or are none that the stock config allows.
    """
    kind, size = _kind(config), sizes[0]
    if len(set(sizes)) > 1 or not (size.kv_heads and size.channels):
        raise InputError(
            f"layers of a '{kind}' can only be written when all of them have one size; "
            "use --layout uniform"
        )
    settings = config.to_dict()
    for key in ("model_type", "architectures"):
        settings.pop(key, None)
    settings |= {
        "num_hidden_layers": len(sizes),
        "num_attention_heads": size.query_heads,
        "num_key_value_heads": size.kv_heads,
        "intermediate_size": size.channels,
        "head_dim": size.head_dim,
    }
    try:
        result = type(config)(**settings)
    except Exception as error:  # validators raise whatever they like
        reason = " ".join(str(error).split())
        raise InputError(
            f"the config of a '{kind}' does not allow layers of {size.query_heads} query heads, "
            f"{size.kv_heads} KV heads and {size.channels} channels: {reason}"
        ) from error
    result.architectures = config.architectures
    result._attn_implementation = config._attn_implementation
    return result


def misfit(model: nn.Module, family: Family) -> str | None:
    """In what `model` differs from a model of `family`; None where it looks like one.

    Looked at are the paths of its parts, and modules and shapes of every decoder layer.
    """
    for path in (family.embeddings, family.norm, family.head, family.layers):
        if not _has(model, path):
            return f"it has no module {path}"
    layers = model.get_submodule(family.layers)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return f"{family.layers} is no list of layers"
    if len({type(layer) for layer in layers}) > 1:
        return "its layers are not all of one class"
    return next(filter(None, (_layer_misfit(layer, family) for layer in layers)), None)


def _layer_misfit(layer: nn.Module, family: Family) -> str | None:
    """In what `layer` differs from a decoder layer of `family`; None where it does not."""
    for path in _modules(family):
        if not _has(layer, path):
            return f"a layer has no module {path}"
    linear = [path for s in family.sublayers for path, _ in (*s.inputs, s.output)]
    for path in linear:
        if not isinstance(layer.get_submodule(path), nn.Linear):
            return f"{path} is not a linear module"
    size = geometry(layer, family)
    if not all(size.units[kind] for kind in DECLARED) or size.query_heads % size.kv_heads:
        return f"{size.query_heads} query heads do not share {size.kv_heads} KV heads of equal size"
    for name in filter(None, {other.residual for other in FAMILIES.values()}):
        if hasattr(layer, name) != (name == family.residual):
            return f"what its sublayers add is multiplied in one of the two ({name})"
    known = set()
    for sublayer in sublayers(layer, family):
        for name, slices in sublayer.owned.items():
            parameter = layer.get_parameter(name)
            if sum(s.units * s.width for s in slices) != parameter.shape[slices[0].dim]:
                return f"{name} has the shape {tuple(parameter.shape)}"
            known.add(name)
        known.add(f"{sublayer.output.module}.bias")
    norms = {norm for sublayer in family.sublayers for norm in sublayer.norms}
    for name, parameter in layer.named_parameters():
        inside, _, _ = name.rpartition(".")
        shared = "norm" in inside and tuple(parameter.shape) == (size.head_dim,)
        if name not in known and inside not in norms and not shared:
            return f"a layer has the parameter {name}"
    return None


def _modules(family: Family) -> Iterator[str]:
    """The paths of all modules of a decoder layer that `family` declares."""
    for sublayer in family.sublayers:
        yield from (sublayer.module, *sublayer.norms)
        parts = (*sublayer.inputs, sublayer.output, *sublayer.scales)
        yield from (path for path, _ in parts)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _kind(config: Any) -> str:
    return getattr(config, "model_type", "").removeprefix(PRUNED_PREFIX)
