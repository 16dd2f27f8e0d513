"""The settings of the `compress` command: those of `prune` and `finetune`, and the time it has."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from fastprune.bounds import MINUTES, POSITIVE, Range, check_ranges
from fastprune.config import Group, Positional
from fastprune.data.builtin import EVALUATION_TEXT, PYDOCS
from fastprune.data.records import source_names
from fastprune.errors import InputError
from fastprune.inspect.tasks import TaskOptions
from fastprune.pruning.config import PruneConfig
from fastprune.recover.config import FinetuneConfig

Effort = Literal["auto", "fast", "balanced", "thorough"]


@dataclass(kw_only=True)
class CompressConfig(TaskOptions, FinetuneConfig, PruneConfig):
    """Make a model smaller and bring it back: prune, recover, merge, measure, in one command.

    A command that was killed or interrupted continues when it is run again. For example:
        fastprune compress smollm2-135m --out small --ratio 0.2
        fastprune compress MODEL --out small --ratio 0.3 --minutes 30
        fastprune compress MODEL --out small --ratio 0.2 --tasks arc_easy,piqa
    """

    model: Positional[str] = ""
    """Hugging Face directory, hub id, .gguf file, or smollm2-135m"""
    out: Path | None = None
    """directory of the small model"""
    ratio: Annotated[float | None, Range(0, 1, closed=(False, False))] = None
    """fraction of the block parameters to remove"""
    minutes: Annotated[float | None, MINUTES] = None
    """time for the whole command, loading and measuring included (default: by --effort)"""
    rounds: Annotated[int, Range(1, 1000)] = 1
    """prune and recover in this many rounds, each of which removes an equal part"""
    effort: Effort = "auto"  # type: ignore[assignment]
    """how much time pruning may take (auto: by --minutes; without it balanced)"""
    overwrite: bool = False
    """replace what an earlier run left in --out; a run that was interrupted there is continued"""
    recipe: str = "recover"
    """how the pruned model is recovered: recover, another recipe of finetune, or a recipe file; its
    settings replace the defaults below"""
    gate_ppl_ratio: Annotated[float | None, Group.EVALUATION, POSITIVE] = None
    """exit 3 without writing a model when its perplexity is more than this many times the dense
    one"""
    dry_run: Annotated[bool, Group.PLAN] = False
    """only for prune; compress refuses it"""
    ranks: Annotated[int, Group.PLAN, Range(1, 2**16)] = 1
    """only for prune --dry-run"""
    stream: Annotated[bool, Group.MACHINE] = False
    """only for prune; compress refuses it"""
    shard: Annotated[bool, Group.MACHINE] = False
    """only for finetune; compress refuses it"""
    eval: str = EVALUATION_TEXT
    """text on which the perplexity of the dense, the pruned and the recovered model is measured"""
    eval_also: Annotated[str, Group.EVALUATION] = PYDOCS
    """a second text, of another kind, measured in half as many windows; none leaves it out"""
    speed: Annotated[bool, Group.EVALUATION] = True
    """time how fast the dense and the small model process prompts and decode"""

    def check(self) -> None:
        """InputError when a value is out of range or two contradict each other."""
        if not self.model:
            raise InputError(
                "no MODEL given: name a directory, a hub id, a .gguf file or smollm2-135m"
            )
        if self.out is None:
            raise InputError("--out DIR is needed")
        check_ranges(self)
        for flag, unusable in (
            ("--dry-run", self.dry_run),
            ("--stream", self.stream),
            ("--shard", self.shard),
            ("--resume PATH", self.resume not in ("auto", "never")),
            ("--eval-windows 0", self.eval_windows == 0),
        ):
            if unusable:
                raise InputError(f"compress does not take {flag}; use prune and finetune by hand")
        if self.rounds > 1 and (not self.ratio or self.ratio_of != "block"):
            raise InputError(
                "--rounds removes an equal part of --ratio in each round; give --ratio, and leave "
                "--ratio-of out"
            )
        self.prune_config().check()
        self.finetune_config().check()
        self.check_tasks()

    def prune_config(self, **changes: Any) -> PruneConfig:
        """What `prune` would be called with, and `changes`."""
        own = {"effort": "balanced" if self.effort == "auto" else self.effort}
        return PruneConfig(**_fields(self, PruneConfig) | own | changes)

    def finetune_config(self, **changes: Any) -> FinetuneConfig:
        """What `finetune` would be called with, and `changes`."""
        return FinetuneConfig(**_fields(self, FinetuneConfig) | {"minutes": None} | changes)

    def texts(self) -> list[tuple[str, int]]:
        """What is measured: names of texts, and how many windows of each."""
        found = [(self.eval, self.eval_windows)]
        if self.eval_also != "none":
            found.append((self.eval_also, max(1, self.eval_windows // 2)))
        return found

    def inputs(self) -> list[str | Path]:
        """What the command reads, as it was named; --out must lie apart from it."""
        also = source_names(self.eval_also) if self.eval_also != "none" else []
        return [*self.prune_config().inputs(), *self.finetune_config().inputs(), *also]


def _fields(config: Any, kind: type) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(kind)}
