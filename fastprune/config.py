"""What every command's configuration has in common.

A command is one dataclass and one function that takes it. The fields are the Python API, the flags
and the keys of the YAML `--config` at once; the docstring under a field is its `--help` text.
A field annotated `Positional[...]` stands on the command line without a flag, one annotated
`Annotated[..., Group.X]` in a group of the help text; what most people need first has no group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

from fastprune.bounds import Range, check_ranges
from fastprune.errors import InputError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

POSITIONAL = "positional"
Positional = Annotated[T, POSITIONAL]
"""`model: Positional[str]` is MODEL on the command line, not --model."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Group(Enum):
    """What options are for, in the order of the help text: the value, and the word
    options, head a box."""

    SIZE = "size"
    SELECTION = "selection"
    CALIBRATION = "calibration"
    DATA = "data"
    TRAINING = "training"
    LORA = "LoRA"
    TEACHER = "teacher"
    EVALUATION = "evaluation"
    TASKS = "task"
    PLAN = "plan"
    LOGS = "checkpoint and log"
    SAFETY = "safety"
    MACHINE = "memory and machine"
    FILES = "loading and saving"
    COMMON = "common"


@dataclass(kw_only=True)
class CommonConfig:
    """Options every command takes."""

    json: Annotated[Path | None, Group.COMMON] = None
    """write the result to this file as JSON"""
    quiet: Annotated[bool, Group.COMMON] = False
    """print errors only"""
    verbose: Annotated[bool, Group.COMMON] = False
    """log every step, and show tracebacks"""
    seed: Annotated[int, Group.COMMON, Range(0, 2**32 - 1)] = 0
    """seed of every random choice"""
    threads: Annotated[int | None, Group.COMMON, Range(1, 1024)] = None
    """CPU threads (default: one per physical core)"""
    device: Annotated[str, Group.COMMON] = "auto"
    """auto, cpu, cuda or cuda:N; auto takes CUDA where there is one"""
    dtype: Annotated[Dtype, Group.COMMON] = "auto"
    """precision of the weights; auto keeps the model's own"""


@dataclass(kw_only=True)
class LoadingConfig(CommonConfig):
    """Options of the commands that load a model."""

    tokenizer: Annotated[str | None, Group.FILES] = None
    """folder or hub id (gpt2) of the tokenizer to use instead of the model's own, or where a .pt
    has none beside it"""
    allow_pickle: Annotated[bool, Group.FILES] = False
    """read a pickled .bin file; it can run any code it contains"""


@dataclass(kw_only=True)
class TrustingConfig(LoadingConfig):
    """Options of those that load a model by the code in its folder too, where they are told so."""

    trust_remote_code: Annotated[bool, Group.FILES] = False
    """run the Python code in the model's folder, where transformers has none for its type"""


def resolve_device(name: str) -> torch.device:
    """The device `name` (auto, cpu, cuda, cuda:N) means on this machine.

    Raises InputError if it is none of these or the machine has no such device.
    """
    import torch  # here, so that reading a configuration does not load torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,9}))?", name)
    if match is None:
        raise InputError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    if not count:
        raise InputError(f"device {name!r}: no CUDA device is usable here; use --device cpu")
    index = int(match[1] or 0)
    if index >= count:
        raise InputError(f"device {name!r}: this machine has cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def resolve_dtype(name: str) -> torch.dtype | None:
    """The torch dtype `name` means; None for auto (keep the model's own). Raises InputError."""
    import torch

    if name == "auto":
        return None
    if name not in get_args(Dtype):
        raise InputError(f"dtype {name!r} is not one of {', '.join(get_args(Dtype))}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def apply(config: CommonConfig) -> None:
    """Set torch's threads and random seed as `config` says. InputError for a number that is out
    of its range."""
    import torch

    check_ranges(config)

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
