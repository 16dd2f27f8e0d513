"""The architectures of llama.cpp: which family is written as which, and what each one computes.

What a loader does not read from the file it takes for granted, such as the activation or which
layers have a sliding window. Every such assumption is declared here, and a model that breaks one is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastprune.errors import InputError
from fastprune.models.families import PRUNED_PREFIX, Family, Geometry
from fastprune.models.gguf import BIASES, DECI, WIDE_QUERIES

RMS, LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
WINDOW = "attention.sliding_window"
SHARED_CHANNELS, PARALLEL = "expert_shared_feed_forward_length", "use_parallel_residual"
WHOLE = (WINDOW, SHARED_CHANNELS, PARALLEL)
"""Settings that are numbers of something, or true or false; all others are floating-point."""
ATTENTION_BIASES, MLP_BIASES = BIASES.values()
QKV_BIASES = ATTENTION_BIASES[:3]
NORM_BIASES = ("attn_norm.bias", "ffn_norm.bias", "output_norm.bias")
SILU, GELU = ("silu",), ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp takes a model of one architecture for.

    - ``settings``: the names of settings in the file, without the architecture in front, and the
      fields of the config that they come from; those in ``optional`` may be None, and are left out
    - ``requires``: fields of the config, and the values that are computed
    - ``activation``: the names that transformers has for its activation
    - ``biases``: the biases that are added, by their tensors' names in a layer
    - ``head``: whether the head may be the embedding ("either"), always is it ("embedding"), or has
      to be in the file as a tensor of its own even where it is ("own")
    - ``full_queries``, ``full_keys``: whether the query heads, and the KV heads, have to fill the
      hidden size
    - ``scalings``: the scalings of rotary frequencies that are computed
    - ``partial``: whether a part of each head may be rotated
    - ``period``: one layer in so many has full attention where the others have a sliding window, or
      no rotary embedding; 0 where all layers are alike
    """

    name: str
    settings: Mapping[str, str]
    optional: tuple[str, ...] = ()
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    activation: tuple[str, ...] = SILU
    biases: tuple[str, ...] = ()
    head: Literal["either", "embedding", "own"] = "either"
    full_queries: bool = False
    full_keys: bool = False
    scalings: tuple[str, ...] = ("linear", "yarn")
    partial: bool = False
    period: int = 0

    @property
    def windowed(self) -> bool:
        """Whether sliding windows are computed."""
        return WINDOW in self.settings


LLAMA = Architecture(
    "llama",
    {RMS: "rms_norm_eps"},
    biases=(*ATTENTION_BIASES, *MLP_BIASES),
    scalings=("linear", "yarn", "llama3", "longrope"),
)
QWEN2 = Architecture("qwen2", LLAMA.settings, biases=QKV_BIASES, full_queries=True)
QWEN3 = Architecture("qwen3", LLAMA.settings)
GEMMA = Architecture("gemma", LLAMA.settings, activation=GELU, head="embedding")
GEMMA3 = replace(
    GEMMA,
    name="gemma3",
    settings=GEMMA.settings
    | {WINDOW: "sliding_window", "final_logit_softcapping": "final_logit_softcapping"},
    optional=("final_logit_softcapping",),
    requires={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)},
    scalings=("linear",),
    period=6,
)
COHERE = Architecture(
    "command-r",
    {LAYER_NORM: "layer_norm_eps", "logit_scale": "logit_scale"},
    biases=QKV_BIASES,
    head="embedding",
    full_queries=True,
)
QWEN2_MOE = replace(
    QWEN2,
    name="qwen2moe",
    settings=QWEN2.settings | {SHARED_CHANNELS: "shared_expert_intermediate_size"},
    requires={"norm_topk_prob": (False,)},
    head="own",
)
OLMO2 = Architecture("olmo2", LLAMA.settings, head="own", full_queries=True)
PER_LAYER = replace(LLAMA, name=DECI)
"""For Llamas, and what is built like them, whose layers differ in size."""
ARCHITECTURES = {
    "cohere": COHERE,
    "cohere2": replace(
        COHERE, name="cohere2", settings=COHERE.settings | {WINDOW: "sliding_window"}, period=4
    ),
    "gemma": GEMMA,
    "gemma2": replace(
        GEMMA3,
        name="gemma2",
        settings=GEMMA3.settings | {"attn_logit_softcapping": "attn_logit_softcapping"},
        optional=(),
        requires={"use_bidirectional_attention": (None, False)},
        period=2,
    ),
    "gemma3_text": GEMMA3,
    "granite": replace(
        LLAMA,
        name="granite",
        settings=LLAMA.settings
        | {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "logit_scale": "logits_scaling",
            "residual_scale": "residual_multiplier",
        },
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "olmo2": OLMO2,
    "olmoe": replace(
        OLMO2,
        name="olmoe",
        requires={"norm_topk_prob": (False,), "clip_qkv": (None,)},
        full_keys=True,
    ),
    "phi3": Architecture(
        "phi3", LLAMA.settings, full_queries=True, scalings=("longrope",), partial=True
    ),
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": replace(QWEN3, name="qwen3moe", requires={"norm_topk_prob": (True,)}),
    "smollm3": Architecture("smollm3", LLAMA.settings, period=4),
    "stablelm": Architecture(
        "stablelm",
        {LAYER_NORM: "layer_norm_eps", PARALLEL: "use_parallel_residual"},
        biases=(*QKV_BIASES, *NORM_BIASES),
        head="own",
        full_queries=True,
        partial=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        {LAYER_NORM: "norm_epsilon"},
        requires={"use_bias": (True,)},
        activation=GELU,
        biases=(*ATTENTION_BIASES, *MLP_BIASES, *NORM_BIASES),
        full_queries=True,
    ),
}
"""The architecture by the family; llama.cpp computes a Mistral and a Mixtral as a Llama."""
PER_LAYER_FAMILIES = ("llama", "mistral", "qwen2")
"""Families whose layers `PER_LAYER` computes, whatever their sizes."""


def settings_of(config: Any, architecture: Architecture) -> dict[str, Any]:
    """The settings of the model of `config` that `architecture` names, by their names in a file."""
    found = {name: getattr(config, source) for name, source in architecture.settings.items()}
    return {
        name: value if name in WHOLE else float(value)
        for name, value in found.items()
        if value is not None
    }


def check_config(config: Any, architecture: Architecture, layers: Mapping[int, Geometry]) -> None:
    """InputError where `architecture` computes anything else than the model of `config`.

    `layers` maps the numbers of the layers that are written, in order, to their sizes.
    """
    requires = dict(architecture.requires)
    if architecture.head == "embedding":
        requires["tie_word_embeddings"] = (True,)
    for name, values in requires.items():
        if (value := getattr(config, name, None)) not in values:
            known = " or ".join(str(known) for known in values)
            raise refusal(architecture, f"{name} {known}", f"{value}")
    for name, source in architecture.settings.items():
        if getattr(config, source, None) is None and name not in architecture.optional:
            raise refusal(architecture, f"some {source}", "none")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in architecture.activation:
        raise refusal(architecture, architecture.activation[0], activation)
    _check_scale(config, architecture, layers)
    if architecture.period:
        _check_pattern(config, architecture, list(layers))


def _check_scale(config: Any, architecture: Architecture, layers: Mapping[int, Geometry]) -> None:
    """InputError where the attention is scaled otherwise than by the size that is taken for it."""
    scale = getattr(config, "query_pre_attn_scalar", None)
    size = next(iter(layers.values()))
    wide = WIDE_QUERIES.get(config.model_type.removeprefix(PRUNED_PREFIX)) == len(layers)
    expected = config.hidden_size // size.query_heads if wide else size.head_dim
    if scale is not None and scale != expected:
        raise refusal(architecture, f"query_pre_attn_scalar {expected}", f"{scale}")


def _check_pattern(config: Any, architecture: Architecture, layers: Sequence[int]) -> None:
    """InputError unless the layers that attend otherwise are where they are taken to be."""
    period = architecture.period
    kinds = getattr(config, "no_rope_layers", None) or [
        kind != "full_attention" for kind in config.layer_types
    ]
    usual = [bool(kinds[index]) for index in layers]
    if usual != [number % period != 0 for number in range(1, len(layers) + 1)]:
        raise InputError(
            f"llama.cpp's architecture {architecture.name} has another attention in one layer of "
            f"{period}, and the model in others; prune without removing whole layers, or export as "
            "hf"
        )


def check_heads(config: Any, architecture: Architecture, size: Geometry) -> None:
    """InputError unless the loader takes the heads of layers of `size`."""
    for full, heads, what in (
        (architecture.full_queries, size.query_heads, "query"),
        (architecture.full_keys, size.kv_heads, "KV"),
    ):
        if full and heads * size.head_dim != config.hidden_size:
            raise InputError(
                f"llama.cpp's architecture {architecture.name} has {what} heads that fill the "
                f"hidden size of {config.hidden_size}, and the model has {heads} of "
                f"{size.head_dim} values; prune without KV groups, as with --structures mlp, or "
                "export as hf"
            )


def check_mixture(architecture: Architecture, family: Family, sizes: Iterable[Geometry]) -> None:
    """InputError where a layer of a mixture of experts has none, which no loader takes."""
    if family.mixture is not None and not all(size.experts for size in sizes):
        raise refusal(architecture, "experts in every layer", "an MLP in some")


def refusal(architecture: Architecture, computed: str, own: str) -> InputError:
    """The error that llama.cpp computes one thing, and the model has another."""
    return InputError(
        f"llama.cpp's architecture {architecture.name} computes {computed}, and the model has "
        f"{own}; export as hf"
    )
