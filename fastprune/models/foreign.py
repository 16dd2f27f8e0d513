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
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune.errors import InputError
from fastprune.files import is_sealed, seal
from fastprune.models.checkpoint import rebuild
from fastprune.models.quiet import quiet_libraries
from fastprune.output import sync_folder
from fastprune.progress import stage

LAYOUT = "2"  # raise when the conversion changes, so that older copies are left alone
UNFINISHED = "unfinished-"
STALE_SECONDS = 24 * 3600  # what takes longer than this to write has been killed

log = logging.getLogger("fastprune")


def cache_directory() -> Path:
    """Where converted checkpoints are kept: `fastprune` in the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fastprune"


def convert_gguf(path: Path) -> Path:
    """The Hugging Face folder (float32 weights, tokenizer) made from the `.gguf` file `path`."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
        file.seek(0)
        key = hashlib.file_digest(file, "sha256").hexdigest()[:32]

    def save(folder: Path) -> None:
        with stage(f"converting {path.name} (once)"):
            _save_dequantised(path, folder)

    return cached_folder(f"gguf-{LAYOUT}-{key}", save, digests=False)  # gigabytes, read each time


def cached_folder(
    name: str, write: Callable[[Path], None], root: Path | None = None, *, digests: bool = True
) -> Path:
    """The folder `name` in the cache, or in `root`; `write` fills it where it is not there yet.

    Whole or not at all, and safe against concurrent callers: each writes a folder of its own, and
    a rename decides. It is written anew where its files have other sizes than they had at first,
    or, with `digests`, other content.
    """
    target = (root or cache_directory()) / name
    if is_sealed(target, digests):
        return target
    if target.exists():
        log.warning("%s is damaged or of an earlier version; it is made anew", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    work = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target.parent))
    try:
        write(work)
        seal(work)
        sync_folder(work)
        if target.exists() and not is_sealed(target, digests):
            _remove_folder(target)
        try:
            work.rename(target)
        except OSError:  # another process was first: its folder is as good as ours
            if not is_sealed(target, digests):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def discard(folder: Path) -> bool:
    """Remove `folder` if it is a converted copy of ours; whether it was."""
    if folder.parent != cache_directory():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _remove_folder(folder: Path) -> None:
    """Remove `folder` in one step, as others see it."""
    aside = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    with suppress(FileNotFoundError):  # another process was first
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_stale(directory: Path) -> None:
    for leftover in directory.glob(f"{UNFINISHED}*"):
        if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _save_dequantised(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as reader

    # its progress bar does not listen to the library's own switch
    reader.tqdm = partial(reader.tqdm, disable=True)
    source, name = str(path.parent), path.name
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=name, dtype=torch.float32
            )
    except ImportError as error:
        raise InputError(f"{path}: reading it needs the package gguf: pip install gguf") from error
    except Exception as error:  # the reader raises whatever the damaged bytes lead to
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{path}: cannot be read: {reason[0] if reason else type(error).__name__}"
        ) from error
    strip_quantisation(model)
    with quiet_libraries():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


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


def read_pickled(path: Path) -> tuple[nn.Module, Any]:
    """The model and tokenizer in a pickled `{"model": ..., "tokenizer": ...}` file.

    Reading runs whatever code the file contains: the caller has asked the user. The model is built
    anew from the sizes of its weights, since a pickled module keeps the code of its own day.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
        model, tokenizer = content["model"], content["tokenizer"]
        settings, state = model.config.to_dict(), model.state_dict()
    except Exception as error:  # unpickling runs foreign code, which may raise anything
        raise InputError(
            f"{path}: cannot be read as a pickled model and tokenizer "
            f"({type(error).__name__}: {error})"
        ) from error
    try:
        return rebuild(settings, state), tokenizer
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
