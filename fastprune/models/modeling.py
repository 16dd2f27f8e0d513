"""Decoder-only models whose layers differ in size.

This file is copied into every per-layer checkpoint, so it imports torch and transformers only. A
config carries what differs from the global settings, as the per-layer configurations of
transformers (5.15 and newer) describe it:

    "per_layer_config": {"3": {"num_attention_heads": 6, "num_key_value_heads": 2,
                               "intermediate_size": 1024},
                         "5": {"skip": ["attention"]}, ...}

Older checkpoints say zero heads or a zero intermediate size where a sublayer is removed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging


class Sizes(Protocol):
    """Sizes of one decoder layer; zero heads or channels mean that the sublayer is removed."""

    @property
    def query_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def experts(self) -> int: ...


PREFIX = "fastprune_"
"""Of the `model_type` of per-layer models."""
ATTENTION, MLP = "attention", "mlp"
"""What a layer can skip, by the names that transformers uses."""
SUBLAYERS = {
    "num_attention_heads": ATTENTION,
    "num_key_value_heads": ATTENTION,
    "intermediate_size": MLP,
}
"""The sizes of a layer in a config, and the sublayer that each belongs to. In place of its MLP a
layer may have experts, whose number and size are other settings: `Stock.experts`."""


class Removed(nn.Module):
    """Stands where a sublayer was: adds nothing to the residual stream."""


# Not a direct nn.Module: transformers reads this source, takes a class of that form for a real
# attention of its own making, and then refuses to switch attention implementations.
class RemovedAttention(Removed):
    """A removed attention. In a KV cache its layer holds one zero for each token.

    A cache is asked how many tokens it holds, and masks are sized, by its first layer (by the first
    of each kind where sliding-window and full layers mix), and that may be this one.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        cache: Any = None,
        past_key_values: Any = None,  # what older releases of transformers call the cache
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        cache = past_key_values if cache is None else cache
        if cache is not None:
            self._count_tokens(hidden_states, cache)
        return hidden_states.new_zeros(()), None

    def _count_tokens(self, hidden_states: torch.Tensor, cache: Any) -> None:
        heads = size = 1
        own = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if own is not None and own.is_initialized:  # perhaps in advance, at the size of the others
            _, heads, _, size = own.keys.shape
        batch, length, _ = hidden_states.shape
        zeros = hidden_states.new_zeros(()).expand(batch, heads, length, size)
        cache.update(zeros, zeros, self.layer_idx)


class RemovedMLP(Removed):
    """A removed MLP."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


@dataclass(frozen=True)
class Stock:
    """The classes of one model type in `transformers.models.MODULE`, by name, and its layers.

    `norms` are those of a decoder layer around its attention, and around its MLP; a layer without
    the latter gives its MLP what its attention reads. `own_sizes` says that the attention reads its
    heads off the config while it runs, `free_heads` that heads need not divide the hidden size
    although the stock config says so, `full_heads` that the stock attention can be built with heads
    that fill the hidden size only, and `all_heads` that its query and key norms are built for such
    heads. `experts` are the settings that say how many experts a layer has that has some, and how
    many channels each.
    """

    module: str
    config: str
    model: str
    causal_lm: str
    layer: str
    norms: tuple[tuple[str, ...], tuple[str, ...]] = (
        ("input_layernorm",),
        ("post_attention_layernorm",),
    )
    own_sizes: bool = False
    free_heads: bool = False
    full_heads: bool = False
    all_heads: bool = False
    experts: tuple[str, str] | None = None


def _named(module: str, name: str, **more: Any) -> Stock:
    """The classes of a model type that are named as most are."""
    return Stock(
        module,
        config=f"{name}Config",
        model=f"{name}Model",
        causal_lm=f"{name}ForCausalLM",
        layer=f"{name}DecoderLayer",
        **more,
    )


POST_NORMS = ("post_attention_layernorm",), ("post_feedforward_layernorm",)
FOUR_NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
ONE_NORM = ("input_layernorm",), ("input_layernorm",)
STOCK: dict[str, Stock] = {
    "cohere": _named("cohere", "Cohere", norms=ONE_NORM),
    "cohere2": _named("cohere2", "Cohere2", norms=ONE_NORM),
    "gemma": _named("gemma", "Gemma"),
    "gemma2": _named("gemma2", "Gemma2", norms=FOUR_NORMS, free_heads=True),
    "gemma3_text": Stock(
        "gemma3",
        config="Gemma3TextConfig",
        model="Gemma3TextModel",
        causal_lm="Gemma3ForCausalLM",
        layer="Gemma3DecoderLayer",
        norms=FOUR_NORMS,
        free_heads=True,
    ),
    "granite": _named("granite", "Granite"),
    "llama": _named("llama", "Llama", free_heads=True),
    "mistral": _named("mistral", "Mistral"),
    "mixtral": _named("mixtral", "Mixtral", experts=("num_local_experts", "intermediate_size")),
    "olmo2": _named("olmo2", "Olmo2", norms=POST_NORMS),
    "olmoe": _named("olmoe", "Olmoe", all_heads=True, experts=("num_experts", "intermediate_size")),
    "phi3": _named("phi3", "Phi3", own_sizes=True),
    "qwen2": _named("qwen2", "Qwen2"),
    "qwen2_moe": _named("qwen2_moe", "Qwen2Moe", experts=("num_experts", "moe_intermediate_size")),
    "qwen3": _named("qwen3", "Qwen3"),
    "qwen3_moe": _named(
        "qwen3_moe", "Qwen3Moe", experts=("num_local_experts", "moe_intermediate_size")
    ),
    "smollm3": _named("smollm3", "SmolLM3"),
    "stablelm": _named("stablelm", "StableLm", full_heads=True),
    "starcoder2": _named("starcoder2", "Starcoder2"),
}
"""What per-layer models are made of, by the `model_type` of the stock model."""


class OwnSizes:
    """A model's config with the heads of one layer, for attention that reads them while it runs."""

    def __init__(self, config: Any, sizes: Mapping[str, int]) -> None:
        self.__dict__.update(sizes)
        self.shared = config

    def __getattr__(self, name: str) -> Any:
        if name == "shared":  # a copy in the making has no attributes yet
            raise AttributeError(name)
        return getattr(self.shared, name)


def remove_sublayer(layer: nn.Module, sublayer: str, family: str) -> None:
    """Take the attention or the MLP out of `layer`, and the norms that nothing else reads."""
    attention, mlp = STOCK[family].norms
    mlp = tuple(name for name in mlp if getattr(layer, name) is not None) or attention
    if sublayer == ATTENTION:
        own, others, other = attention, mlp, layer.mlp
        layer.self_attn = RemovedAttention(layer.self_attn.layer_idx)
    else:
        own, others, other = mlp, attention, layer.self_attn
        layer.mlp = RemovedMLP()
    for name in own:
        if name not in others or isinstance(other, Removed):
            setattr(layer, name, nn.Identity())


def settle_heads(attention: nn.Module, config: Any, heads: int, kv_heads: int) -> None:
    """Tell `attention` of a model with `config` its own number of heads."""
    stock = STOCK[_family(config)]
    attention.num_key_value_groups = heads // kv_heads
    for name, count in (("num_heads", heads), ("num_key_value_heads", kv_heads)):
        if hasattr(attention, name):
            setattr(attention, name, count)
    if stock.own_sizes:
        sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        attention.config = OwnSizes(config, sizes)
    if stock.all_heads:
        for norm, count in ((attention.q_norm, heads), (attention.k_norm, kv_heads)):
            size = count * attention.head_dim
            if len(norm.weight) != size:
                norm.weight = nn.Parameter(norm.weight.new_ones(size))


def settle_experts(mlp: nn.Module, size: Sizes) -> None:
    """Tell the router and the experts inside of `mlp` how many there are, and of what size."""
    for module in mlp.modules():
        if hasattr(module, "num_experts"):
            module.num_experts = size.experts
        if hasattr(module, "intermediate_dim"):
            module.intermediate_dim = size.channels


def resize_heads(attention: nn.Module, heads: int, kv_heads: int) -> None:
    """Give `attention`, which was built with other heads, new projections of so many."""
    for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        old = getattr(attention, name)
        rows = count * attention.head_dim
        setattr(attention, name, nn.Linear(old.in_features, rows, bias=old.bias is not None))
    old = attention.o_proj
    columns = heads * attention.head_dim
    attention.o_proj = nn.Linear(columns, old.out_features, bias=old.bias is not None)


def _family(config: Any) -> str:
    return config.model_type.removeprefix(PREFIX)


class PerLayerModel:
    """Mixin before a stock model, with or without its head: each layer is built at its own size."""

    layer_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        count, sizes = config.num_hidden_layers, config.to_dict().get("per_layer_config")
        # The stock constructor builds layers of one size; let it build everything but them.
        config.per_layer_config = None
        config.num_hidden_layers = 0
        super().__init__(config)
        config.num_hidden_layers = count
        config.per_layer_config = sizes
        layers = [self._build_layer(config, index) for index in range(count)]
        self.base_model.layers = nn.ModuleList(layers)
        self.post_init()

    def _build_layer(self, config: Any, index: int) -> nn.Module:
        own = copy.copy(config.per_layer_config[index])
        skipped = getattr(own, "skip", ())
        if ATTENTION in skipped:  # the smallest one that can be built; it is taken out below
            own.num_attention_heads = own.num_key_value_heads = 1
        if MLP in skipped:
            for name in ("intermediate_size", *(STOCK[_family(config)].experts or ())):
                setattr(own, name, 1)
        heads = own.num_attention_heads, own.num_key_value_heads
        full = STOCK[_family(config)].full_heads
        if full:
            own.num_attention_heads = own.num_key_value_heads = own.hidden_size // own.head_dim
        layer = self.layer_class(own, index)
        if full:
            resize_heads(layer.self_attn, *heads)
        # Sizes are in the weights now. The shared config is where a later choice of another
        # attention implementation is written, so that is the one to read from.
        for module in layer.modules():
            if getattr(module, "config", None) is own:
                module.config = config
        settle_heads(layer.self_attn, config, *heads)
        for sublayer in skipped:
            remove_sublayer(layer, sublayer, _family(config))
        return layer


class PerLayerConfig:
    """Mixin before a stock config: sizes layer by layer, as written now and by older releases.

    The global value of a size that layers override may be read. It is the dense model's, and no
    layer has more. Rotary embeddings (dynamic, yarn, longrope) and tools that size caches read the
    global number of heads.
    """

    allow_global_per_layer_attribute_access = True

    def __post_init__(self, per_layer_config: Any = None, **settings: Any) -> None:
        if per_layer_config is not None:
            layers = per_layer_config
            if not isinstance(layers, Mapping):
                layers = dict(enumerate(layers))
            per_layer_config = {index: with_skips(own) for index, own in layers.items()}
        super().__post_init__(  # type: ignore[misc]  # the stock config's
            per_layer_config=per_layer_config, **settings
        )


def with_skips(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of one layer with `skip` for sublayers that have no heads or channels.

    Raises ValueError when something else than the attention or the MLP is skipped.
    """
    own = dict(overrides)
    skipped = set(own.pop("skip", ()))
    if unknown := skipped - {ATTENTION, MLP}:
        raise ValueError(f"per_layer_config skips {sorted(unknown)}; layers have attention and mlp")
    for name, sublayer in SUBLAYERS.items():
        if own.get(name) == 0:
            skipped.add(sublayer)
            del own[name]
    return own | {"skip": sorted(skipped)} if skipped else own


class Family(NamedTuple):
    """The classes of one model type; the last base class of each is the stock one."""

    config: type
    model: type
    causal_lm: type


def _no_check(self: Any) -> None:
    """Allow heads that do not divide the hidden size: the head size is explicit."""


@cache
def family_classes(family: str) -> Family:
    """The per-layer classes of the model type `family`; the stock ones are imported now.

    Raises KeyError for a model type that has no per-layer form.
    """
    stock = STOCK[family]
    package = f"transformers.models.{stock.module}"
    modeling = import_module(f"{package}.modeling_{stock.module}")
    parent = getattr(import_module(f"{package}.configuration_{stock.module}"), stock.config)
    own: dict[str, Any] = {"model_type": PREFIX + family, "__module__": __name__}
    if stock.free_heads:
        own["validate_architecture"] = _no_check
    config = type(f"Fastprune{stock.config}", (PerLayerConfig, parent), own)
    # collects the validators anew; without it the parent's would still run on saving
    config = strict(config) if stock.free_heads else config
    layer = getattr(modeling, stock.layer)
    model, causal_lm = (
        type(
            f"Fastprune{name}",
            (PerLayerModel, getattr(modeling, name)),
            {"config_class": config, "layer_class": layer, "__module__": __name__},
        )
        for name in (stock.model, stock.causal_lm)
    )
    return Family(config, model, causal_lm)


def __getattr__(name: str) -> type:
    """A per-layer class by its name, such as FastpruneLlamaModel, as `auto_map` asks for it."""
    for family, stock in STOCK.items():
        names = (f"Fastprune{part}" for part in (stock.config, stock.model, stock.causal_lm))
        for place, known in enumerate(names):
            if known == name:
                return family_classes(family)[place]
    raise AttributeError(f"module {__name__} has no attribute {name}")


def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know the per-layer model types."""
    for family in map(family_classes, STOCK):
        AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, family.model, exist_ok=True)
        AutoModelForCausalLM.register(family.config, family.causal_lm, exist_ok=True)


def per_layer_config(config: Any, sizes: Sequence[Sizes]) -> Any:
    """The config of a model like that of `config` whose decoder layers have `sizes`.

    A size that all layers share is a global setting; a field in which they differ keeps its global
    value, the dense model's, and is overridden layer by layer. Raises KeyError for a model type
    that has no per-layer form.
    """
    family = _family(config)
    settings = config.to_dict()
    for key in ("per_layer_config", "model_type", "architectures", "auto_map"):
        settings.pop(key, None)
    settings["head_dim"] = settings.get("head_dim") or (
        settings["hidden_size"] // settings["num_attention_heads"]
    )
    fields = [layer_settings(size, STOCK[family].experts) for size in sizes]
    for name in {name for layer in fields for name in layer}:
        values = {layer[name] for layer in fields if layer.get(name)}
        if len(values) == 1:
            settings[name] = values.pop()
    if len({size.experts for size in sizes if size.experts}) > 1:
        # the loss that this asks for needs as many router logits in every layer
        settings["output_router_logits"] = False
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the library's own checks read global sizes, and it warns of it
    try:
        result = family_classes(family).config(**settings, per_layer_config=fields)
    finally:
        logging.set_verbosity(level)
    result._attn_implementation = config._attn_implementation
    return result


def layer_settings(size: Sizes, experts: tuple[str, str] | None) -> dict[str, int]:
    """The settings of a layer of `size`, where `experts` names those of its experts."""
    found = {"num_attention_heads": size.query_heads, "num_key_value_heads": size.kv_heads}
    if experts is None or not size.experts:
        return {**found, "intermediate_size": size.channels}
    count, channels = experts
    return {**found, count: size.experts, channels: size.channels}
