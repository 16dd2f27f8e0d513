"""Objects in a pickled file as plain records: what they were made of, none of their code.

torch's own reader of weights knows a short list of harmless classes and functions. Every other name
in the file stands here for a `Record`, so whatever is called while the file is read is either on
that list or does nothing but keep its arguments. Nothing is imported.

That reader knows pickle's protocol 2 and mappings of its own alone. A file of a later protocol, or
with a dictionary of the script's own class, is read by `Reader`, whose list is shorter still.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
BLOCKED = ("os", "posix", "nt", "sys")
"""Modules whose functions no checkpoint needs; torch's reader refuses them too."""
NUMBERS = "biuf"
"""Kinds of NumPy's dtypes that become numbers again."""


class Record:
    """An object of a class that was not imported. `made_by` is the name in the file.

    The entries of a mapping are among its `fields`, those of a list in `items`.
    """

    made_by = ""
    arguments: tuple[Any, ...]
    fields: dict[Any, Any]
    items: list[Any]
    state: Any

    def __new__(cls, *arguments: Any, **named: Any) -> Record:
        record = super().__new__(cls)
        record.arguments, record.fields, record.state = arguments, dict(named), None
        record.items = []
        return record

    def __init__(self, *_: Any, **__: Any) -> None:
        """All there is to keep is kept by `__new__`, which is called alone for most objects."""

    def __setstate__(self, state: Any) -> None:
        """Keep the fields; those of a class with slots come as the second of a pair."""
        self.state = state
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, Mapping):
                self.fields.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.fields[key] = value

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.items.extend(items)


def read_inert(path: Path) -> Any:
    """What the file `path` of torch.save holds, with records for objects of unknown classes.

    Raises whatever damaged bytes lead to; pickle.UnpicklingError for what cannot be read so.
    """
    try:
        return _read_weights(path)
    except pickle.UnpicklingError as error:
        if "is blocked" in str(error):
            raise
        with zipfile.ZipFile(path) as archive:
            return Reader(archive).load()


def _read_weights(path: Path) -> Any:
    """`read_inert` by torch's own reader."""
    names = get_unsafe_globals_in_checkpoint(str(path))
    classes = [(type("Record", (Record,), {"made_by": name}), name) for name in names]
    with safe_globals(classes):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class Reader(pickle.Unpickler):
    """Reads the file of torch.save that is open as `archive`: tensors, plain containers, records.

    Every class and function that the file names is made here, or made for it, so that what the
    file does to them harms nothing.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1)
        stream = archive.read(name)
        _check_memo(stream)
        super().__init__(io.BytesIO(stream), encoding="latin1")
        self._archive, self._folder = archive, name.removesuffix("data.pkl")
        self._storages: dict[str, torch.Tensor] = {}
        self._known: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": lambda items=(): set(items),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes in protocol 2
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        """A harmless stand-in for what the file calls so."""
        if module in BLOCKED:
            raise pickle.UnpicklingError(f"{module}.{name} is blocked")
        full = f"{module}.{name}"
        made = type("Record", (Record,), {"made_by": full})
        return self._known.setdefault(full, made)

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """The flat tensor over a storage, which the file names by its type and key."""
        kind, storage, key, _, count = pid
        dtype = STORAGES.get(getattr(storage, "made_by", ""))
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise pickle.UnpicklingError("not a storage of numbers")
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if len(flat) != count:
                raise pickle.UnpicklingError(f"{count} numbers expected, {len(flat)} there")
            self._storages[key] = flat
        return self._storages[key]


STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
"""Types of storages by their names in a file."""


def _tensor(flat: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    return flat.as_strided(tuple(size), tuple(stride), offset)


def _check_memo(stream: bytes) -> None:
    """Refuse a `stream` that numbers more objects than it can hold: each number takes memory."""
    for code, argument, _ in pickletools.genops(stream):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(stream):
            raise pickle.UnpicklingError("more objects than bytes")


def fields_of(value: Any) -> Mapping[Any, Any]:
    """The entries of a mapping, or the fields of an object; none for anything else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Record):
        return value.fields
    return getattr(value, "__dict__", {})


def plain(value: Any) -> Any:
    """`value`, or the number or array that it is where NumPy or torch made one of it.

    An array comes as a tensor. What is neither stays as it is.
    """
    try:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value.item()
        if isinstance(value, Record) and value.made_by in SCALAR:
            dtype, raw = value.arguments
            return np.frombuffer(raw, _dtype(dtype), count=1)[0].item()
        if isinstance(value, Record) and value.made_by in ARRAY:
            _, shape, dtype, by_columns, raw = value.state
            flat = np.frombuffer(raw, _dtype(dtype))
            array = flat.reshape(shape, order="F" if by_columns else "C")
            native = array.dtype.newbyteorder("=")
            return torch.from_numpy(array.astype(native, order="C"))
    except (TypeError, ValueError):  # not what NumPy writes
        return value
    return value


def _dtype(record: Record) -> np.dtype:
    """The dtype that NumPy wrote as `record`. Raises TypeError for anything but numbers."""
    if not isinstance(record, Record) or record.made_by != "numpy.dtype":
        raise TypeError("not a dtype")
    dtype = np.dtype(str(record.arguments[0]))
    if dtype.kind not in NUMBERS:
        raise TypeError("not a number")
    return dtype.newbyteorder(record.state[1])
