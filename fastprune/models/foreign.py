"""Checkpoints of other formats, turned into what the rest of the package reads.

A `.gguf` file takes transformers 14 s for 135 M parameters, most of it spent parsing the
vocabulary three times and building the table of tensor names anew for every module. It is
therefore converted once: the Hugging Face folder stays in the user's cache, under a key made of
the file's content, and later loads take about a second.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastprune.cache import cache_directory
from fastprune.errors import InputError
from fastprune.files import SEAL, is_sealed, seal
from fastprune.models.checkpoint import rebuild
from fastprune.models.checks import check_complete, check_pointer, reason, refusal, without_wrappers
from fastprune.models.gguf import (
    DECI,
    LESS_ONE,
    MAPPED,
    Header,
    check_tensors,
    check_uniform,
    complete_config,
    read_header,
)
from fastprune.models.gguf_file import copy_without_words
from fastprune.models.gguf_weights import read_state, read_weights
from fastprune.models.gguf_words import has_known_words, read_tokenizer
from fastprune.models.quiet import quiet_libraries
from fastprune.models.skeleton import skeleton
from fastprune.models.states import filled
from fastprune.output import replacing
from fastprune.progress import stage
from fastprune.space import check_space
from fastprune.workplace import claimed, remove_all_leftovers, remove_leftovers

LAYOUT = "4"  # raise when the conversion changes, so that older copies are left alone
FP32 = 4  # bytes of a number
ANOTHER_CACHE = "name another folder for it in the environment variable XDG_CACHE_HOME"

log = logging.getLogger("fastprune")


def convert_gguf(path: Path) -> Path:
    """The Hugging Face folder (float32 weights, tokenizer) made from the `.gguf` file `path`."""
    check_pointer(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file; copy or download it again")
        file.seek(0)
        key = hashlib.file_digest(file, "sha256").hexdigest()[:32]

    def save(folder: Path) -> None:
        with stage(f"converting {path.name} (once)"):
            _save_dequantised(path, folder)

    return cached_folder(f"gguf-{LAYOUT}-{key}", save, digests=False)  # gigabytes, read each time


def cached_folder(
    name: str,
    write: Callable[[Path], None],
    root: Path | None = None,
    *,
    digests: bool = True,
    size: float = 0,
) -> Path:
    """The folder `name` in the cache, or in `root`; `write` fills it where it is not there yet.

    Whole or not at all, and safe against concurrent callers: one writes it and the others wait. It
    is written anew where its files have other sizes than they had at first, or, with `digests`,
    other content. Raises InputError where the cache cannot be written, or has no room for about
    `size` bytes.
    """
    target = (root or cache_directory()) / name
    remove_leftovers(target)
    if is_sealed(target, digests):
        return target
    _check_cache(target.parent, size)
    remove_all_leftovers(target.parent)
    with claimed(target, wait=True) as claim:
        if is_sealed(target, digests):  # another process has just made it
            return target
        if target.exists():
            log.warning("%s is damaged or of an earlier version; it is made anew", target)
        with replacing(target, claim=claim) as fresh:
            write(fresh)
            seal(fresh)
    return target


def _check_cache(folder: Path, size: float) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; {ANOTHER_CACHE}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: the cache cannot be written; {ANOTHER_CACHE}")
    check_space(folder, size, "what is kept in the cache")


def discard(folder: Path) -> bool:
    """Remove `folder` if it is a copy that `convert_gguf` made; whether it was.

    Models that the user has put into the cache's folder are not.
    """
    ours = folder.name.startswith(f"gguf-{LAYOUT}-") and (folder / SEAL).is_file()
    if folder.parent != cache_directory() or not ours:
        return False
    with claimed(folder, wait=True):
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _save_dequantised(path: Path, folder: Path) -> None:
    from transformers import modeling_gguf_pytorch_utils as reader

    # its progress bar does not listen to the library's own switch
    reader.tqdm = partial(reader.tqdm, disable=True)
    try:
        with quiet_libraries():
            header = read_header(path)
            numbers = sum(tensor.numel for tensor in header.contents.tensors.values())
            check_space(cache_directory(), FP32 * numbers, f"{path.name} in float32")
            if header.architecture == DECI:
                model = read_weights(header)
            else:
                with tempfile.TemporaryDirectory(dir=folder) as aside:
                    model = _read_gguf(header, Path(aside) / path.name)
            tokenizer = _read_words(header, model.config)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path}: reading it needs the package gguf: pip install gguf") from error
    except Exception as error:  # the reader raises whatever the damaged bytes lead to
        raise refusal(path, "cannot be read", error) from error
    strip_quantisation(model)
    with quiet_libraries():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _read_words(header: Header, config: Any) -> Any:
    """The tokenizer in the file of `header`, whose model has the given config."""
    from transformers import TOKENIZER_MAPPING, AutoTokenizer

    path = header.path
    if has_known_words(header.words):
        return read_tokenizer(header.words)
    if header.words.get("tokenizer.ggml.model") == "gpt2":
        log.warning(
            "%s: its tokenizer is read with GPT-2's rules, those of %s are not known: "
            "some texts may become other tokens",
            path,
            header.words.get("tokenizer.ggml.pre"),
        )
    # the class by itself reads the file once; AutoTokenizer asks the file for the config, again
    family = TOKENIZER_MAPPING.get(type(config), AutoTokenizer)
    return family.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)


def _read_gguf(header: Header, copy: Path) -> nn.Module:
    """The model in the file of `header`, in float32; InputError unless every tensor is used.

    What transformers reads of the file, it reads of a `copy` without vocabulary, to be written.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_uniform(header)
    ours = header.architecture in (*MAPPED, *LESS_ONE)
    copy_without_words(header.path, header.contents, copy, tensors=not ours)
    try:
        config = AutoConfig.from_pretrained(str(copy.parent), gguf_file=copy.name)
    except KeyError:  # of some families the config is made from the vocabulary itself
        copy = header.path
        config = AutoConfig.from_pretrained(str(copy.parent), gguf_file=copy.name)
    config = complete_config(config, header)
    if ours:
        names = skeleton(config, torch.float32).state_dict()
        model, found = filled(header.path, config, read_state(header, config, names))
    else:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(copy.parent),
            gguf_file=copy.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_complete(found, header.path)
    check_tensors(header, config, model.state_dict())
    return model


def strip_quantisation(model: nn.Module) -> None:
    """Take away the marks that say `model` is quantised, once its weights are not."""
    for holder, mark in (
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model, "hf_quantizer"),
    ):
        holder.__dict__.pop(mark, None)


class _Unknown(nn.Module):
    """An object of a class that cannot be imported here: its fields, and its weights if any."""

    def __new__(cls, *_: Any, **__: Any) -> _Unknown:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take any arguments; what the object was follows in its state."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of what was a mapping are its fields."""
        self.__dict__[str(key)] = value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name.rpartition(".")[2], (_Unknown,), {"__module__": module})


def _lenient_pickle() -> ModuleType:
    """The module pickle, but for classes that cannot be imported."""
    module = ModuleType("lenient_pickle")
    vars(module).update(vars(pickle), Unpickler=_Unpickler, __name__="lenient_pickle")
    return module


def unpickle(path: Path) -> Any:
    """What the pickled file `path` holds; an object of a class that is not installed as its fields.

    Reading runs whatever code the file contains: the caller has asked the user.
    """
    try:
        return torch.load(
            path, map_location="cpu", weights_only=False, pickle_module=_lenient_pickle()
        )
    except Exception as error:  # unpickling runs foreign code, which may raise anything
        raise InputError(
            f"{path}: cannot be read as a pickled file ({type(error).__name__}: {reason(error)})"
        ) from error


def holds_model(content: Any) -> bool:
    """Whether `content`, of a pickled file, is a `{"model": ..., "tokenizer": ...}` of objects."""
    return isinstance(content, Mapping) and isinstance(content.get("model"), nn.Module)


def revive(path: Path, content: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The model and tokenizer in `content`, of the pickled file `path`.

    The model is built anew from the sizes of its weights, since a pickled module keeps the code of
    its own day.
    """
    try:
        model, tokenizer = content["model"], content["tokenizer"]
        settings, state = model.config.to_dict(), without_wrappers(model.state_dict(), path)
    except Exception as error:  # code of another day, which may raise anything
        raise InputError(
            f"{path}: cannot be read as a pickled model and tokenizer "
            f"({type(error).__name__}: {reason(error)})"
        ) from error
    try:
        return rebuild(settings, state), tokenizer
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
