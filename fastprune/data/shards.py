"""Token ids that other programs wrote: `.npy` arrays, and `.bin` files of nanoGPT and llm.c.

A `.bin` of nanoGPT is ids alone, in 16 or 32 bits; llm.c puts a header of 256 words of 32 bits
before them: a magic number, a version, how many ids there are. Which tokenizer made them no file
says: ids beyond the vocabulary of the one in use are refused, others are taken on trust.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastprune.errors import InputError

HEADER_WORDS = 256
MAGIC = {20240520: "<u2", 20240801: "<u4"}
"""The first word of a file of llm.c, and how its ids are written: GPT-2's, Llama 3's."""
WIDTHS = ("uint16", "uint32", "int32", "int64")
PIECE = 1 << 22
"""Ids read at a time."""


@dataclass(frozen=True)
class TokenShard:
    """The ids in one file, read where they lie."""

    path: Path

    def ids(self, tokenizer: Any, limit: int | None = None) -> np.ndarray:
        """The first `limit` ids, or all, int64 (n,). InputError for one beyond the vocabulary."""
        pieces = list(self.pieces(tokenizer, limit))
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def pieces(self, tokenizer: Any, limit: int | None = None) -> Iterator[np.ndarray]:
        """The same, some at a time."""
        rows = 1 + max(tokenizer.get_vocab().values())
        stored = self._stored(rows)[:limit]
        for start in range(0, len(stored), PIECE):
            ids = stored[start : start + PIECE].astype(np.int64)
            wrong = np.flatnonzero((ids < 0) | (ids >= rows))
            if len(wrong):
                raise InputError(
                    f"{self.path}: holds the token id {ids[wrong[0]]} (at {start + wrong[0]:,}), "
                    f"and the tokenizer has the ids 0 to {rows - 1}; give the tokenizer that made "
                    "it, or the text itself"
                )
            yield ids

    def _stored(self, rows: int) -> np.ndarray:
        """The ids as they are stored; `rows` ids are legal. Raises InputError."""
        if self.path.suffix.lower() == ".npy":
            return self._array
        size = self.path.stat().st_size
        word = np.fromfile(self.path, "<i4", count=1)
        if len(word) and int(word[0]) in MAGIC:
            return self._of_llm_c(MAGIC[int(word[0])], size)
        if size == 0 or size % 2:
            raise InputError(
                f"{self.path}: {size} bytes are not ids of 16 or 32 bits; copy or write it again"
            )
        if size % 4 == 0:
            wide = np.memmap(self.path, "<u4", mode="r")
            if int(wide[:PIECE].max()) < rows:  # ids of 16 bits, read in pairs, would be beyond
                return wide
        return np.memmap(self.path, "<u2", mode="r")

    def _of_llm_c(self, dtype: str, size: int) -> np.ndarray:
        header = np.fromfile(self.path, "<i4", count=HEADER_WORDS)
        here = max(0, size - header.itemsize * HEADER_WORDS) // np.dtype(dtype).itemsize
        if len(header) < HEADER_WORDS or here != header[2] or not here:
            count = f"{header[2]:,}" if len(header) > 2 else "some"
            raise InputError(
                f"{self.path}: holds {here:,} token ids, its header says {count}; copy it again"
            )
        return np.memmap(self.path, dtype, mode="r", offset=header.itemsize * HEADER_WORDS)

    @cached_property
    def _array(self) -> np.ndarray:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python
            raise InputError(
                f"{self.path}: not an array of numbers, or damaged; write it again by numpy.save"
            ) from error
        if array.ndim != 1 or array.dtype.name not in WIDTHS or not len(array):
            raise InputError(
                f"{self.path}: an array of shape {array.shape} and dtype {array.dtype}; token ids "
                f"stand in one dimension, as {', '.join(WIDTHS)}"
            )
        return array
