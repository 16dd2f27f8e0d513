"""Writes checkpoints: Hugging Face folders with safetensors.

Layers of one size are written as a stock model that any engine loads. Layers of different sizes
are written with `per_layer_config` and the modelling file that reads it.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.models import modeling
from fastprune.models.adopted import adopted_config, is_known
from fastprune.models.checks import complaint
from fastprune.models.experts import published
from fastprune.models.families import (
    FAMILIES,
    LLAMA,
    PRUNED_PREFIX,
    SUPPORTED,
    Geometry,
    decoder_layers,
    family_of_config,
    geometries,
    is_adopted,
    is_supported,
)
from fastprune.models.multimodal import enclosing
from fastprune.models.portable import add_older_keys, write_generation_config
from fastprune.models.quiet import quiet_libraries
from fastprune.models.shards import ShardWriter
from fastprune.space import disk_trouble

UNIFORM = "--layout uniform"
CODE_FILE = "modeling_fastprune.py"
LAYER_KEY = re.compile(rf"{re.escape(LLAMA.layers)}\.(\d{{1,9}})\.(.*)")
HEAD, EMBEDDING = f"{LLAMA.head}.weight", f"{LLAMA.embeddings}.weight"
"""Names of the weights that checkpoints of every family in `modeling.STOCK` share."""

log = logging.getLogger("fastprune")


def save_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    directory: Path,
    write: Callable[[Form, Path], None] | None = None,
) -> None:
    """Write `model`, `tokenizer` and the generation settings into the folder `directory`.

    Sizes are read off the weights. A model whose layers all have one size, once those of which
    nothing is left are dropped, gets a stock config; any other gets a per-layer one. The dtype is
    kept, and tied embeddings are written once. `write` puts the weights of a form into a folder;
    give one when `model` has sizes but no values.
    """
    directory = Path(directory)
    settle_tie(model)
    with quiet_libraries():
        if around := enclosing(model):
            settle_enclosing(model)
            _save_as_it_is(around.model, directory)
        elif not is_supported(model.config):
            _save_as_it_is(model, directory)
        else:
            form = written_form(model)
            form.config.dtype = model.dtype
            form.config.save_pretrained(directory)
            (write or write_weights)(form, directory)
            if form.per_layer:
                shutil.copyfile(modeling.__file__, directory / CODE_FILE)
    save_surroundings(model, tokenizer, directory)


def settle_enclosing(model: nn.Module) -> None:
    """Make the multimodal model around `model`, if there is one, say what is left of its decoder.

    Raises InputError for layers that have no place in its stock class.
    """
    around = enclosing(model)
    if around is None:
        return
    config = around.model.config
    if is_known(model.config):
        form = written_form(model)
        if form.per_layer or len(form.layers) != len(decoder_layers(model)):
            raise InputError(one_size_only(model))
        form.config.dtype = model.dtype
        form.config._attn_implementation = model.config._attn_implementation
        config.text_config = form.config
    config.tie_word_embeddings = model.config.tie_word_embeddings
    around.model.to(model.dtype)


def one_size_only(model: nn.Module) -> str | None:
    """Why the layers of `model` must have one size to be written, as a sentence that says what to
    choose; None where they may differ."""
    around = enclosing(model)
    kind = model.config.model_type if around is None else around.model.config.model_type
    if around is None and not is_adopted(model.config):
        return None
    return f"a '{kind}' is written for its stock class, whose layers have one size; use {UNIFORM}"


def save_surroundings(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Write what lies beside config and weights into `directory`: generation settings, tokenizer,
    files of processors, and the keys that readers of transformers 4 look for.
    """
    with quiet_libraries():
        if getattr(model, "generation_config", None) is not None:
            write_generation_config(model.generation_config, directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    if around := enclosing(model):
        for name, content in around.files.items():
            (directory / name).write_bytes(content)
    add_older_keys(directory)


def check_savable(model: nn.Module, tokenizer: Any) -> None:
    """Raise InputError now if what surrounds the weights of `model` cannot be written later."""
    around = enclosing(model)
    config: Any = model.config if around is None else around.model.config
    with tempfile.TemporaryDirectory(prefix="fastprune-") as name, quiet_libraries():
        try:
            config.save_pretrained(name)
            if getattr(model, "generation_config", None) is not None:
                write_generation_config(model.generation_config, Path(name))
            if tokenizer is not None:
                tokenizer.save_pretrained(name)
            add_older_keys(Path(name))
        except Exception as error:  # validators and tokenizers raise whatever they like
            if (full := disk_trouble(error)) is not None:
                raise InputError(f"{name}: cannot be written: {full}") from error
            reason = " ".join(str(error).split())
            raise InputError(
                f"the model's config or tokenizer cannot be written again: {reason}; mend it "
                "in the model's folder first"
            ) from error


def settle_tie(model: nn.Module) -> None:
    """Make `config.tie_word_embeddings` of a causal model say what its weights are.

    They are tied when embedding and head are one tensor or have equal values. A config may say so
    of two matrices that differ: of a model whose vocabulary was extended, or whose head was trained
    by itself. Sizes without values are taken at the config's word.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.is_encoder_decoder or head is None or head.weight.is_meta:
        return
    own, other = head.weight, embedding.weight
    if own is other or own.data_ptr() == other.data_ptr():
        model.config.tie_word_embeddings = True
    elif model.config.tie_word_embeddings:
        equal = own.shape == other.shape and torch.equal(own.to(other), other)
        model.config.tie_word_embeddings = equal
        if not equal:
            log.info("embedding and head differ, although the config says tied: both are kept")


def _save_as_it_is(model: nn.Module, directory: Path) -> None:
    """By the library's own writer, which some releases keep from saving inconsistent settings."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(directory)
    finally:
        model.generation_config = own


@dataclass(frozen=True)
class Form:
    """How a model is written: its config, and its weights under the names that config implies.

    ``layers`` maps the number of a layer in the model to its number in the files. ``parts`` says
    that weights are parts of those of the model.
    """

    config: Any
    state: dict[str, Tensor]
    layers: dict[int, int]
    per_layer: bool
    parts: bool = False


def written_form(model: nn.Module) -> Form:
    """The form in which `model`, of a known type, is written: a stock one where there is one.

    Raises InputError for a model of an adopted type whose layers have no place in its stock class.
    """
    if is_adopted(model.config):
        return _adopted_form(model)
    return stock_form(model) or per_layer_form(model)


def _adopted_form(model: nn.Module) -> Form:
    sizes = geometries(model)
    config = adopted_config(model.config, sizes)
    config.architectures = [type(model).__name__]
    layers = {index: index for index in range(len(sizes))}
    return Form(config, _state(model, layers), layers, False)


def stock_form(model: nn.Module) -> Form | None:
    """`model` as a stock architecture, or None where no stock config describes it."""
    sizes = geometries(model)
    kept = [index for index, size in enumerate(sizes) if size.query_heads or size.channels]
    size = _common({sizes[index] for index in kept})
    family = None if size is None else _stock_family(model, size)
    if size is None or not size.query_heads or not size.channels or family is None:
        return None
    settings = model.config.to_dict()
    for key in ("per_layer_config", "model_type", "architectures", "auto_map"):
        settings.pop(key, None)
    for name in ("layer_types", "no_rope_layers"):
        if by_layer := settings.get(name):
            settings[name] = [by_layer[index] for index in kept]
    if family != model.config.model_type.removeprefix(PRUNED_PREFIX):
        for key in ("attention_bias", "mlp_bias", "pretraining_tp"):  # Llama's own
            settings.pop(key, None)
        settings["sliding_window"] = None
    settings |= {"num_hidden_layers": len(kept), "head_dim": size.head_dim}
    for index in kept:
        settings |= modeling.layer_settings(sizes[index], modeling.STOCK[family].experts)
    if "mlp_only_layers" in settings:  # of families whose layers may be dense or mixtures
        dense = [new for new, old in enumerate(kept) if not sizes[old].experts]
        settings |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    classes = modeling.family_classes(family)
    config = classes.config.__bases__[-1](**settings)
    config.architectures = [classes.causal_lm.__bases__[-1].__name__]
    layers = {old: new for new, old in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, tensor in _state(model, layers).items():
        state |= published(name, tensor, family)
    return Form(config, state, layers, False, parts=size.experts > 0)


def _common(sizes: Set[Geometry]) -> Geometry | None:
    """The size that a stock config has for layers of ``sizes``, of which those with experts may
    have an MLP of another size than the others; None where there is none."""
    if len(sizes) == 2 and sum(size.experts > 0 for size in sizes) == 1:
        first, second = sorted(sizes, key=lambda size: size.experts)
        same = replace(first, channels=second.channels, experts=second.experts) == second
        return second if same and first.channels else None
    return next(iter(sizes)) if len(sizes) == 1 else None


def per_layer_form(model: nn.Module) -> Form:
    """`model` as an architecture whose config holds the sizes of every layer."""
    sizes = geometries(model)
    config = modeling.per_layer_config(model.config, sizes)
    classes = modeling.family_classes(config.model_type.removeprefix(PRUNED_PREFIX))
    config.architectures = [classes.causal_lm.__name__]
    module = Path(CODE_FILE).stem
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config.auto_map = {
        auto: f"{module}.{own.__name__}" for auto, own in zip(autos, classes, strict=True)
    }
    layers = {index: index for index in range(len(sizes))}
    return Form(config, _state(model, layers), layers, True)


def rebuild(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The model that `settings`, the config of a model of a supported family, and `state` describe.

    Layer sizes are read off the weights, whatever the settings say. Raises InputError when weights
    are missing or the family is not supported.
    """
    family = str(settings.get("model_type", "")).removeprefix(PRUNED_PREFIX)
    if family not in SUPPORTED:
        raise InputError(f"model type '{family}' is not supported here")
    config = sized_config(settings, state)
    model_class = modeling.family_classes(family).causal_lm
    weights = {k: v for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}
    with quiet_libraries():
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=state.get(EMBEDDING, next(iter(state.values()))).dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if problem := complaint(found):
        raise InputError(problem)
    return model


def has_stock_form(model: nn.Module, size: Geometry) -> bool:
    """Whether a standard model can have layers of `size` and otherwise what `model` has."""
    if not is_adopted(model.config):
        return _stock_family(model, size) is not None
    try:
        adopted_config(model.config, [size] * len(decoder_layers(model)))
    except InputError:
        return False
    return True


def sized_config(settings: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    """The config of a model like that of `settings`, of a supported family, whose layers have the
    sizes of the tensors `state`. Only their shapes are looked at.

    Raises InputError for a model that is not supported, and when one layer has other query heads to
    a KV head than the rest: which of them share a KV head cannot be told then.
    """
    family = settings["model_type"].removeprefix(PRUNED_PREFIX)
    config_class = modeling.family_classes(family).config
    sizes = _sizes_of(settings, state)
    attentions = {i: s for i, s in enumerate(sizes) if s.query_heads or s.kv_heads}
    usual = mode([s.query_heads / max(1, s.kv_heads) for s in attentions.values()] or [1])
    for index, size in attentions.items():
        if size.query_heads != usual * size.kv_heads:
            raise InputError(
                f"layer {index} has {size.query_heads} query and {size.kv_heads} KV heads, other "
                f"layers {usual:g} query heads to a KV head; it was cut or copied wrongly"
            )
    bare = {k: v for k, v in settings.items() if k not in ("model_type", "per_layer_config")}
    config = config_class(**bare | {"num_hidden_layers": len(sizes)})
    family_of_config(config)
    return modeling.per_layer_config(config, sizes)


def _stock_family(model: nn.Module, size: Geometry) -> str | None:
    """The stock architecture for layers of `size`; Mistral's for a Llama that Llama's refuses.

    Some configs must have heads that divide the hidden size, or fill it. Mistral's need not, and
    computes the same as Llama's when there is no bias and no sliding window.
    """
    config = model.config
    family = config.model_type.removeprefix(PRUNED_PREFIX)
    stock = modeling.STOCK[family]
    if stock.full_heads or stock.all_heads:  # norms as wide as the hidden states, or projections
        return family if size.query_heads * size.head_dim == config.hidden_size else None
    divides = config.hidden_size % max(1, size.query_heads) == 0
    if divides or not modeling.STOCK[family].free_heads:
        return family
    plain = family == "llama" and not (config.attention_bias or config.mlp_bias)
    return "mistral" if plain else None


def _state(model: nn.Module, layers: Mapping[int, int]) -> dict[str, Tensor]:
    """The weights of `model`, its layers renumbered by `layers`; tied ones once."""
    state = {}
    for name, tensor in model.state_dict().items():
        if match := LAYER_KEY.fullmatch(name):
            name = f"{LLAMA.layers}.{layers[int(match[1])]}.{match[2]}"
        state[name] = tensor.contiguous()
    if model.config.tie_word_embeddings:
        state.pop(HEAD, None)
    return state


def write_weights(form: Form, directory: Path) -> None:
    """Write the weights of `form` as safetensors into `directory`, which has its config."""
    if form.parts:
        with ShardWriter(directory, form.state) as out:
            for name, tensor in form.state.items():
                out.write(name, tensor)
        return
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(form.state, directory, filename_pattern="model{suffix}.safetensors")
    for file in directory.glob("*.safetensors"):  # written for the owner alone
        shutil.copymode(directory / "config.json", file)


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in `folder`."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _sizes_of(settings: Mapping[str, Any], state: Mapping[str, Any]) -> list[Geometry]:
    matches = [match for name in state if (match := LAYER_KEY.fullmatch(name))]
    count = 1 + max((int(match[1]) for match in matches), default=-1)
    head_dim = settings.get("head_dim") or (
        settings["hidden_size"] // settings["num_attention_heads"]
    )
    family = FAMILIES[settings["model_type"].removeprefix(PRUNED_PREFIX)]

    def shape(index: int, path: str) -> tuple[int, int]:
        name = f"{family.layers}.{index}.{path}"
        weight = state.get(f"{name}.weight", state.get(name))
        return (0, 0) if weight is None else (weight.shape[0], weight.shape[-1])

    return [family.geometry(partial(shape, index), head_dim) for index in range(count)]
