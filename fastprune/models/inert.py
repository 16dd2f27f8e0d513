"""Objects in a pickled file as plain records: what they were made of, none of their code.

torch's own reader of weights knows a short list of harmless classes and functions. Every other name
in the file stands here for a `Record`, so whatever is called while the file is read is either on
that list or does nothing but keep its arguments. Nothing is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
NUMBERS = "biuf"
"""Kinds of NumPy's dtypes that become numbers again."""


class Record:
    """An object of a class that was not imported. `made_by` is the name in the file."""

    made_by = ""
    arguments: tuple[Any, ...]
    fields: dict[str, Any]
    state: Any

    def __new__(cls, *arguments: Any, **named: Any) -> Record:
        record = super().__new__(cls)
        record.arguments, record.fields, record.state = arguments, dict(named), None
        return record

    def __init__(self, *_: Any, **__: Any) -> None:
        """All there is to keep is kept by `__new__`, which is called alone for most objects."""

    def __setstate__(self, state: Any) -> None:
        """Keep the fields; those of a class with slots come as the second of a pair."""
        self.state = state
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, Mapping):
                self.fields.update(part)


def read_inert(path: Path) -> Any:
    """What the file `path` of torch.save holds, with records for objects of unknown classes.

    Raises whatever damaged bytes lead to; pickle.UnpicklingError for what cannot be read so.
    """
    names = get_unsafe_globals_in_checkpoint(str(path))
    classes = [(type("Record", (Record,), {"made_by": name}), name) for name in names]
    with safe_globals(classes):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


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
