"""A model whose weights stay on disk: one decoder layer at a time is in memory.

The model is built on the meta device, where parameters have shapes and no values, so everything
that asks for sizes only (families, plans, checkpoint forms) works on it as on any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.config import resolve_device, resolve_dtype
from fastprune.models.checkpoint import EMBEDDING, HEAD
from fastprune.models.checks import check_complete, quantisation
from fastprune.models.dequantised import DequantisedShards, open_shards, unquantised
from fastprune.models.families import family_of_config
from fastprune.models.layers import FetchedLayers
from fastprune.models.load import load_config, load_tokenizer, named_tokenizer, resolve_source
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
    own. Raises InputError when the source is missing, incomplete or broken, of an unsupported
    family, or not in safetensors.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        tokenizer: str | None = None,
    ) -> None:
        folder = resolve_source(source)
        config = load_config(folder)
        family_of_config(config)
        self.shards = open_shards(folder, quantisation(config))
        config = unquantised(config)
        self.tokenizer = load_tokenizer(folder) if tokenizer is None else named_tokenizer(tokenizer)
        self.dtype = resolve_dtype(dtype) or _own_dtype(config, self.shards)
        if config.tie_word_embeddings and not _equal(self.shards, HEAD, EMBEDDING):
            config.tie_word_embeddings = False
        super().__init__(self._fitting(config), resolve_device(device))
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

    def _fitting(self, config: Any) -> nn.Module:
        """The model of ``config`` on the meta device, its layers of the sizes in the files.

        InputError unless the files hold every weight at its size.
        """
        model = skeleton(config, self.dtype)
        if isinstance(self.shards, DequantisedShards):
            self.shards.leave_zero_biases(model.state_dict())
        found = self._compared(model)
        if misfits(config, found):
            config = resized_config(self.shards.folder, config, self.shards.entries)
            model = skeleton(config, self.dtype)
            found = self._compared(model)
        check_complete(found, self.shards.folder)
        return model

    def _compared(self, model: nn.Module) -> dict[str, Any]:
        """How the files' weights differ from those of ``model``, as transformers' loading info."""
        expected, found = model.state_dict(), self.shards.entries
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
    """The dtype a checkpoint asks for: its config's, else that of its embeddings."""
    if config.dtype is not None:
        return config.dtype
    entry = shards.entries.get(EMBEDDING)
    return DTYPES.get(entry.dtype, torch.float32) if entry else torch.float32


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

    if (folder / "generation_config.json").is_file():
        with quiet_libraries():
            model.generation_config = GenerationConfig.from_pretrained(folder)
