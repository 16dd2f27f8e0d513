"""Tokens on the disk: written once, in shards, and read where they lie.

A store is a folder. `tokens-NNNNN.bin` hold token ids one after the other, in 16 bits where the
vocabulary allows and in 32 where not; `learnt-NNNNN.bin` a byte a token, 1 where it is learnt
(absent where all are); `index.npz` where each entry ends, how many of its tokens are learnt, and
which record it came from.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastprune.data.records import Record, place
from fastprune.errors import InputError

LAYOUT = 2  # raise when stores or what goes into them change, so that older ones are left alone
SHARD_TOKENS = {"text": 100_000_000, "instructions": 10_000_000, "chat": 10_000_000}
MAX_SHORT = 1 << 16  # ids below it fit 16 bits
HASH_BYTES = 1 << 20


class StoreWriter:
    """Writes a store into the folder `directory`, which must be new; a context manager."""

    def __init__(
        self, directory: Path, *, vocabulary: int, masked: bool, shard_tokens: int
    ) -> None:
        directory.mkdir()
        self._directory = directory
        self._dtype = np.dtype("<u2" if vocabulary <= MAX_SHORT else "<u4")
        self._masked = masked
        self._shard_tokens = shard_tokens
        self._files: list[BinaryIO] = []
        self._shards: list[int] = []
        self._ends, self._learnt, self._numbers = array("q", [0]), array("q"), array("q")
        self._sources: list[tuple[str, str, int]] = []
        self._open: list[int] = [0, 0]  # tokens and learnt ones of the entry being written

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close_files()
        if kind is None:
            np.savez(
                self._directory / "index.npz",
                ends=np.asarray(self._ends),
                learnt=np.asarray(self._learnt),
                numbers=np.asarray(self._numbers),
            )
            content = {
                "dtype": self._dtype.str,
                "masked": self._masked,
                "shards": self._shards,
                "sources": self._sources,
            }
            (self._directory / "store.json").write_text(json.dumps(content), encoding="utf-8")

    def add(self, ids: np.ndarray, learnt: np.ndarray | None, record: Record) -> None:
        """Append the tokens of `record`: ids (n,), learnt (n,) bool if the store is masked.

        A record that goes on in the next one (`more`) does not end the entry.
        """
        if not self._shards or self._shards[-1] >= self._shard_tokens:
            self._next_shard()
        self._files[0].write(ids.astype(self._dtype).tobytes())
        if self._masked:
            assert learnt is not None
            self._files[1].write(learnt.astype(np.uint8).tobytes())
        self._shards[-1] += len(ids)
        self._open[0] += len(ids)
        self._open[1] += len(ids) if learnt is None else int(np.count_nonzero(learnt))
        if not record.more:
            self._end_entry(record)

    def _end_entry(self, record: Record) -> None:
        if not self._sources or self._sources[-1][:2] != (record.source, record.unit):
            self._sources.append((record.source, record.unit, len(self._numbers)))
        self._numbers.append(record.number)
        self._ends.append(self._ends[-1] + self._open[0])
        self._learnt.append(self._open[1])
        self._open = [0, 0]

    def _next_shard(self) -> None:
        self._close_files()
        names = ("tokens", "learnt") if self._masked else ("tokens",)
        number = len(self._shards)
        self._files = [(self._directory / f"{n}-{number:05d}.bin").open("wb") for n in names]
        self._shards.append(0)

    def _close_files(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


@dataclass
class Store:
    """Reads a store. Its arrays are memory-mapped, and mapped anew in every process."""

    directory: Path
    _maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "_maps": {}}

    def __len__(self) -> int:
        """The number of entries: documents, or examples."""
        return len(self.ends) - 1

    @cached_property
    def _about(self) -> dict[str, Any]:
        return json.loads((self.directory / "store.json").read_text(encoding="utf-8"))

    @cached_property
    def _index(self) -> dict[str, np.ndarray]:
        with np.load(self.directory / "index.npz") as arrays:
            return dict(arrays)

    @cached_property
    def _starts(self) -> list[int]:
        """Where each shard begins in the whole."""
        return [0, *np.cumsum(self._about["shards"]).tolist()]

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    @property
    def ends(self) -> np.ndarray:
        """Where the entries lie: entry i is tokens [ends[i], ends[i + 1])."""
        return self._index["ends"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every entry."""
        return np.diff(self.ends)

    @property
    def learnt(self) -> np.ndarray:
        """Learnt tokens of every entry."""
        return self._index["learnt"]

    def where(self, entry: int) -> str:
        """The record an entry came from, as people read it."""
        sources = self._about["sources"]
        source, unit, _ = sources[bisect_right([first for *_, first in sources], entry) - 1]
        return place(source, unit, int(self._index["numbers"][entry]))

    def ids(self, start: int, end: int) -> np.ndarray:
        """Token ids [start, end) of the whole, as int64."""
        return self._read("tokens", self._about["dtype"], start, end).astype(np.int64)

    def mask(self, start: int, end: int) -> np.ndarray:
        """Whether each of the tokens [start, end) is learnt."""
        if not self._about["masked"]:
            return np.ones(end - start, dtype=bool)
        return self._read("learnt", "u1", start, end).astype(bool)

    def _read(self, name: str, dtype: str, start: int, end: int) -> np.ndarray:
        pieces = []
        shard = bisect_right(self._starts, start) - 1
        while start < end:
            first, last = self._starts[shard], min(end, self._starts[shard + 1])
            tokens = self._map(f"{name}-{shard:05d}.bin", dtype, self._about["shards"][shard])
            pieces.append(tokens[start - first : last - first])
            start, shard = last, shard + 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype)

    def _map(self, name: str, dtype: str, tokens: int) -> np.ndarray:
        """The `tokens` entries of a file. Raises InputError where they are not all there."""
        file = self.directory / name
        if name not in self._maps:
            if file.stat().st_size != tokens * np.dtype(dtype).itemsize:
                raise InputError(f"{file}: was cut short; remove {self.directory.parent}")
            self._maps[name] = np.memmap(file, dtype=dtype, mode="r")
        return self._maps[name]


def files_digest(files: Iterable[Path]) -> str:
    """A hash of the names and the content of `files`."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file}\0{inner}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of everything that decides what `tokenizer` makes of a text or a conversation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any]
    if backend is None:
        state = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    else:
        state = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # what the last call asked for
            state.pop(passing, None)
    state["class"] = type(tokenizer).__name__
    state["template"] = getattr(tokenizer, "chat_template", None)
    state["special"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
