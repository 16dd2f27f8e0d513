"""TensorBoard, Weights & Biases and Trackio: the library's callbacks, one logged run a stage.

The lines of train_log.jsonl go there too. Each stage counts its steps from 0, so each has a run of
its own, called after DIR, the stage and the start of this process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from fastprune.data.records import source_names
from fastprune.errors import InputError

EVENTS = "tensorboard"  # in DIR/fastprune
START = time.strftime("%Y%m%d-%H%M%S")


def check_logger(name: str) -> None:
    """InputError where the package of the logger `name` is missing; none needs none."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"--log-to {name}: it is not installed; run: pip install {name}")


def set_project(name: str | None) -> None:
    """Runs from now on belong to the project `name` of wandb, which the library reads from the
    environment; trackio's is one of its arguments."""
    if name is not None:
        os.environ["WANDB_PROJECT"] = name


def perplexity_key(text: str) -> str:
    """What loggers call the perplexity on `text` while training: `eval/wikitext2_ppl`.

    Several texts joined by commas are one; a path gives the name of its file.
    """
    names = []
    for name in source_names(text):
        place = name.removeprefix("hf:").partition(":")[0] if name.startswith("hf:") else name
        stem = Path(place.removeprefix("builtin:")).name
        names.append(re.sub(r"[^\w-]+", "_", stem.partition(".")[0] or stem))
    return f"eval_{'+'.join(names)}_ppl"  # the library puts the slash


def run_name(folder: Path) -> str:
    """What a logger calls the stage that keeps its checkpoints in `folder`."""
    return f"{folder.parents[2].name}-{folder.name}-{START}"


def keep_events(callbacks: Iterable[TrainerCallback], folder: Path) -> None:
    """TensorBoard writes to DIR/fastprune, which outlives `folder`, that of the stage.

    Where the user has set TENSORBOARD_LOGGING_DIR, it writes there.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.parents[1] / EVENTS / f"{folder.name}-{START}")


def end_run(name: str) -> None:
    """The stage is over: the next one gets a run of its own. The other loggers do so themselves."""
    if name == "wandb":
        importlib.import_module(name).finish()


def as_input_error(name: str, error: Exception) -> InputError | None:
    """What to tell the user when `error` comes from the logger `name`; None when it does not."""
    if type(error).__module__.partition(".")[0] != name:
        return None
    hint = " (WANDB_MODE=offline needs no account)" if name == "wandb" else ""
    return InputError(f"--log-to {name}: {error}{hint}")
