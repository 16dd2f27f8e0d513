"""The types of numbers in a `.gguf` file that the package `gguf` can write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import InputError

FINE = 8
"""Types with fewer bits a weight leave embedding and head in q8_0: they lose most by rounding."""
FILE_TYPES = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}
"""File types that are not called MOSTLY_ and the name of the weights' type."""
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Quant:
    """A type of weights: its number in `gguf`, and how many values share a block of it."""

    name: str
    type: Any
    file_type: Any
    block: int
    bits: float
    """for each value"""

    def of(self, *, matrix: bool, end: bool) -> Any:
        """The type of a tensor: vectors are f32, embedding and head at least q8_0."""
        from gguf import GGMLQuantizationType

        if not matrix:
            return GGMLQuantizationType.F32
        return GGMLQuantizationType.Q8_0 if end and self.bits < FINE else self.type


@cache
def quants() -> dict[str, Quant]:
    """What the installed `gguf` can quantise to, by the names `--quant` takes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
    from gguf.quants import quantize

    found = {}
    for kind in GGMLQuantizationType:
        name = kind.name.lower()
        file_type = FILE_TYPES.get(name, f"MOSTLY_{kind.name}")
        block, size = GGML_QUANT_SIZES[kind]
        if file_type not in LlamaFileType.__members__:
            continue
        try:
            quantize(np.zeros((1, block), dtype=np.float32), kind)
        except NotImplementedError:  # the package reads this type, but cannot write it
            continue
        found[name] = Quant(name, kind, LlamaFileType[file_type], block, 8 * size / block)
    return found


def find_quant(name: str) -> Quant:
    """The type called `name`. Raises InputError."""
    known = quants()
    if name.lower() not in known:
        raise InputError(f"--quant {name}: not one of {', '.join(known)}")
    return known[name.lower()]


def check_f16(name: str, weight: Tensor) -> None:
    """InputError where `weight` holds values that f16 has no number for."""
    if weight.abs().max().item() > LARGEST_F16:
        raise InputError(
            f"{name} holds values beyond {LARGEST_F16:g}, the largest of f16; choose --quant bf16"
        )


def numbers(weight: Tensor, kind: Any) -> np.ndarray[Any, Any]:
    """`weight` as the numbers of `kind` that a file holds."""
    from gguf.quants import quantize

    return quantize(weight.detach().to("cpu", torch.float32).contiguous().numpy(), kind)
