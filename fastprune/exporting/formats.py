"""The forms in which a model can be written, by the names that `--format` takes.

A format is a module with two functions:

    check(model, config) -> None
        Raises InputError, before any work, when `model` cannot have that form, and names what to
        choose instead. `config` is the ExportConfig.
    write(model, tokenizer, path, config) -> dict
        Writes the form to `path`: into it, an empty folder; or, where the format is a single file,
        into a new file of that name. Returns what there is to tell, JSON-ready: `bytes`, the size
        of what was written, and `notes`, sentences for the user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fastprune.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from fastprune.exporting.config import ExportConfig


class Writer(Protocol):
    """What the module of a format offers."""

    check: Callable[[nn.Module, ExportConfig], None]
    write: Callable[[nn.Module, Any, Path, ExportConfig], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """`module` is imported when the format is asked for; `suffix` is that of a single file."""

    module: str
    suffix: str = ""

    def entry(self, name: str) -> str:
        """What its file or folder is called among others, when the format is called `name`."""
        return f"model{self.suffix}" if self.suffix else name

    @property
    def writer(self) -> Writer:
        return cast(Writer, import_module(self.module))


FORMATS = {
    "hf": Format("fastprune.exporting.hf"),
    "hf-uniform": Format("fastprune.exporting.uniform"),
    "nemotron-nas": Format("fastprune.exporting.nemotron"),
    "gguf": Format("fastprune.exporting.gguf", suffix=".gguf"),
}


def register_format(name: str, form: Format) -> None:
    """Let `--format` of every command know ``form`` by ``name``.

    Raises ValueError when the name is taken.
    """
    if name in FORMATS:
        raise ValueError(f"the format '{name}' is registered already")
    FORMATS[name] = form


def find(name: str) -> Format:
    """The format called `name`. Raises InputError."""
    if name not in FORMATS:
        raise InputError(f"--format {name}: not one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check(name: str, model: nn.Module, config: ExportConfig) -> None:
    """InputError when `model` cannot have the format called `name`."""
    from fastprune.models.multimodal import enclosing  # transformers takes seconds to import

    around = enclosing(model)
    if around is not None and name != "hf":
        raise InputError(
            f"--format {name}: a '{around.model.config.model_type}' is more than a language model, "
            "and only --format hf keeps all of it"
        )
    find(name).writer.check(model, config)


def size_of(path: Path) -> int:
    """Bytes of the file `path`, or of all files in the folder `path`."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
