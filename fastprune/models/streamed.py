"""A model whose weights stay on disk: one decoder layer at a time is in memory.

The model is built on the meta device, where parameters have shapes and no values, so everything
that asks for sizes only (families, plans, checkpoint forms) works on it as on any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.config import resolve_device, resolve_dtype
from fastprune.errors import InputError
from fastprune.models.adopted import adopt, check_known, is_known
from fastprune.models.checkpoint import EMBEDDING, HEAD
from fastprune.models.checks import check_complete, quantisation, refusal
from fastprune.models.dequantised import DequantisedShards, open_shards, unquantised
from fastprune.models.families import declared_for
from fastprune.models.layers import FetchedLayers
from fastprune.models.load import (
    STATE_SUFFIXES,
    load_config,
    load_tokenizer,
    named_tokenizer,
    resolve_source,
)
from fastprune.models.multimodal import is_multimodal
from fastprune.models.quiet import quiet_libraries
from fastprune.models.shards import DTYPES, ShardReader
from fastprune.models.skeleton import skeleton
from fastprune.models.states import misfits, resized_config

PIECE = 64 * 2**20
"""Bytes of two tensors that are compared at a time."""


class StreamedModel(FetchedLayers):
    """The causal language model that ``source`` names, read from its safetensors piece by piece.

    ``model`` is on the meta device but for its final norm and rotary embedding, which are small.
    ``device`` is where pieces are loaded to, ``tokenizer`` names one to use instead of its
    own, and ``family`` is the one that the layers of a type that is not declared are like. Raises
    InputError when the source is missing, incomplete or broken, of an unsupported family, or not in
    safetensors.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        tokenizer: str | None = None,
        family: str | None = None,
    ) -> None:
        folder = resolve_source(source)
        config, settings = _known_config(folder, family)
        if is_multimodal(config):
            raise InputError(
                f"--stream reads language models alone, and a '{config.model_type}' has more than "
                "a decoder; leave --stream out"
            )
        if (found := declared_for(config)) is not None and found.mixture is not None:
            raise InputError(
                f"{folder}: --stream reads a layer from its files as it is, and experts are put "
                "together on loading; prune a mixture of experts without --stream"
            )
        self.shards = open_shards(folder, settings)
        self.tokenizer = load_tokenizer(folder) if tokenizer is None else named_tokenizer(tokenizer)
        self.dtype = resolve_dtype(dtype) or _own_dtype(config, self.shards)
        if config.tie_word_embeddings and not _equal(self.shards, HEAD, EMBEDDING):
            config.tie_word_embeddings = False
        model = _fitting(config, self.shards, self.dtype)
        adopt(model, family)
        super().__init__(model, resolve_device(device))
        _read_generation_config(self.model, folder)
        _fill_buffers(self.model, self.device)
        norm = {
            name: self.read(f"{self.family.norm}.{name}") for name in self.final_norm.state_dict()
        }
        self.final_norm.load_state_dict(norm, assign=True)

    def fetch(self, name: str) -> Tensor:
        if name == HEAD and self.model.config.tie_word_embeddings:
            name = EMBEDDING
        return self.shards.read(name, self.dtype, self.device)

    def _sources(self) -> Iterator[tuple[str, Tensor | str]]:
        for file in self.shards.files:
            status = file.stat()
            yield str(file), f"{status.st_size} {status.st_mtime_ns}"
        yield "dtype", str(self.dtype)


def outline(source: str | Path, family: str | None = None) -> nn.Module | None:
    """The model that ``source`` names on the meta device, its layers of the sizes in its files.

    None where these are not in safetensors, or do not go together: then only loading the model
    tells what is wrong, if anything is. Raises InputError where there is no model at all.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in STATE_SUFFIXES:
        return None
    folder = resolve_source(source)
    config, settings = _known_config(folder, family)
    if is_multimodal(config):
        return None
    try:
        shards = open_shards(folder, settings)
        model = _fitting(config, shards, _own_dtype(config, shards))
    except InputError:
        return None
    adopt(model, family)
    return model


def _known_config(folder: Path, family: str | None) -> tuple[Any, Mapping[str, Any] | None]:
    """The config of ``folder``, of a type that is declared or is adopted as ``family``, and by what
    settings its weights are quantised, if they are. Raises InputError."""
    config = load_config(folder)
    settings = quantisation(config)
    if settings:
        config = unquantised(config)
    if family is not None or not is_known(config):
        check_known(skeleton(config, torch.float32), family)
    return config, settings


def _fitting(config: Any, shards: ShardReader, dtype: torch.dtype) -> nn.Module:
    """The model of ``config`` on the meta device, its layers of the sizes in the files.

    InputError unless the files hold every weight at its size.
    """
    model = skeleton(config, dtype)
    if isinstance(shards, DequantisedShards):
        shards.leave_zero_biases(model.state_dict())
    found = _compared(model, shards)
    if misfits(config, found):
        config = resized_config(shards.folder, config, shards.entries)
        model = skeleton(config, dtype)
        found = _compared(model, shards)
    check_complete(found, shards.folder)
    return model


def _compared(model: nn.Module, shards: ShardReader) -> dict[str, Any]:
    """How the files' weights differ from those of ``model``, as transformers' loading info."""
    expected, found = model.state_dict(), shards.entries
    if model.config.tie_word_embeddings:
        expected.pop(HEAD, None)
    return {
        "missing_keys": expected.keys() - found.keys(),
        "unexpected_keys": found.keys() - expected.keys() - {HEAD},
        "mismatched_keys": {
            (name, found[name].shape, tuple(expected[name].shape))
            for name in expected.keys() & found.keys()
            if found[name].shape != expected[name].shape
        },
    }


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Give the buffers of ``model``, which is on the meta device, their values on ``device``.

    They are rotary frequencies and factors of embeddings, which follow from the config.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    model.init_weights()  # weights are on the meta device, where this does nothing


def _own_dtype(config: Any, shards: ShardReader) -> torch.dtype:
    """The dtype a checkpoint asks for: its config's, else that of its embeddings, where these are
    not of twice the precision that is computed in."""
    if config.dtype is not None:
        return config.dtype
    entry = shards.entries.get(EMBEDDING)
    dtype = DTYPES.get(entry.dtype) if entry else None
    return torch.float32 if dtype in (None, torch.float64) else dtype


def _equal(shards: ShardReader, name: str, other: str) -> bool:
    """Whether ``name`` is not in the files, or has the values of ``other``."""
    if name not in shards.entries or other not in shards.entries:
        return True
    one, two = shards.entries[name], shards.entries[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    pairs = zip(shards.pieces(name, PIECE), shards.pieces(other, PIECE), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _read_generation_config(model: nn.Module, folder: Path) -> None:
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        with quiet_libraries():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # as many ways to be wrong as there are settings
        raise refusal(file, "broken generation settings", error) from error
