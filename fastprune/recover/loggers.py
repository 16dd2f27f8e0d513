"""TensorBoard, Weights & Biases and Trackio: one logged run a stage.

The lines of train_log.jsonl go there too. Each stage counts its steps from 0, so each has a run of
its own, called after DIR, the stage and the start of this process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastprune.data.records import source_names
from fastprune.errors import InputError
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.recipes import Stage
from fastprune.report.run import settings

EVENTS = "tensorboard"  # in DIR/fastprune
START = time.strftime("%Y%m%d-%H%M%S")
PROJECT = "huggingface"
"""The project of wandb or trackio where none is named: that of runs of transformers."""


def check_logger(name: str) -> None:
    """InputError where the package of the logger `name` is missing; none needs none."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"--log-to {name}: it is not installed; run: pip install {name}")


def perplexity_key(text: str) -> str:
    """What the perplexity on `text` is called for loggers, who show it as `eval/wikitext2_ppl`.

    Several texts joined by commas are one; a path gives the name of its file.
    """
    names = []
    for name in source_names(text):
        place = name.removeprefix("hf:").partition(":")[0] if name.startswith("hf:") else name
        stem = Path(place.removeprefix("builtin:")).name
        names.append(re.sub(r"[^\w-]+", "_", stem.partition(".")[0] or stem))
    return f"eval_{'+'.join(names)}_ppl"


class Logger:
    """Where the figures of a stage go besides its own log; this one keeps none.

    `log` sends figures by name as those of an optimizer step, `close` ends the run. Raises
    InputError for what the logger refuses.
    """

    def log(self, figures: Mapping[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard(Logger):
    """Event files in DIR/fastprune, which outlives the stage's `folder`.

    Where the user has set TENSORBOARD_LOGGING_DIR, they lie there. `about` is kept with them.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        own = folder.parents[1] / EVENTS / f"{folder.name}-{START}"
        wanted = os.environ.get("TENSORBOARD_LOGGING_DIR")
        self._writer: Any = SummaryWriter(Path(wanted).expanduser() if wanted else own)
        self._writer.add_text("settings", json.dumps(about, indent=2, default=str))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Tracker(Logger):
    """A run of wandb, or of trackio, which is used alike.

    The project is `project`, or that which WANDB_PROJECT names.
    """

    def __init__(
        self, name: str, folder: Path, about: Mapping[str, Any], project: str | None
    ) -> None:
        self.name = name
        named = os.environ.get("WANDB_PROJECT") if name == "wandb" else None
        run = f"{folder.parents[2].name}-{folder.name}-{START}"
        with self._refusals():
            package = importlib.import_module(name)
            self._run = package.init(
                project=project or named or PROJECT, name=run, config=dict(about)
            )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        with self._refusals():
            self._run.log({**figures, "train/global_step": step}, step=step)

    def close(self) -> None:
        with self._refusals():
            self._run.finish()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """What the package raises is for the user to mend, such as a missing account."""
        try:
            yield
        except Exception as error:
            if type(error).__module__.partition(".")[0] != self.name:
                raise
            hint = " (WANDB_MODE=offline needs no account)" if self.name == "wandb" else ""
            raise InputError(f"--log-to {self.name}: {error}{hint}") from error


def open_logger(config: FinetuneConfig, stage: Stage, folder: Path) -> Logger:
    """The logger of `stage`, which has its checkpoints in `folder`.

    Raises InputError for what it refuses.
    """
    about = {**settings(config), "stage": asdict(stage)}
    if config.log_to == "none":
        return Logger()
    if config.log_to == "tensorboard":
        return TensorBoard(folder, about)
    return Tracker(config.log_to, folder, about, config.logger_project)
