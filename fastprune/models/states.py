"""Weights alone in a `.pt` or `.bin` file, as training scripts write them.

Such a file holds a state dict, or `{"model": state dict}` with what else the script kept:
optimizer, step, val_loss, its own settings, states of random generators. It is read with
`weights_only=True`, so it can run no code; objects of the script's own classes become records of
their fields. The tokenizer, and the config of anything but a GPT-2, lie beside it.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.models.checkpoint import LAYER_KEY, rebuild, sized_config
from fastprune.models.checks import (
    check_complete,
    check_pointer,
    check_unquantised,
    check_values,
    refusal,
    without_wrappers,
)
from fastprune.models.families import is_supported
from fastprune.models.gpt2 import bare, build_gpt2, is_gpt2
from fastprune.models.inert import Record, fields_of, plain, read_inert
from fastprune.models.multimodal import is_multimodal
from fastprune.models.quiet import quiet_libraries
from fastprune.models.seq2seq import check_family
from fastprune.readers import read_json

STATES = ("model", "model_state_dict", "state_dict", "module")
"""Under which of these a training script keeps the weights."""
SETTINGS = ("config", "model_args", "model_config")
GPT2_VOCABULARY = 50257
RESIZED = "%s: its layers are not of the sizes in its config; sizes are read off the weights"

log = logging.getLogger("fastprune")


class NeedsPickle(Exception):
    """The file holds objects that can only be had by running their code."""


@dataclass(frozen=True)
class SavedState:
    """Weights by name, and what the script said of the model."""

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    optimizer: Any = None
    """what the script kept of its optimizer"""


def read_state(path: Path) -> SavedState:
    """What the file `path` holds. Raises InputError when it is broken or holds no weights.

    Raises NeedsPickle when reading it would mean to run code.
    """
    check_pointer(path)
    try:
        if zipfile.is_zipfile(path):
            content = read_inert(path)
        else:  # as torch wrote until 1.5
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "is blocked" in str(error):
            raise InputError(
                f"{path}: calls functions of the operating system when it is read, which no "
                "checkpoint needs; do not load it"
            ) from error
        raise NeedsPickle(_cause(error)) from error
    except Exception as error:  # as many kinds as there are ways to damage a file
        raise InputError(
            f"{path}: truncated or corrupt ({type(error).__name__}); copy it again"
        ) from error
    return state_of(path, content)


def state_of(path: Path, content: Any) -> SavedState:
    """The weights and settings in `content`, read from `path`. InputError when it has none.

    Raises NeedsPickle where it holds a whole model and its tokenizer as objects.
    """
    outer = fields_of(content)
    kept = [fields_of(outer[key]) for key in STATES if key in outer]
    if any("_modules" in fields for fields in (outer, *kept)):
        _refuse_module(path, outer)
    state = next((fields for fields in kept if fields), outer)
    weights = {
        key: value.detach().clone()  # the file may be overwritten while the model is used
        for key, given in state.items()
        if isinstance(key, str) and isinstance(value := _weight(given), Tensor)
    }
    if not weights:
        raise InputError(f"{path}: holds no weights, neither itself nor under {', '.join(STATES)}")
    check_values(weights, path)
    settings: dict[str, Any] = {}
    for key in SETTINGS:
        settings |= {str(k): plain(v) for k, v in fields_of(outer.get(key)).items()}
    steps = [f"{k} {plain(outer[k])}" for k in ("step", "iter_num", "val_loss") if k in outer]
    log.info("%s: %d tensors, %s", path, len(weights), ", ".join(steps) or "no step named")
    return SavedState(weights, settings, outer.get("optimizer"))


def _weight(value: Any) -> Any:
    return plain(value) if isinstance(value, Record) else value


def _refuse_module(path: Path, outer: Mapping[Any, Any]) -> None:
    """Raise for a model that was pickled as an object: only its own code can make it again."""
    if "model" in outer and "tokenizer" in outer:
        raise NeedsPickle("a model and a tokenizer as objects")
    raise InputError(
        f"{path}: holds a model as an object, not its weights; where its code is at hand, save "
        "model.state_dict() instead"
    )


def build(path: Path, saved: SavedState, tokenizer: Any) -> nn.Module:
    """The model that `saved`, read from `path`, describes. Raises InputError."""
    beside = _config_beside(path)
    if is_gpt2(saved.weights):
        return build_gpt2(saved.weights, beside | saved.settings, tokenizer, str(path))
    if "model_type" not in beside:
        raise InputError(
            f"{path}: not the weights of a GPT-2; put the config.json of its model beside it"
        )
    return _build_by_config(path, saved.weights)


def tokenizer_beside(path: Path, saved: SavedState) -> Any:
    """The tokenizer in the folder of `path`; for a GPT-2 also the hub's, where it was fetched once.

    Raises InputError that says what to put there.
    """
    from transformers import GPT2Tokenizer

    if (found := tokenizer_in(path.parent)) is not None:
        return found
    if is_gpt2(saved.weights) and _vocabulary(saved) >= GPT2_VOCABULARY:
        try:
            with quiet_libraries():
                return GPT2Tokenizer.from_pretrained("openai-community/gpt2", local_files_only=True)
        except Exception:  # not in the hub's cache: the message below says what to do
            log.info("GPT-2's tokenizer is not in the hub's cache either")
    raise InputError(
        f"{path}: no tokenizer beside it; name one with --tokenizer (a folder, or gpt2 on the "
        "hub), or copy its tokenizer.json, or vocab.json and merges.txt, into the same folder"
    )


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer whose files lie in `folder`, GPT-2's where they do not say; None without any.

    Raises InputError for broken files.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer

    try:
        with quiet_libraries():
            if (folder / "tokenizer_config.json").is_file():
                return AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
                return GPT2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise refusal(folder, "broken tokenizer", error) from error
    return None


def _vocabulary(saved: SavedState) -> int:
    return next(len(value) for key, value in saved.weights.items() if bare(key) == "wte.weight")


def _config_beside(path: Path) -> dict[str, Any]:
    file = path.with_name("config.json")
    if not file.is_file():
        return {}
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise InputError(f"{file}: broken config (not an object); copy it again")
    return settings


def _build_by_config(path: Path, weights: Mapping[str, Tensor]) -> nn.Module:
    from transformers import AutoConfig

    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(
                path.parent, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # a config may be wrong in as many ways as it has fields
        raise refusal(path.with_name("config.json"), "broken or unknown config", error) from error
    return build_by_config(path, config, without_wrappers(weights, path))


def build_by_config(path: Path, config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """The model that `config` describes with the weights `state`, read from `path`, in their dtype.

    Raises InputError when they do not go together.
    """
    check_family(config, str(path))
    check_unquantised(config, str(path))
    model, found = filled(path, config, state)
    if misfits(config, found):
        return resized(path, config, state)
    check_complete(found, path)
    return model


def filled(
    path: Path, config: Any, state: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of `config` with those of the weights `state` that fit, in their dtype.

    With it goes transformers' loading info. Raises InputError, naming `path`.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    classes = MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        classes = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    elif is_multimodal(config):
        classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    try:
        with quiet_libraries():
            return classes[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # unknown types, unreadable values
        raise refusal(path, "does not load", error) from error


def misfits(config: Any, found: Mapping[str, Any]) -> bool:
    """Whether the layers of a model that can be pruned have other sizes than `config` says."""
    return (
        is_supported(config)
        and not found["missing_keys"]
        and any(LAYER_KEY.match(name) for name, *_ in found["mismatched_keys"])
    )


def resized(path: Path, config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """The model of the family of `config` whose layers have the sizes of the weights `state`.

    Other pruners write such files, with the config of the model before. Raises InputError.
    """
    return _by_weights(path, rebuild, config, state)


def resized_config(path: Path, config: Any, shapes: Mapping[str, Any]) -> Any:
    """The config of the model that `resized` gives; `shapes` are tensors or the like of them."""
    return _by_weights(path, sized_config, config, shapes)


def _by_weights(path: Path, make: Callable[..., Any], config: Any, weights: Any) -> Any:
    """What `make` makes of the config and the sizes of `weights`, with a warning that it did."""
    try:
        result = make(config.to_dict(), weights)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    log.warning(RESIZED, path)
    return result


def _cause(error: BaseException) -> str:
    """What torch says was refused, out of its page of advice."""
    text = str(error)
    start = max(text.find("Unsupported "), text.find("Can only "))
    return text[start:].split(" was not an allowed", 1)[0].splitlines()[0] if start >= 0 else ""
