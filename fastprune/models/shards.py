"""Safetensors files one tensor at a time, through ordinary reads and writes.

The safetensors library maps a whole file into memory, and a mapped page that was touched counts as
resident: a model larger than the memory it may use cannot be read that way. Here a tensor is read
into memory of its own, which is gone with the tensor, and is written to its final place in a file
whose size is known beforehand.

Format: https://huggingface.co/docs/safetensors (an 8-byte little-endian length, a JSON header of
that length with dtype, shape and byte range of every tensor, then the bytes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.models.checks import check_dtype, check_pointer, inside, unscaled, without_wrappers
from fastprune.readers import parse_json, read_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""Size beyond which a further file is begun, as huggingface_hub has it."""
MAX_HEADER_BYTES = 10**8
"""The format's own limit."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
PACKED = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""What weights are made of where they are quantised; by itself none of it is a weight."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``start`` and ``stop`` are byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class ShardReader:
    """The tensors of a folder's ``model.safetensors``, or of the files its index names.

    Names are without what wrappers of the model put into them. Only headers are read now; nothing
    stays open. Raises InputError when a file is missing or
    damaged, or the folder holds weights of another kind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            check_pointer(file)
            try:
                self.entries |= without_wrappers(_entries(file), file)
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise InputError(
                    f"{file}: truncated or corrupt weight file ({error}); copy or download it again"
                ) from error

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor ``name`` as ``dtype`` on ``device``. Raises InputError if it is not there."""
        return whole(self._entry(name)).to(device, dtype)

    def pieces(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The tensor ``name`` in runs of rows of at most ``max_bytes`` each, at least a row.

        Each piece has memory of its own, on the CPU, in the dtype of the file. Raises InputError
        if the tensor is not there.
        """
        entry = self._entry(name)
        size = entry.stop - entry.start
        if size <= max_bytes or not entry.shape:
            yield whole(entry)
            return
        row = size // entry.shape[0]
        rows = max(1, max_bytes // row)
        for first in range(0, entry.shape[0], rows):
            stop = min(first + rows, entry.shape[0])
            yield _read(entry, first * row, stop * row).view(stop - first, *entry.shape[1:])

    def check_floats(self) -> None:
        """InputError where a weight is stored in numbers that mean nothing without a scale."""
        for name, entry in self.entries.items():
            if entry.dtype not in DTYPES:
                check_dtype(name, entry.dtype, entry.file)

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise InputError(
                f"{self.folder}: the weight {name} is missing; copy or download the model again"
            )
        if entry.dtype not in DTYPES:
            raise unscaled(name, entry.dtype, entry.file)
        return entry


class ShardWriter:
    """Writes tensors, in any order, to the files of a checkpoint in ``directory``.

    ``layout`` names every tensor with its shape and dtype (its values are not looked at, so it may
    lie on the meta device). Use as a context manager; leaving it without an error checks that
    every tensor was written.
    """

    def __init__(
        self, directory: Path, layout: Mapping[str, Tensor], max_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.entries: dict[str, Entry] = {}
        shards = list(_split(layout, max_bytes))
        for number, names in enumerate(shards, 1):
            one = len(shards) == 1
            file = FILE if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self.entries |= _begin(directory / file, {name: layout[name] for name in names})
        if len(shards) > 1:
            total = sum(entry.stop - entry.start for entry in self.entries.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: entry.file.name for name, entry in self.entries.items()},
            }
            text = json.dumps(index, indent=2) + "\n"
            (directory / INDEX).write_text(text, encoding="utf-8")
        self._missing = set(self.entries)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` where ``name`` belongs; ValueError when the layout says otherwise."""
        entry = self.entries[name]
        if NAMES[tensor.dtype] != entry.dtype or tensor.shape != entry.shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} {entry.shape}"
            )
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        with entry.file.open("r+b") as file:
            file.seek(entry.start)
            file.write(data)
        self._missing.discard(name)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written: {min(self._missing)}")


def whole(entry: Entry) -> Tensor:
    """The tensor at ``entry`` as it is stored, on the CPU."""
    return _read(entry, 0, entry.stop - entry.start).view(entry.shape)


def _read(entry: Entry, start: int, stop: int) -> Tensor:
    """The values in the bytes ``start`` to ``stop`` of the tensor at ``entry``, in a row."""
    data = torch.empty(stop - start, dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start + start)
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise InputError(
                    f"{entry.file}: became shorter while it was read; leave the model unchanged "
                    "during a run"
                )
            done += got
    return data.view((DTYPES | PACKED)[entry.dtype])


def _files(folder: Path) -> list[Path]:
    if (folder / FILE).is_file():
        return [folder / FILE]
    index = folder / INDEX
    if not index.is_file():
        raise InputError(
            f"{folder}: no weights in safetensors (model.safetensors), from which models are "
            "streamed and quantised ones read; save the model again with save_pretrained"
        )
    return listed_files(index)


def listed_files(index: Path) -> list[Path]:
    """The weight files that `index` lists, which lie beside it, sorted. InputError if broken."""
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name for name in names):
        raise InputError(f"{index}: broken index of weight files; copy or download it again")
    return [inside(index.parent, name, index) for name in sorted(set(names))]


def _entries(file: Path) -> dict[str, Entry]:
    """The header of ``file``; ValueError and its like when it does not describe the file."""
    size = file.stat().st_size
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("its header is too long")
        header: dict[str, Any] = parse_json(data.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        if not all(type(n) is int and n >= 0 for n in (*tensor["shape"], *tensor["data_offsets"])):
            raise ValueError(f"{name} has a shape or a place that is none")
        if not isinstance(tensor["dtype"], str):
            raise ValueError(f"{name} has a dtype that is none")
        start, stop = (8 + length + offset for offset in tensor["data_offsets"])
        entry = Entry(file, tensor["dtype"], tuple(tensor["shape"]), start, stop)
        dtype = (DTYPES | PACKED).get(entry.dtype)
        if dtype and math.prod(entry.shape) * dtype.itemsize != stop - start:
            raise ValueError(f"{name} has the wrong number of bytes")
        if not 8 + length <= start <= stop <= size:
            raise ValueError(f"{name} lies beyond its end")
        found[name] = entry
    return found


def _split(layout: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, tensor in layout.items():
        size = tensor.numel() * tensor.element_size()
        if names and total + size > max_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _begin(file: Path, layout: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Write the header of ``file`` and give the file its full size."""
    header, end = _header(layout)
    with file.open("wb") as data:
        data.write(len(header).to_bytes(8, "little") + header)
        os.truncate(data.fileno(), 8 + len(header) + end)
    return _entries(file)


def _header(layout: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """The header of a file with the tensors of ``layout``, and the bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in layout.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), end  # tensors begin at multiples of 8 bytes


def stored_bytes(layout: Mapping[str, Tensor], max_bytes: int = MAX_SHARD_BYTES) -> int:
    """Bytes of the files that hold ``layout``, headers included; values are not looked at.

    The index beside several files is not counted.
    """
    total = 0
    for names in _split(layout, max_bytes):
        header, end = _header({name: layout[name] for name in sorted(names)})
        total += 8 + len(header) + end
    return total
