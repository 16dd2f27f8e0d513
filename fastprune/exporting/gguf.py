"""The format `gguf`: one file with weights, settings and tokenizer, for llama.cpp and its kin."""

from __future__ import annotations

from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastprune.errors import InputError
from fastprune.exporting.formats import size_of
from fastprune.exporting.gguf_architectures import Architecture, settings_of
from fastprune.exporting.gguf_layout import Layout, layout
from fastprune.exporting.gguf_rope import rope
from fastprune.exporting.gguf_tensors import Entry, entries, named_entries, whole
from fastprune.exporting.gguf_types import Quant, check_f16, find_quant, numbers
from fastprune.exporting.gguf_words import words
from fastprune.models.families import PRUNED_PREFIX
from fastprune.models.gguf import MAPPED, read_header
from fastprune.models.gguf_weights import read_like, read_weights
from fastprune.models.readback import ReadBackError, logits_difference
from fastprune.progress import track

if TYPE_CHECKING:
    from fastprune.exporting.config import ExportConfig


TOLERANCES = {"f32": 1e-4, "f16": 1e-2, "bf16": 8e-2}
QUANTISED = 0.9
"""Relative error of the logits that is allowed, by the type; of quantised types only nonsense is
recognised, since how much they lose differs from model to model."""
ROUTED = 0.3
"""The same of mixtures in half precision: by rounding a token may be routed to other experts."""
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def check(model: nn.Module, config: ExportConfig) -> None:
    """InputError unless llama.cpp can compute `model` from weights of the type `config.quant`."""
    quant = find_quant(config.quant)
    found = layout(model, quant, config.pad)
    rope(model.config, found.architecture, found.head_dim)
    for entry in filter(lambda entry: entry.matrix, entries(model, found)):
        if (width := entry.shape[-1]) % quant.block:
            raise InputError(
                f"{entry.name} has rows of {width} values, and this --quant needs multiples of "
                f"{quant.block}; choose --quant f16"
            )
        if quant.name == "f16":
            check_f16(entry.name, entry.make())


def write(model: nn.Module, tokenizer: Any, path: Path, config: ExportConfig) -> dict[str, Any]:
    """Write `model` and `tokenizer` to the new file `path`. Raises InputError as `check`."""
    from gguf import GGUFWriter

    quant = find_quant(config.quant)
    found = layout(model, quant, config.pad)
    architecture = found.architecture
    scaling, factors = rope(model.config, architecture, found.head_dim)
    own = scaling | settings_of(model.config, architecture) | _sizes(model, found)
    settings = {f"{architecture.name}.{key}": value for key, value in own.items()}
    settings |= words(model, tokenizer)
    writer = GGUFWriter(path, architecture.name)
    _add_general(writer, quant, config)
    for key, value in settings.items():
        _add(writer, key, value)
    tensors = [*entries(model, found), *(whole(name, one) for name, one in factors.items())]
    _write_tensors(writer, tensors, quant)
    result: dict[str, Any] = {
        "bytes": size_of(path),
        "notes": [*found.notes(), *_window_notes(model.config, architecture)],
        "architecture": architecture.name,
        "quant": quant.name,
    }
    if config.read_back:
        result["logits_difference"] = _read_back(model, path, quant, found)
    return result


def _read_back(model: nn.Module, path: Path, quant: Quant, found: Layout) -> float:
    """How far the logits of the file are from those of `model`, relative to their size.

    Raises ReadBackError where they differ by more than rounding to the type explains.
    """
    header = read_header(path)
    if model.config.model_type.removeprefix(PRUNED_PREFIX) in MAPPED:
        read = read_weights(header)
    else:
        names = [entry.name for entry in named_entries(model, found)]
        read = read_like(header, model.config, names, list(found.layers))
    difference = logits_difference(model, read.to(model.dtype))
    dtype = str(model.dtype).removeprefix("torch.")
    allowed = max(TOLERANCES.get(name, QUANTISED) for name in (quant.name, SHORT[dtype]))
    if allowed > TOLERANCES["f32"] and any(size.experts for size in found.own.values()):
        allowed = max(allowed, ROUTED)
    if not difference <= allowed:
        raise ReadBackError(
            f"the file reads back as another model: logits differ by {difference:.1e} of their "
            f"size, more than {quant.name} explains ({allowed:g}); nothing was kept. This is a "
            "fault of fastprune: please report it with the model's config.json"
        )
    return difference


def _add_general(writer: Any, quant: Quant, config: ExportConfig) -> None:
    from gguf import GGML_QUANT_VERSION

    writer.add_string("fastprune.version", version("fastprune"))
    writer.add_name(Path(config.model).name.removesuffix(".gguf") or config.model)
    writer.add_file_type(quant.file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _sizes(model: nn.Module, found: Layout) -> dict[str, Any]:
    """The sizes of the model and of its layers, by name."""
    config, sizes = model.config, list(found.layers.values())
    lists = {
        "attention.head_count": [size.query_heads for size in sizes],
        "attention.head_count_kv": [size.kv_heads for size in sizes],
        "feed_forward_length": [size.channels for size in sizes],
    }
    named: dict[str, Any] = {
        "block_count": len(sizes),
        "context_length": _context(config, found.architecture),
        "embedding_length": config.hidden_size,
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "attention.key_length": found.head_dim,
        "attention.value_length": found.head_dim,
        **{name: values[0] if found.uniform else values for name, values in lists.items()},
    }
    if experts := sizes[0].experts:
        named |= {
            "expert_count": experts,
            "expert_used_count": min(config.num_experts_per_tok, experts),
            "expert_feed_forward_length": sizes[0].channels,
        }
    return named


def _window(config: Any, architecture: Architecture) -> int | None:
    """Tokens that a layer with a sliding window sees, if that is fewer than there are positions
    and `architecture` has no such layers."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or (kinds and "sliding_attention" not in kinds) or architecture.windowed:
        return None
    return window if window < config.max_position_embeddings else None


def _context(config: Any, architecture: Architecture) -> int:
    return _window(config, architecture) or config.max_position_embeddings


def _window_notes(config: Any, architecture: Architecture) -> list[str]:
    if (window := _window(config, architecture)) is None:
        return []
    return [
        f"the context is {window} tokens, not {config.max_position_embeddings}: llama.cpp computes "
        "no sliding window for this architecture, and within the window there is no difference"
    ]


def _add(writer: Any, key: str, value: Any) -> None:
    """Put a setting into the file, whatever its type. An empty list has none, and is left out."""
    if isinstance(value, list):
        if value:
            writer.add_array(key, value)
    elif key == "tokenizer.chat_template":
        named = value if isinstance(value, str) else _named(value)
        writer.add_chat_template(named)
    else:
        add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
        add.get(type(value), writer.add_uint32)(key, value)


def _named(templates: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


def _write_tensors(writer: Any, tensors: list[Entry], quant: Quant) -> None:
    """Sizes and places first, then one tensor after the other: only one is in memory twice."""
    import numpy as np
    from gguf import quant_shape_to_byte_shape

    kinds = [quant.of(matrix=entry.matrix, end=entry.end) for entry in tensors]
    for entry, kind in zip(tensors, kinds):
        size = int(np.prod(quant_shape_to_byte_shape(entry.shape, kind)))
        writer.add_tensor_info(entry.name, entry.shape, np.float32, size, raw_dtype=kind)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, kind in track(list(zip(tensors, kinds)), "writing the file"):
            writer.write_tensor_data(numbers(entry.make(), kind))
