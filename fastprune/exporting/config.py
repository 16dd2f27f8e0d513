"""The settings of the `export` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastprune.config import Group, Positional, TrustingConfig
from fastprune.errors import InputError
from fastprune.exporting.formats import FORMATS, Format, find


@dataclass(kw_only=True)
class ExportConfig(TrustingConfig):
    """Write a model in the forms that other engines load.

    An adapter is merged into its model first. Nothing is written unless the model can have every
    form that was asked for. For example:
        fastprune export small --format gguf --quant q8_0 --out small.gguf
        fastprune export small --format hf-uniform,nemotron-nas --pad --out forms
    """

    model: Positional[str]
    """Hugging Face directory, hub id, .gguf file, or smollm2-135m; or the folder of a LoRA adapter
    whose base can be found"""
    format: tuple[str, ...]
    """forms to write: hf (a Hugging Face folder, as prune writes it), hf-uniform (a stock
    architecture, padded with zeros), nemotron-nas (DeciLM), gguf (one file, for llama.cpp)"""
    out: Path
    """with one format, the folder or file to write; with several, a folder with one entry each"""
    adapter: Path | None = None
    """folder of a LoRA adapter to merge into MODEL first"""
    quant: str = "f16"
    """for gguf: the type of the weight matrices, such as f32, f16, bf16, q8_0, q5_1, q4_0"""
    pad: bool = False
    """fill widths that a format cannot have with exact zeros, instead of refusing
    them"""
    overwrite: bool = False
    """replace what an earlier run left in --out"""
    read_back: Annotated[bool, Group.FILES] = True
    """read the result from its files again and compare it before it counts as written"""

    def formats(self) -> dict[str, Format]:
        """The asked formats by name, each once, in the order given.

        Raises InputError where there is none, or one or a type of numbers that does not exist.
        """
        if "gguf" in self.format:
            from fastprune.exporting.gguf_types import find_quant  # which loads torch

            find_quant(self.quant)
        if not self.format:
            raise InputError(f"--format: name at least one of {', '.join(FORMATS)}")
        return {name: find(name) for name in self.format}
