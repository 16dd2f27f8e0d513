"""The bytes of a `.gguf` file: its settings, its table of tensors, and a copy without vocabulary.

The reader in the package gguf makes several arrays for each word of a vocabulary, and transformers
opens a file with it several times: with 262,144 words each time takes half a minute. Here a
vocabulary is read once, and what does not need it is given a copy that holds none.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian: magic, version,
numbers of tensors and settings, the settings, the table of tensors, then the aligned tensors).
"""

from __future__ import annotations

import math
import mmap
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.models.gguf_blocks import BLOCKS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT, DEFAULT_ALIGNMENT = "general.alignment", 32
ARCHITECTURE = "general.architecture"
WORDS = "tokenizer.ggml."
TOKENS = f"{WORDS}tokens"
VOCABULARY = "vocab_size"
UINT32, STRING, ARRAY = 4, 8, 9
NUMBERS = {
    **dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))),
    **dict(enumerate(("<u8", "<i8", "<f8"), start=10)),
}
"""The types of numbers in settings, as numpy's."""
CACHED = 2**17
"""Values that are dequantised at a time: they and what is computed on the way fit the cache."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of tensors that hold values by themselves, not blocks of them."""
COPIED = 16 * 2**20
"""Bytes of a file that are copied at a time."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: ``shape`` in torch's order, ``type`` by GGML's numbers, ``start`` in
    bytes from the beginning of the file."""

    shape: tuple[int, ...]
    type: int
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """What lies before the tensors of a file, and where.

    ``settings`` are values by their whole names, ``places`` the bytes they take, name and type
    included; ``table`` the bytes of the table of tensors, ``data`` the first byte behind it that
    belongs to a tensor.
    """

    version: int
    settings: dict[str, Any]
    places: dict[str, slice]
    tensors: dict[str, Stored]
    table: slice
    data: int


class _Cursor:
    """Reads one value after the other; ValueError where the file ends within one."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        start, self.place = self.place, self.place + size
        if self.place > len(self.data):
            raise ValueError("it ends within its settings")
        return self.data[start : self.place]

    def number(self, format: str) -> int:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.numbers(kind, 1)[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"it has a setting of the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in NUMBERS:
            return self.numbers(inner, count)
        return [self.value(inner) for _ in range(count)]

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def read_contents(path: Path) -> Contents:
    """What the file `path` holds before its tensors.

    Raises InputError for a file of another version or byte order, and ValueError or its like where
    it is damaged.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        if cursor.take(len(MAGIC)) != MAGIC:
            raise InputError(f"{path}: not a GGUF file; copy or download it again")
        version = cursor.number("<I")
        if version not in VERSIONS:
            if version == 1 or version & 0xFFFF == 0:
                raise InputError(
                    f"{path}: a GGUF file that is big-endian or of version 1, which are not read; "
                    "make it anew with llama.cpp's own converter"
                )
            raise ValueError(f"a GGUF file of the unknown version {version}")
        tensors, settings = cursor.number("<Q"), cursor.number("<Q")
        return _contents(cursor, version, tensors, settings)


def _contents(cursor: _Cursor, version: int, tensors: int, settings: int) -> Contents:
    values: dict[str, Any] = {}
    places: dict[str, slice] = {}
    for _ in range(settings):
        start, name = cursor.place, cursor.string()
        if name in values:
            raise ValueError(f"it has the setting {name} twice")
        values[name] = cursor.value(cursor.number("<I"))
        places[name] = slice(start, cursor.place)
    start = cursor.place
    table = [_entry(cursor) for _ in range(tensors)]
    data = _aligned(cursor.place, values.get(ALIGNMENT, DEFAULT_ALIGNMENT))
    stored = {name: Stored(shape, kind, data + offset) for name, shape, kind, offset in table}
    if len(stored) != len(table):
        raise ValueError("it has two tensors of the same name")
    return Contents(version, values, places, stored, slice(start, cursor.place), data)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    shape = [cursor.number("<Q") for _ in range(cursor.number("<I"))]
    return name, tuple(reversed(shape)), cursor.number("<I"), cursor.number("<Q")


def _aligned(place: int, alignment: int) -> int:
    if alignment < 1:
        raise ValueError(f"its {ALIGNMENT} is {alignment}")
    return -(-place // alignment) * alignment


def read_tensor(path: Path, stored: Stored) -> Tensor:
    """The values of the tensor `stored` of the file `path`, in float32, bit for bit gguf's own.

    Raises ValueError for a type that gguf cannot dequantise, and where the file ends before the
    tensor does.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(stored.type)
    block, size = GGML_QUANT_SIZES[kind]
    count, rest = divmod(stored.numel, block)
    with path.open("rb") as file:
        file.seek(stored.start)
        packed = torch.from_numpy(np.fromfile(file, np.uint8, count * size))
    if rest or len(packed) != count * size:
        raise ValueError("it ends before its last tensor does")
    values = torch.empty(count, block)
    run = max(1, CACHED // block)
    for blocks, result in zip(packed.view(count, size).split(run), values.split(run)):
        result.copy_(_dequantised(blocks, kind))
    return values.view(stored.shape)


def _dequantised(blocks: Tensor, kind: Any) -> Tensor:
    """The values (n, block) in the bytes (n, size) of blocks of the type `kind`."""
    from gguf.quants import dequantize

    if kind.name in PLAIN:
        return blocks.view(PLAIN[kind.name])
    if kind.name in BLOCKS:
        return BLOCKS[kind.name](blocks)
    try:
        return torch.from_numpy(dequantize(blocks.numpy(), kind))
    except NotImplementedError as error:  # the package knows the type by name only
        raise ValueError(f"gguf does not dequantise the type {kind.name}") from error


def copy_without_words(path: Path, contents: Contents, target: Path, *, tensors: bool) -> None:
    """Write the file `path`, which holds `contents`, to `target`, without its tokenizer's lists.

    How many words there are is kept as the architecture's ``vocab_size``. Without `tensors`, zeros
    that take no room on the disk stand in their place.
    """
    settings = contents.settings
    lists = {name for name, value in settings.items() if _is_word_list(name, value)}
    size = f"{settings[ARCHITECTURE]}.{VOCABULARY}"
    added = b""
    if TOKENS in lists and size not in settings:
        name = size.encode()
        added = struct.pack("<Q", len(name)) + name
        added += struct.pack("<II", UINT32, len(settings[TOKENS]))
    count = len(settings) - len(lists) + bool(added)
    with path.open("rb") as source, target.open("wb") as copy:
        copy.write(MAGIC + struct.pack("<IQQ", contents.version, len(contents.tensors), count))
        kept = [place for name, place in contents.places.items() if name not in lists]
        for place in kept:
            copy.write(_bytes(source, place))
        copy.write(added + _bytes(source, contents.table))
        alignment = settings.get(ALIGNMENT, DEFAULT_ALIGNMENT)
        copy.write(bytes(_aligned(copy.tell(), alignment) - copy.tell()))
        if tensors:
            source.seek(contents.data)
            shutil.copyfileobj(source, copy, COPIED)
        else:
            copy.truncate(copy.tell() + path.stat().st_size - contents.data)


def _is_word_list(name: str, value: Any) -> bool:
    return name.startswith(WORDS) and isinstance(value, list)


def _bytes(source: Any, place: slice) -> bytes:
    source.seek(place.start)
    return source.read(place.stop - place.start)
