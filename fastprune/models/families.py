"""What the decoder layers of each model family are made of.

A family is a declaration: which modules of a decoder layer are a sublayer, what each of its units
owns of them, and where the rest of the model lies. Everything that scores, cuts, or compensates
loops over `sublayers`; nothing else in the package knows a parameter's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from fastprune.errors import InputError
from fastprune.models.experts import INPUTS as EXPERT_INPUTS
from fastprune.models.experts import OUTPUT as EXPERT_OUTPUT
from fastprune.models.experts import Mixture
from fastprune.models.geometry import COARSE as COARSE
from fastprune.models.geometry import FINEST as FINEST
from fastprune.models.geometry import KINDS as KINDS
from fastprune.models.geometry import UNITS as UNITS
from fastprune.models.geometry import Geometry as Geometry
from fastprune.models.units import Slice, Sublayer

PRUNED_PREFIX = "fastprune_"
"""Per-layer checkpoints carry ``fastprune_<family>`` as their ``model_type``."""

DECLARED = ("attention", "mlp")
"""The kinds of which every family has a declaration; experts are declared as a `Mixture`."""

Width = Literal["queries", "head", "channel"]
"""Entries that one unit owns: of the query heads of a KV group, of one head, or a single one."""
LogitStep = Literal["multiply", "divide", "cap"]
"""What a model does to its head's output by a setting: times it, over it, or soft-capped by it."""
Part = tuple[str, Width]
"""The path of a module in its decoder layer, and what one unit owns of it."""

QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{n}_proj" for n in "qkvo")
GATE, UP, DOWN = (f"mlp.{n}_proj" for n in ("gate", "up", "down"))
"""The projections of a decoder layer by name, for weights that lie in a file without a model."""


@dataclass(frozen=True)
class Declaration:
    """Where one kind of sublayer lies in a decoder layer of a family.

    ``module`` computes it, between the ``norms`` before and behind it; where none of them is in a
    layer, it reads what the sublayer before it reads. A unit owns rows of the linear modules
    ``inputs`` and columns of ``output``. Inputs that name one module lie in it one
    behind the other, as in a fused projection. ``scales`` are norms over all heads, of which a unit
    owns its heads' entries; those that all heads share stay whole and are not declared.
    ``output_norm`` is the one of ``norms`` that the output goes through before it is added to the
    hidden states, if any.
    """

    kind: str
    module: str
    norms: tuple[str, ...]
    inputs: tuple[Part, ...]
    output: Part
    scales: tuple[Part, ...] = ()
    output_norm: str | None = None

    def entries(self, shape: Callable[[str], tuple[int, int]]) -> dict[str, int]:
        """Entries that all units together own, by width.

        ``shape`` gives rows and columns of a module by its path, and (0, 0) for one that is not
        there.
        """
        path, width = self.output
        parts = Counter(path for path, _ in self.inputs)
        found: dict[str, int] = {}
        for own, what in self.inputs:
            if parts[own] == 1:
                found.setdefault(what, shape(own)[0])
        found[width] = found.get(width) or shape(path)[1]
        for own in (own for own, count in parts.items() if count > 1):
            shared = [what for path, what in self.inputs if path == own]
            rest = [what for what in shared if what not in found]
            known = sum(found[what] for what in shared if what in found)
            found |= {what: max(shape(own)[0] - known, 0) // len(rest) for what in rest}
        return found


@dataclass(frozen=True)
class Family:
    """A model family: its sublayers, and where the parts of a causal language model lie.

    ``layer_class`` is the name of the class of its decoder layers. ``mixture`` says where the
    experts lie in a layer that has some in place of its MLP. The paths are those of modules:
    the list of decoder layers, the embeddings, the final norm, and the head. ``logits`` are the
    config's fields by which logits differ from the head's output; one that is None does nothing.
    ``residual`` is the attribute of a layer by which it multiplies what its sublayers add.
    ``refused`` are fields of the config with which models cannot be pruned, and why.
    """

    layer_class: str
    sublayers: tuple[Declaration, ...]
    mixture: Mixture | None = None
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    logits: Mapping[str, LogitStep] = field(default_factory=dict)
    residual: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def decoder(self) -> str:
        """The path of the module that runs the layers."""
        return self.layers.rpartition(".")[0]

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the linear modules of a layer, without their paths, in the order of use."""
        paths = (path for s in self.sublayers for path, _ in (*s.inputs, s.output))
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))

    def geometry(self, shape: Callable[[str], tuple[int, int]], head_dim: int) -> Geometry:
        """Sizes of a layer by the shapes of its modules, as for `Declaration.entries`.

        Of experts ``shape`` gives their number and their channels, by the path of the parameter.
        """
        found: dict[str, int] = {}
        for declared in self.sublayers:
            found |= declared.entries(shape)
        experts = inside = 0
        if self.mixture is not None:
            experts, inside = shape(f"{self.mixture.experts}.{EXPERT_OUTPUT}")
        return Geometry(
            query_heads=found["queries"] // head_dim if head_dim else 0,
            kv_heads=found["head"] // head_dim if head_dim else 0,
            channels=inside or found["channel"],
            head_dim=head_dim,
            experts=experts,
        )


ATTENTION = Declaration(
    "attention",
    "self_attn",
    norms=("input_layernorm",),
    inputs=((QUERY, "queries"), (KEY, "head"), (VALUE, "head")),
    output=(OUTPUT, "queries"),
)
MLP = Declaration(
    "mlp",
    "mlp",
    norms=("post_attention_layernorm",),
    inputs=((GATE, "channel"), (UP, "channel")),
    output=(DOWN, "channel"),
)
LLAMA = Family("LlamaDecoderLayer", (ATTENTION, MLP))
GEMMA3 = Family(
    "Gemma3DecoderLayer",
    (
        replace(
            ATTENTION,
            norms=("input_layernorm", "post_attention_layernorm"),
            output_norm="post_attention_layernorm",
        ),
        replace(
            MLP,
            norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            output_norm="post_feedforward_layernorm",
        ),
    ),
    logits={"final_logit_softcapping": "cap"},
)
OLMO2 = Family(
    "Olmo2DecoderLayer",
    (
        replace(
            ATTENTION,
            norms=("post_attention_layernorm",),
            scales=(("self_attn.q_norm", "queries"), ("self_attn.k_norm", "head")),
            output_norm="post_attention_layernorm",
        ),
        replace(
            MLP,
            norms=("post_feedforward_layernorm",),
            output_norm="post_feedforward_layernorm",
        ),
    ),
)
PHI3 = Family(
    "Phi3DecoderLayer",
    (
        replace(
            ATTENTION,
            inputs=tuple(("self_attn.qkv_proj", width) for width in ("queries", "head", "head")),
        ),
        replace(MLP, inputs=(("mlp.gate_up_proj", "channel"),) * 2),
    ),
)
STARCODER2 = Family(
    "Starcoder2DecoderLayer",
    (
        ATTENTION,
        replace(MLP, inputs=(("mlp.c_fc", "channel"),), output=("mlp.c_proj", "channel")),
    ),
)
COHERE = Family(
    "CohereDecoderLayer",
    (ATTENTION, replace(MLP, norms=ATTENTION.norms)),
    logits={"logit_scale": "multiply"},
    refused={"use_qk_norm": "their norms of queries and keys have weights of their own per head"},
)
MIXTRAL = replace(LLAMA, layer_class="MixtralDecoderLayer", mixture=Mixture())
OLMOE = Family(
    "OlmoeDecoderLayer",
    (replace(ATTENTION, scales=OLMO2.sublayers[0].scales), MLP),
    mixture=Mixture(),
)
FAMILIES = {
    "cohere": COHERE,
    "cohere2": replace(COHERE, layer_class="Cohere2DecoderLayer", refused={}),
    "gemma": replace(LLAMA, layer_class="GemmaDecoderLayer"),
    "gemma2": replace(GEMMA3, layer_class="Gemma2DecoderLayer"),
    "gemma3_text": GEMMA3,
    "granite": replace(
        LLAMA,
        layer_class="GraniteDecoderLayer",
        logits={"logits_scaling": "divide"},
        residual="residual_multiplier",
    ),
    "llama": LLAMA,
    "mistral": replace(LLAMA, layer_class="MistralDecoderLayer"),
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "olmoe": OLMOE,
    "phi3": PHI3,
    "qwen2": replace(LLAMA, layer_class="Qwen2DecoderLayer"),
    "qwen2_moe": replace(
        MIXTRAL,
        layer_class="Qwen2MoeDecoderLayer",
        mixture=Mixture(always="mlp.shared_expert.down_proj"),
    ),
    "qwen3": replace(LLAMA, layer_class="Qwen3DecoderLayer"),
    "qwen3_moe": replace(MIXTRAL, layer_class="Qwen3MoeDecoderLayer"),
    "smollm3": replace(LLAMA, layer_class="SmolLM3DecoderLayer"),
    "stablelm": replace(
        LLAMA,
        layer_class="StableLmDecoderLayer",
        refused={"qk_layernorm": "their norms of queries and keys are a module for each head"},
    ),
    "starcoder2": STARCODER2,
}
"""The families that can be pruned, by their ``config.model_type``."""
SUPPORTED = FAMILIES.keys()
ADOPTED: dict[str, Family] = {}
"""Model types that are not declared and whose layers are built as those of a family, by their
``config.model_type``; see `fastprune.models.adopted`."""
ADOPTED_AS = "fastprune_family"
"""The name, in the config of a model of an adopted type, of the family that it was adopted as."""


def register_family(model_type: str, family: Family) -> None:
    """Make models whose config has ``model_type`` known: they can be scored, planned and cut.

    What loads, saves and trains a model whose layers differ in size are the classes of its family
    in `fastprune.models.modeling`. Raises ValueError when the type is known already, or when
    ``family`` does not declare exactly its attention and its MLP; experts are its ``mixture``.
    """
    if model_type in FAMILIES:
        raise ValueError(f"the family '{model_type}' is registered already")
    if (kinds := tuple(s.kind for s in family.sublayers)) != DECLARED:
        raise ValueError(f"a family declares the sublayers {DECLARED}, in this order, not {kinds}")
    FAMILIES[model_type] = family


def family_of(model: nn.Module) -> str:
    """The family name of ``model``; InputError when it is not supported."""
    return family_of_config(model.config)


def family_of_config(config: Any) -> str:
    """The family name of the model that ``config`` describes; InputError when not supported."""
    model_type = getattr(config, "model_type", "")
    family = model_type.removeprefix(PRUNED_PREFIX)
    if family not in SUPPORTED and not is_adopted(config):
        raise InputError(
            f"model type '{model_type}' is not supported; "
            f"fastprune prunes {', '.join(SUPPORTED)} models"
        )
    for name, why in (FAMILIES | ADOPTED)[family].refused.items():
        if getattr(config, name, None):
            raise InputError(f"{family} models with {name} cannot be pruned: {why}")
    return family


def is_supported(config: Any) -> bool:
    """Whether the model that ``config`` describes can be pruned."""
    try:
        family_of_config(config)
    except InputError:
        return False
    return True


def is_adopted(config: Any) -> bool:
    """Whether the model that ``config`` describes is of an adopted type."""
    family = config.model_type.removeprefix(PRUNED_PREFIX)
    return family in ADOPTED and hasattr(config, ADOPTED_AS)


def declaration(model: nn.Module) -> Family:
    """The family of a causal language model; Llama's for one that is not supported."""
    return declared_for(model.config) or LLAMA


def declared_for(config: Any) -> Family | None:
    """The family, declared or adopted, of the model that ``config`` describes; None for others."""
    return (FAMILIES | ADOPTED).get(config.model_type.removeprefix(PRUNED_PREFIX))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order.

    Those of a family that is not supported are looked for where Llama has them.
    """
    return model.get_submodule(declaration(model).layers)


def geometry(layer: nn.Module, family: Family | None = None) -> Geometry:
    """Read the sizes of ``layer`` off its weights, so that they are never stale.

    It is read as a layer of ``family``, by default its own, which is Llama where its class belongs
    to none.
    """

    def shape(path: str) -> tuple[int, int]:
        with suppress(AttributeError):
            linear = layer.get_submodule(path)
            return linear.out_features, linear.in_features
        with suppress(AttributeError):
            parameter = layer.get_parameter(path)
            return parameter.shape[0], parameter.shape[-1]
        return 0, 0  # the sublayer is removed, or of another kind

    family = family or _declared(layer)
    attention = layer.get_submodule(family.sublayers[0].module)
    found = family.geometry(shape, getattr(attention, "head_dim", 0))
    return found if found.kv_heads else replace(found, query_heads=0)


def geometries(model: nn.Module) -> list[Geometry]:
    """The sizes of every decoder layer of ``model``."""
    family_of(model)
    return [geometry(layer) for layer in decoder_layers(model)]


def sublayers(layer: nn.Module, family: Family | None = None) -> list[Sublayer]:
    """The sublayers that ``layer`` has, in the order in which it runs them; ``family`` as for
    `geometry`.

    Query head h is served by KV head ``h // queries_per_kv``, so the query rows of one KV group
    are contiguous.
    """
    family = family or _declared(layer)
    sizes = geometry(layer, family)
    head = sizes.head_dim
    widths = {"queries": sizes.queries_per_kv * head, "head": head, "channel": 1}
    norms = _norms(layer, sizes, family)
    shared = _shared(norms)
    found = []
    for declared in family.sublayers:
        if declared.kind == "mlp" and sizes.experts and family.mixture is not None:
            found.append(_experts(layer, declared, family.mixture, sizes))
        elif units := sizes.units[declared.kind]:
            path, width = declared.output
            found.append(
                Sublayer(
                    declared.kind,
                    declared.module,
                    tuple(name for name in norms[declared.kind] if name not in shared),
                    tuple(_rows(layer, declared.inputs, widths, units)),
                    Slice(path, "weight", 1, widths[width], 0, units),
                    units,
                    tuple(_rows(layer, declared.scales, widths, units)),
                    declared.output_norm,
                )
            )
    return found


def shared_norms(layer: nn.Module) -> tuple[str, ...]:
    """The norms of ``layer`` that several of its sublayers read: they go with the last of these."""
    return _shared(_norms(layer, geometry(layer), _declared(layer)))


def _shared(norms: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Those of the ``norms`` of each kind of sublayer that several kinds have."""
    read = Counter(name for names in norms.values() for name in names)
    return tuple(name for name, readers in read.items() if readers > 1)


def residual_scale(layer: nn.Module) -> float:
    """What ``layer`` multiplies the outputs of its sublayers by before it adds them."""
    name = _declared(layer).residual
    return 1.0 if name is None else getattr(layer, name)


def _norms(layer: nn.Module, sizes: Geometry, family: Family) -> dict[str, tuple[str, ...]]:
    """The norms around each sublayer that ``layer`` of ``family``, which has ``sizes``, has, by its
    kind."""
    found: dict[str, tuple[str, ...]] = {}
    before: tuple[str, ...] = ()
    for declared in family.sublayers:
        own = (name for name in declared.norms if getattr(layer, name, None) is not None)
        before = tuple(own) or before
        if sizes.units[declared.kind]:
            found[declared.kind] = before
    return found


def _experts(layer: nn.Module, mlp: Declaration, mixture: Mixture, sizes: Geometry) -> Sublayer:
    """The ``mixture`` of ``layer``, which lies where the ``mlp`` of other layers does."""
    count = sizes.experts
    router = layer.get_submodule(mixture.router)
    return Sublayer(
        "experts",
        mixture.block,
        mlp.norms,
        (
            Slice(mixture.router, "weight", 0, 1, 0, count),
            Slice(mixture.experts, EXPERT_INPUTS, 0, 1, 0, count),
        ),
        Slice(mixture.experts, EXPERT_OUTPUT, 0, 1, 0, count),
        count,
        mixture=mixture,
        channels=sizes.channels,
        least=min(int(router.top_k), count),
    )


def _declared(layer: nn.Module) -> Family:
    """The family of ``layer``, by its class or those that this is derived from, as FSDP does."""
    classes = {c.__name__ for c in type(layer).__mro__}
    known = (*FAMILIES.values(), *ADOPTED.values())
    return next((family for family in known if family.layer_class in classes), LLAMA)


def _rows(
    layer: nn.Module, parts: Iterable[Part], widths: Mapping[str, int], units: int
) -> list[Slice]:
    """Slices of the weights, and biases, of ``parts``; those of one module behind one another."""
    found: list[Slice] = []
    ends: Counter[str] = Counter()
    for path, what in parts:
        module = layer.get_submodule(path)
        found += [
            Slice(path, parameter, 0, widths[what], ends[path], units)
            for parameter in ("weight", "bias")
            if getattr(module, parameter, None) is not None
        ]
        ends[path] += units * widths[what]
    return found


def block_parameters(model: nn.Module) -> int:
    """Number of parameters inside the decoder layers."""
    return sum(p.numel() for p in decoder_layers(model).parameters())
