"""What a `.gguf` file says of its model, held against what transformers' reader makes of it.

The reader takes the tensors and settings that it knows, and leaves the rest without a word. Here
every tensor and every setting of the attention and its rotary embedding is mapped or refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.models.families import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE
from fastprune.models.gguf_file import ARCHITECTURE, Contents, read_contents, read_tensor

DECI = "deci"
"""llama.cpp's architecture for Llamas whose layers differ in size."""
LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    QUERY: "attn_q",
    KEY: "attn_k",
    VALUE: "attn_v",
    OUTPUT: "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    GATE: "ffn_gate",
    UP: "ffn_up",
    DOWN: "ffn_down",
}
"""What the modules of a decoder layer are called in a file."""
TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PAIRED = {
    **dict.fromkeys(("llama", DECI, "granite", "smollm3"), ("attn_q", "attn_k")),
    **dict.fromkeys(("qwen2", "qwen3"), ()),
}
"""Whose rotary embedding turns neighbouring values of a head together, not halves of it."""
LESS_ONE = ("gemma", "gemma2", "gemma3")
"""Architectures whose files hold the weights of norms as what is multiplied with, 1 + weight."""
ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""Tensors that say how much of each expert a token gets; they are always f32."""
ROW = ROUTERS[1:]
"""Tensors that are a matrix of one row in a model, and a vector in a file."""
MAPPED = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose settings are read here; those of others are as transformers' reader has them."""
FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQUENCIES, LONG, SHORT)
"""Tensors (head_dim / 2,) of what each rotary frequency is divided by."""
DEFAULT_THETA = 10000.0
BIASES = {
    "attention_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
    "mlp_bias": ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
}
"""The settings of a config that say whether projections have biases, and the biases' names."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every published model whose rotary frequencies are scaled as Llama 3's."""
INNOCUOUS = {"rope.scaling.finetuned": (False, True), "attention.causal": (True,)}
"""Settings that change nothing at these values."""
ATTENTION = "rope.scaling.attn_factor"
WIDE_QUERIES = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the one Gemma, 27B, whose attention is scaled by the width of the model over its heads:
as in llama.cpp, since no setting says so. That of others is scaled by the size of a head."""
SAME_NAME = ("attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual")
"""Settings that go by their names in a config, and that transformers' reader leaves out."""
READ = (
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)
"""The settings of attention and rotary embedding that `complete_config` carries over."""


@dataclass(frozen=True)
class Header:
    """What lies in a `.gguf` file before its tensors, and the factors of its frequencies.

    ``settings`` are those of the architecture, without its name in front; ``words`` those of the
    tokenizer, by their whole names; ``factors`` those of `FACTORS` that the file holds.
    """

    path: Path
    architecture: str
    settings: dict[str, Any]
    words: dict[str, Any]
    factors: dict[str, Tensor]
    contents: Contents


def read_header(path: Path) -> Header:
    """The header of the file `path`. Raises InputError, and whatever damaged bytes lead to."""
    contents = read_contents(path)
    architecture = contents.settings[ARCHITECTURE]
    prefix = f"{architecture}."
    settings, words = {}, {}
    for key, value in contents.settings.items():
        if key.startswith(prefix):
            settings[key.removeprefix(prefix)] = value
        elif key.startswith("tokenizer."):
            words[key] = value
    factors = {
        name: read_tensor(path, contents.tensors[name])
        for name in FACTORS
        if name in contents.tensors
    }
    return Header(path, architecture, settings, words, factors, contents)


def pair_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads × head_dim, …) in the order of `PAIRED`: halves of a head become neighbours."""
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def part_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """The rows that `pair_neighbours` was given."""
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def check_uniform(header: Header) -> None:
    """InputError where layers of the file differ in size, which the reader cannot express."""
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(header.settings.get(name), list) and header.architecture in MAPPED:
            raise InputError(
                f"{header.path}: its layers differ in size ({header.architecture}.{name} is a "
                "list), and such files are not read; give the Hugging Face folder it was made from"
            )


def complete_config(config: Any, header: Header) -> Any:
    """`config`, which the reader made of the file, with what it left of the file's settings.

    A model of another family keeps its config. Raises InputError for a setting that the config
    does not express.
    """
    from transformers import AutoConfig

    if header.architecture == "llama" != config.model_type:
        # by its name the reader took it for a Mistral, whose tensors it then does not know
        fields = {k: v for k, v in config.to_dict().items() if k != "model_type"}
        config = AutoConfig.for_model("llama", **fields)
        config.architectures = None
    if config.model_type in MAPPED:
        _complete_family(config, header)
    else:
        if config.model_type in WIDE_QUERIES:
            wide = config.num_hidden_layers == WIDE_QUERIES[config.model_type]
            heads = config.num_attention_heads
            config.query_pre_attn_scalar = config.hidden_size // heads if wide else config.head_dim
        for name in SAME_NAME:
            if name in header.settings and hasattr(config, name):
                setattr(config, name, header.settings[name])
        _check_others(config, header)
    return config


def check_settings(header: Header) -> None:
    """InputError where the file holds a setting of attention or rotary embedding not in `READ`."""
    for name, value in header.settings.items():
        known = name in READ or value in INNOCUOUS.get(name, ())
        known = known or (name == ATTENTION and _is_longrope(header))
        if name.startswith(("rope.", "attention.")) and not known:
            raise _not_read(header, name)


def _complete_family(config: Any, header: Header) -> None:
    check_settings(header)
    settings = header.settings
    heads = settings.get("attention.head_count", config.num_attention_heads)
    head_dim = settings.get("attention.key_length", config.hidden_size // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if settings.get(name, head_dim) != head_dim:
            raise _not_read(header, name, f"heads have {head_dim} values")
    config.head_dim = head_dim
    config.rope_parameters = rope_parameters(header, head_dim)
    for name, names in BIASES.items():
        if hasattr(config, name):
            setattr(config, name, any(key.endswith(names) for key in header.contents.tensors))
    window = settings.get("attention.sliding_window")
    if window and window < config.max_position_embeddings:
        raise _not_read(header, "attention.sliding_window")


def rope_parameters(header: Header, head_dim: int) -> dict[str, Any]:
    """The rotary embedding's parameters as transformers names them."""
    settings = header.settings
    theta = settings.get("rope.freq_base", DEFAULT_THETA)
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 0.0)) or 1.0
    kind = settings.get("rope.scaling.type", "linear" if factor != 1 else "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if FREQUENCIES in header.factors:
        if kind != "none":
            raise _not_read(header, "rope.scaling.type", f"beside {FREQUENCIES}")
        return rope | _llama3(header, header.factors[FREQUENCIES], theta, head_dim)
    if kind == "none":
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    original = settings.get("rope.scaling.original_context_length")
    if kind == "longrope" and original and ATTENTION in settings and _is_longrope(header):
        return rope | {
            "rope_type": "longrope",
            "factor": settings["context_length"] / original,
            "original_max_position_embeddings": original,
            "long_factor": header.factors[LONG].tolist(),
            "short_factor": header.factors[SHORT].tolist(),
            "attention_factor": settings[ATTENTION],
        }
    if kind != "yarn" or not original:
        raise _not_read(header, "rope.scaling.type")
    return rope | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": settings.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": settings.get("rope.scaling.yarn_beta_slow", 1.0),
    }


def _is_longrope(header: Header) -> bool:
    """Whether the file holds both factors of a long and of a short text."""
    return header.factors.keys() >= {LONG, SHORT}


def _llama3(header: Header, divisors: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling in the manner of Llama 3 that divides the frequencies by `divisors`."""
    factor = float(divisors.max())
    rope = {"rope_type": "llama3", "factor": factor, **LLAMA3}
    turns = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / math.tau
    low, high, original = LLAMA3.values()
    smooth = ((turns * original - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    fits = divisors.shape == expected.shape
    if not fits or not torch.allclose(divisors.double(), expected, rtol=1e-3):
        raise InputError(
            f"{header.path}: its {FREQUENCIES} is not the scaling of Llama 3's rotary frequencies, "
            "and no other is read; give the Hugging Face folder it was made from"
        )
    return rope


def _check_others(config: Any, header: Header) -> None:
    """InputError where the file says another rotary embedding than `config`, or other caps."""
    said = getattr(config, "rope_parameters", None) or {}
    ropes = [value for value in said.values() if isinstance(value, Mapping)] or [said]
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    partial = ropes[0].get("partial_rotary_factor", 1.0)
    known = {
        "rope.dimension_count": [getattr(config, "rotary_dim", None), int(head_dim * partial)],
        "rope.dimension_sections": [rope.get("mrope_section") for rope in ropes],
        "rope.freq_base": [rope.get("rope_theta") for rope in ropes],
        "rope.freq_base_swa": [rope.get("rope_theta") for rope in ropes],
        "rope.scaling.type": ["none", *(rope.get("rope_type") for rope in ropes)],
        "rope.scaling.factor": [1.0, *(rope.get("factor") for rope in ropes)],
        "rope.scaling.original_context_length": [
            rope.get("original_max_position_embeddings") for rope in ropes
        ],
        **INNOCUOUS,
    }
    known |= {name: [getattr(config, name, None)] for name in SAME_NAME}
    for name, value in header.settings.items():
        if isinstance(value, list):
            value = [item for item in value if item]
        if name.startswith(("rope.", *SAME_NAME)) and not any(
            _same(value, v) for v in known.get(name, ())
        ):
            raise _not_read(header, name)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)


def check_tensors(header: Header, config: Any, state: Mapping[str, Tensor]) -> None:
    """InputError unless each tensor of the file is in `state`, what the reader made of it.

    `state` holds the weights of the model by transformers' names.
    """
    count, tensors = config.num_hidden_layers, header.contents.tensors
    known = set(model_names(header.architecture, count, state))
    if config.model_type in MAPPED:
        known |= {FREQUENCIES} & header.factors.keys()
        known |= {LONG, SHORT} if config.rope_parameters["rope_type"] == "longrope" else set()
    experts = any("experts" in name for name in state)  # several of the file's make one weight
    surplus = sorted(name for name in tensors.keys() - known if not (experts and "_exps." in name))
    if surplus:
        raise InputError(
            f"{header.path}: {len(surplus)} tensors have no place in a {config.model_type} of "
            f"{count} layers, first {surplus[0]}, and without them it would compute something "
            "else; give the Hugging Face folder it was made from"
        )
    found = sum(tensor.numel for name, tensor in tensors.items() if name not in FACTORS)
    needed = sum({tensor.data_ptr(): tensor.numel() for tensor in state.values()}.values())
    if found != needed:
        raise InputError(
            f"{header.path}: its tensors hold {found:,} values, a {config.model_type} of these "
            f"sizes has {needed:,}; copy or download the file again"
        )


def model_names(architecture: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """Which of `names`, of transformers, the tensors of a file have, by their names in it.

    Names that have no counterpart are left out.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    table = get_tensor_name_map(arch, layers)
    result: dict[str, str] = {}
    for name in names:
        inner = name.partition(".")[2]  # some files are made from the model without its head
        for key in (name, inner):
            if found := table.get_name(key, try_suffixes=(".weight", ".bias")):
                result.setdefault(found, name)
    return result


def _not_read(header: Header, name: str, why: str = "") -> InputError:
    value = header.settings[name]
    return InputError(
        f"{header.path}: {header.architecture}.{name} is {value}{', ' * bool(why)}{why}, which is "
        "not read from this kind of file; give the Hugging Face folder it was made from"
    )
