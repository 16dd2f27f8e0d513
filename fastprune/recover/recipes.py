"""A recipe: an ordered list of stages, each with its settings, and gates between them.

The built-in recipes are the YAML files in `recipes/`; a user's own has the same form:

    about: one line for the report
    stages:
      - name: gentle          # any of the fields of Stage
        lr: 1e-7
        gate: 1.0             # keep the stage only if perplexity is at most this times before
      - name: firm
        lr: 5e-7
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastprune.bounds import POSITIVE, check_ranges
from fastprune.errors import InputError
from fastprune.flags import typed_values
from fastprune.readers import read_yaml
from fastprune.recover.config import FROZEN, LAST, FinetuneConfig, Method, Precision, Schedule

FOLDER = Path(__file__).with_name("recipes")
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage with every setting decided; the fields mean what those of FinetuneConfig do."""

    name: str = "finetune"
    gate: Annotated[float | None, POSITIVE] = None
    """keep the stage only if perplexity after it is at most this times the one before it"""
    on_worse: Literal["stop", "continue"] = "stop"
    """after a stage was rolled back: skip the stages that follow, or go on with them"""
    method: Method = "full"
    freeze: str = "none"
    lr: float = 2e-5
    find_lr: bool = False
    layer_lr_decay: float = 1.0
    layer_lrs: tuple[float, ...] = ()
    schedule: Schedule = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.05
    div_factor: float = 25.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None
    minutes: float | None = None
    samples: int | None = None
    seq_len: int = 512
    batch_size: int = 4
    grad_accum: int = 4
    precision: Precision = "auto"
    stop_loss: float | None = None
    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_target_modules: tuple[str, ...] = ()
    distill_weight: float = 0.5
    distill_temperature: float = 1.0
    distill_hidden_weight: float = 0.0
    val_size: float = 0.0
    eval_steps: int | None = None
    bleu_samples: int = 0
    best_by: Literal["loss", "bleu"] = "loss"
    early_stop: int | None = None
    generate_steps: int | None = None
    save_steps: int = 500
    keep_last: int = 2

    def check(self, *, validated: bool = False) -> None:
        """InputError when a value is out of range or two contradict each other.

        `validated`: there is validation data besides what `val_size` says.
        """
        if self.freeze not in FROZEN and not LAST.fullmatch(self.freeze):
            raise InputError(f"--freeze {self.freeze}: give one of {', '.join(FROZEN)}, last:N")
        check_ranges(self, FinetuneConfig)
        if self.layer_lrs and (self.layer_lr_decay != 1 or self.find_lr):
            raise InputError("--layer-lrs gives every rate: leave out --layer-lr-decay, --find-lr")
        if self.minutes is not None and self.max_steps is not None:
            raise InputError("--minutes and --max-steps both say when to stop: give one of them")
        if self.early_stop is not None and self.eval_steps is None:
            raise InputError("--early-stop counts evaluations: give --eval-steps too")
        if self.bleu_samples and not ((validated or self.val_size) and self.eval_steps):
            raise InputError("--bleu-samples are validation's: give --val-size and --eval-steps")
        if self.best_by == "bleu" and not self.bleu_samples:
            raise InputError("--best-by bleu needs BLEU measured: give --bleu-samples too")


@dataclass(frozen=True)
class Recipe:
    """Stages in order, ready to run."""

    name: str
    about: str
    stages: tuple[Stage, ...]


def load_recipe(config: FinetuneConfig) -> Recipe:
    """The recipe that `config` names, with the user's own settings put into every stage.

    Raises InputError for an unknown name, a broken file, or settings out of range.
    """
    file = _find(config.recipe)
    content = _read(file)
    given = _given(config)
    stages = []
    for number, values in enumerate(content["stages"], start=1):
        where = f"recipe {file}, stage {number}"
        if not isinstance(values, dict):
            raise InputError(f"{where}: must hold `setting: value` lines")
        own = typed_values(Stage, values, where, "fastprune finetune")
        check_ranges(Stage(**own), FinetuneConfig)  # also what the user's settings will replace
        if "layer_lrs" in given or "lr" in given or "find_lr" in given:
            own = {k: v for k, v in own.items() if k not in ("lr", "layer_lrs", "find_lr")}
        if "warmup_steps" in given or "warmup_ratio" in given:
            own.pop("warmup_steps", None)
        stage = Stage(**{"name": f"stage {number}"} | own | given)
        if config.val_data is not None:
            stage = dataclasses.replace(stage, val_size=0.0)
        stage.check(validated=config.val_data is not None)
        stages.append(stage)
    if content.get("needs_teacher") and not config.teacher:
        raise InputError(f"recipe {config.recipe} needs --teacher MODEL, the dense model")
    return Recipe(file.stem, str(content.get("about", "")), tuple(stages))


def _given(config: FinetuneConfig) -> dict[str, Any]:
    """The settings of a stage that the user chose."""
    names = {field.name for field in dataclasses.fields(Stage)}
    names &= {field.name for field in dataclasses.fields(config)}
    values = {name: getattr(config, name) for name in names}
    # False is a switch left alone; a zero is a choice, though it equals False
    return {n: v for n, v in values.items() if v is not None and v is not False and v != ()}


def _find(name: str) -> Path:
    if name in NAMES:
        return FOLDER / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    raise InputError(f"no recipe {name!r}: give a .yaml file or one of {', '.join(NAMES)}")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_yaml(file)
    except InputError as error:
        raise InputError(f"recipe {error}") from error
    if not isinstance(content, dict) or not content.get("stages"):
        raise InputError(f"recipe {file}: must hold a list of stages; copy one of {FOLDER}")
    if unknown := sorted(set(content) - {"about", "stages", "needs_teacher"}):
        raise InputError(f"recipe {file}: unknown key {unknown[0]!r}; it has about and stages")
    if not isinstance(content["stages"], list):
        raise InputError(f"recipe {file}: stages must be a list")
    return content
