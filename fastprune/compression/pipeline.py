"""The `compress` command: dense figures → prune → recover → merge → figures → checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.compression import schedule
from fastprune.compression.config import CompressConfig
from fastprune.compression.forms import Forms
from fastprune.compression.measure import answers, figures, probe, speeds
from fastprune.compression.schedule import Pace
from fastprune.compression.steps import Steps, is_complete
from fastprune.config import resolve_device
from fastprune.data.records import check_data, source_names
from fastprune.errors import GateError, InputError
from fastprune.inspect.perplexity import Perplexity
from fastprune.inspect.speed import SHORT
from fastprune.messages import Message
from fastprune.models.adopted import check_known
from fastprune.models.checkpoint import save_checkpoint, weight_bytes
from fastprune.models.families import decoder_layers
from fastprune.models.layers import Layers
from fastprune.models.load import load_model
from fastprune.output import RECORDS, check_place, replacing, staged
from fastprune.progress import log as progress_log
from fastprune.pruning.early import check_early
from fastprune.pruning.pipeline import PruneResult, check_type, write_result
from fastprune.pruning.plan import Plan
from fastprune.pruning.run import PruneRun
from fastprune.pruning.vocabulary import check_texts
from fastprune.readers import read_json
from fastprune.recover.merge import MergeConfig, run_merge
from fastprune.recover.pipeline import run_finetune
from fastprune.recover.recipes import load_recipe
from fastprune.report import format
from fastprune.report.compress import write_compress_report
from fastprune.report.record import CompressRecord, write_record
from fastprune.report.run import Clock, RunLog, command_line, settings, versions
from fastprune.space import check_space
from fastprune.workplace import claimed

log = logging.getLogger("fastprune")

PRUNED, ADAPTER, MERGED = "pruned", "recovered", "merged"
KEPT = 2
"""Whole models that a run keeps until its end: the pruned one, and the recovered one."""
NOT_ASKED = {
    "json", "quiet", "verbose", "threads", "out", "overwrite", "resume", "minutes",
    "gate_ppl_ratio", "format", "quant", "pad", "log_to", "log_steps", "read_back", "save_steps",
    "keep_last",
}  # fmt: skip
"""Settings that change nothing of what a step makes."""


@dataclass
class CompressResult:
    """What `compress` made."""

    record: CompressRecord
    out: Path

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds, and where the result lies."""
        return {**self.record.to_dict(), "out": str(self.out)}


def run_compress(config: CompressConfig) -> CompressResult:
    """Prune, recover and measure: the `compress` command.

    Raises InputError, GateError, NumericalError, and KeyboardInterrupt after an interrupt with the
    state saved. `config.out` is complete, or the run can be continued.
    """
    config.check()
    Forms(config).check_settings()
    load_recipe(config.finetune_config())
    check_data(config.data)
    if config.vocab is not None:
        check_texts([*source_names(config.data), *(name for name, _ in config.texts())])
    check_type(config.prune_config())
    check_early(config.prune_config(**_first_part(config)))
    assert config.out is not None  # the config was checked
    check_place(config.out)
    with claimed(config.out) as claim:
        run = CompressRun(config, Steps.open(config))
        with _log(run.steps) as run_log:
            dense = run.measure_dense()
            for number in range(config.rounds):
                pruned = run.prune(dense, number)
                recovered = run.recover(dense, number)
            small = run.measure_small()
            record = run.record(dense, pruned, recovered, small)
            run.finish(record, run_log, claim)
    return CompressResult(record, config.out)


def _first_part(config: CompressConfig) -> dict[str, Any]:
    """The settings of the first of several rounds that differ from those of a single one."""
    return {} if config.rounds == 1 or not config.ratio else {"ratio": config.ratio / config.rounds}


def compress(
    model: nn.Module, tokenizer: Any, config: CompressConfig
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Compress a model in memory: the small model, its tokenizer, and the content of metrics.json.

    `model` stays as it is. With `config.out` the result is also written there, and a run that was
    stopped can be continued; without it nothing is left on the disk. Raises InputError, GateError,
    NumericalError, and KeyboardInterrupt after an interrupt.
    """
    with tempfile.TemporaryDirectory(prefix="fastprune-") as name:
        dense = Path(name) / "dense"
        dense.mkdir()
        save_checkpoint(model, tokenizer, dense)
        out = config.out or Path(name) / "small"
        found = run_compress(replace(config, model=str(dense), out=out))
        small, own = load_model(out, device=str(resolve_device(config.device)))
        return small, own, found.to_dict()


class CompressRun:
    """The steps in their order; each is done once, however often the command is started."""

    def __init__(self, config: CompressConfig, steps: Steps) -> None:
        self.config, self.steps = config, steps
        self.before = steps.spent()
        self.start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the command was first started, without what was lost by a kill."""
        return self.before + time.monotonic() - self.start

    def measure_dense(self) -> dict[str, Any]:
        """The figures of the dense model, its answers, and how long they take."""
        config = self.config

        def work() -> dict[str, Any]:
            start = time.monotonic()
            model, tokenizer = self._load(config.model)
            check_known(model, config.family)
            self._check_room(model)
            guessed = probe(model)
            schedule.check_minutes(
                config.minutes, Pace(guessed, guessed), config.rounds, sure=False
            )
            self.steps.begin()
            found = figures(model, tokenizer, config)
            found["answers"] = answers(model, tokenizer)
            text = found["perplexity"][0]
            pace = Pace(schedule.UNIT_TOKENS / text["tokens_per_second"], time.monotonic() - start)
            schedule.check_minutes(config.minutes, pace, config.rounds)
            return {**found, "unit": pace.unit, "measuring": pace.measuring}

        asked = {"model": config.model, "texts": config.texts(), "seq_len": config.eval_seq_len}
        asked |= {"text_bytes": True} if config.vocab is not None else {}
        tasks = [*config.tasks, config.task_limit, config.task_fewshot, config.dtype, config.seed]
        return self.steps.do("dense", asked | {"tasks": tasks}, work)

    def prune(self, dense: dict[str, Any], number: int) -> dict[str, Any]:
        """Prune for the round `number`; the figures of the result, and what `prune` recorded."""
        config, name = self.config, self._name(PRUNED, number)
        effort, time_left = config.effort, (config.minutes, _pace(dense), config.rounds)
        if effort == "auto":
            effort = schedule.effort_for(*time_left)
        folder = self.steps.folder(name)
        changes: dict[str, Any] = {"effort": effort}
        if effort == "fast" and config.calib_samples is None and schedule.is_hurried(*time_left):
            changes["calib_samples"] = schedule.HURRIED
        if number:
            changes |= {"model": str(self._recovered(number - 1)), "vocab": None}
        if config.rounds > 1:
            changes["ratio"] = self._part(dense, number)

        def work() -> dict[str, Any]:
            progress_log.info("pruning, effort %s", effort)
            if folder.exists():
                shutil.rmtree(folder)  # of an attempt that was killed after it had written
            known = dense
            if number and config.vocab is not None:
                known = _per_token_of(self._pruned(number - 1)["figures"], dense)
            return self._prune(
                config.prune_config(out=folder, gate_ppl_ratio=None, **changes),
                _measured(known["perplexity"][0]),
            )

        asked = _asked(config.prune_config(**changes)) | {"rounds": config.rounds}
        return self.steps.do(name, asked, work)

    def recover(self, dense: dict[str, Any], number: int) -> dict[str, Any]:
        """Finetune after the pruning `number`, and merge what is an adapter; what both recorded."""
        steps, config = self.steps, self.config
        names = [self._name(part, number) for part in (PRUNED, ADAPTER, MERGED)]
        pruned, adapter, merged = map(steps.folder, names)

        def train() -> dict[str, Any]:
            if not is_complete(adapter):
                changes = steps.decide(names[1], lambda: self._length(dense, number))
                run_finetune(
                    config.finetune_config(
                        model=str(pruned),
                        out=adapter,
                        eval_windows=0,
                        gate_ppl_ratio=None,
                        overwrite=False,
                        tokenizer=None if config.vocab is not None else config.tokenizer,
                        **changes,
                    )
                )
            return _metrics(adapter)

        def merge() -> dict[str, Any]:
            if not (adapter / "adapter_config.json").is_file():
                return {}
            if merged.exists():
                shutil.rmtree(merged)
            run_merge(
                MergeConfig(model=str(pruned), adapter=adapter, out=merged, device=config.device)
            )
            return _metrics(merged)

        asked = _asked(config.finetune_config()) | {"minutes": config.minutes}
        found = steps.do(names[1], asked, train)
        steps.do(names[2], {}, merge)
        return found

    def measure_small(self) -> dict[str, Any]:
        """The figures of the recovered model, its answers, and the speed of both."""
        config = self.config

        def work() -> dict[str, Any]:
            model, tokenizer = self._load(self._recovered())
            found = figures(model, tokenizer, config)
            found["answers"] = answers(model, tokenizer)
            found["bytes"] = weight_bytes(self._recovered())
            if config.speed:
                found["speed"] = speeds(self._load(config.model)[0], model)
            return found

        asked = {"tasks": list(config.tasks), "speed": repr(SHORT) if config.speed else None}
        return self.steps.do("small", asked, work)

    def record(
        self,
        dense: dict[str, Any],
        pruned: dict[str, Any],
        recovered: dict[str, Any],
        small: dict[str, Any],
    ) -> CompressRecord:
        """Everything in one record. Raises GateError when the result is above the gate."""
        config = self.config
        if config.vocab is not None:
            dense = _per_token_of(small, dense)
        before, after = (f["perplexity"][0]["perplexity"] for f in (dense, small))
        gate = config.gate_ppl_ratio
        if gate is not None and not after <= gate * before:
            went = Message(
                "perplexity went from {before} to {after}, a factor of {factor:.3g}",
                before=format.perplexity(before),
                after=format.perplexity(after),
                factor=after / before,
            )
            raise GateError(
                Message(
                    "{went}; the gate is {gate:g}; no checkpoint was written", went=went, gate=gate
                )
            )
        better = after <= pruned["figures"]["perplexity"][0]["perplexity"]
        return CompressRecord(
            model=config.model,
            kept="recovered" if better else "pruned",
            dense=dense,
            pruned=pruned["figures"],
            recovered=small,
            prune=pruned["metrics"],
            finetune=recovered,
            vocabulary=self._pruned(0)["metrics"].get("vocabulary"),
            origin=pruned["metrics"].get("origin"),
            seconds={**_seconds(self.steps), "total": self.elapsed()},
            peak_memory_bytes=max(f["peak_memory_bytes"] for f in (pruned["metrics"], recovered)),
            versions=versions(),
            command=command_line(),
            settings=settings(config),
        )

    def finish(self, record: CompressRecord, run_log: RunLog, claim: Path) -> None:
        """Put the checkpoint and the records in the place of --out, in one step.

        `claim` is what `claimed` gave for it.
        """
        pruned = [self.steps.folder(self._name(PRUNED, n)) for n in range(self.config.rounds)]
        source = self._recovered() if record.kept == "recovered" else pruned[-1]
        with replacing(self.steps.out, claim=claim) as fresh:
            skip = shutil.ignore_patterns(RECORDS)
            shutil.copytree(source, fresh, ignore=skip, copy_function=_link, dirs_exist_ok=True)
            records = fresh / RECORDS
            records.mkdir()
            plans = [Plan.load(folder / RECORDS / "plan.json") for folder in pruned]
            reduce(Plan.then, plans).save(records / "plan.json")
            importance = pruned[0] / RECORDS / "layer_importance.json"  # of the dense model
            if importance.is_file():
                _link(importance, records / importance.name)
            last = self._name(ADAPTER, self.config.rounds - 1)
            lines = self.steps.folder(last) / RECORDS / "train_log.jsonl"
            if lines.is_file():
                _link(lines, records / lines.name)
            write_record(records, record)
            if self.config.format:
                Forms(self.config).write(*self._load(source), fresh)
            write_compress_report(records / "report.html", records, record)
            earlier = self.steps.state / "run.log"
            if earlier.is_file():
                _link(earlier, records / "run.log")
            else:
                run_log.save(records / "run.log")

    # ------------------------------------------------------------------------------- parts

    def _check_room(self, model: nn.Module) -> None:
        """InputError where the disk has no room for what a run keeps of the dense `model`.

        Of other budgets than a ratio only `prune` knows what they leave.
        """
        if self.config.ratio is not None:
            left = sum(p.nbytes for p in model.parameters())
            block = sum(p.nbytes for p in decoder_layers(model).parameters())
            left -= self.config.ratio * block
            check_space(self.steps.out, KEPT * left, "this run")

    def _load(self, source: str | Path) -> tuple[nn.Module, Any]:
        return load_model(
            source,
            dtype=self.config.dtype,
            device=str(resolve_device(self.config.device)),
            allow_pickle=self.config.allow_pickle,
            trust_remote_code=self.config.trust_remote_code,
        )

    def _name(self, part: str, number: int) -> str:
        """What the step `part` of the round `number` is called; of the last one, as if alone."""
        return part if number == self.config.rounds - 1 else f"{part}-{number + 1}"

    def _part(self, dense: dict[str, Any], number: int) -> float:
        """What the round `number` removes of the block parameters that it finds."""
        config, now = self.config, dense["block"]
        assert config.ratio is not None  # the config was checked
        if number:
            now = self._pruned(number - 1)["figures"]["block"]
        left = 1 - config.ratio * (number + 1) / config.rounds
        return 1 - left * dense["block"] / now

    def _pruned(self, number: int) -> dict[str, Any]:
        """What `prune` gave for the round `number`."""
        return self.steps.record["steps"][self._name(PRUNED, number)]["result"]

    def _recovered(self, number: int | None = None) -> Path:
        """What the round `number`, or the last one, ends with."""
        number = self.config.rounds - 1 if number is None else number
        merged = self.steps.folder(self._name(MERGED, number))
        return merged if is_complete(merged) else self.steps.folder(self._name(ADAPTER, number))

    def _prune(self, config: Any, dense: Perplexity) -> dict[str, Any]:
        """Score, cut and write; the figures of the result, and what prune recorded."""
        clock = Clock()
        with RunLog() as run_log:
            with clock("load"):
                model, tokenizer = self._load(config.model)
            run = PruneRun(Layers(model), tokenizer, config, clock, directory=config.out)
            run.dense = dense
            run.trim()
            run.prepare(texts=True)
            run.make_plan()
            run.cut()
            Forms(config).check(model)
            tokenizer = run.tokenizer
            with clock("evaluate"):
                found = figures(model, tokenizer, self.config)
            run.pruned = _measured(found["perplexity"][0])
            run.measure_pruned()
            found["answers"] = answers(model, tokenizer)
            result = PruneResult(
                model, tokenizer, run.plan, run.record(), run.made.layer_importance
            )
            with staged(config.out) as directory:
                write_result(directory, result, run.config, clock, run_log)
        found["bytes"] = result.record.bytes["after"]
        return {"figures": found, "metrics": result.metrics}

    def _length(self, dense: dict[str, Any], number: int) -> dict[str, Any]:
        """How long the recovery `number` takes: minutes, steps, or what the recipe says."""
        config = self.config
        if config.max_steps is not None or config.epochs is not None:
            return {}
        if config.minutes is None:
            if config.recipe != "recover":
                return {}
            effort: Any = "balanced" if config.effort == "auto" else config.effort
            (stage,) = load_recipe(config.finetune_config()).stages
            tokens = stage.seq_len * stage.batch_size * stage.grad_accum
            return {"max_steps": max(1, schedule.TOKENS[effort] // tokens // config.rounds)}
        later = config.rounds - 1 - number
        pruning = self.steps.record["steps"][self._name(PRUNED, number)]["seconds"]
        after = schedule.afterwards(_pace(dense)) + later * pruning
        left = schedule.recovery_minutes(config.minutes, self.elapsed(), after) / (later + 1)
        if left <= 0:
            raise InputError(
                f"--minutes {config.minutes:g} are spent before the recovery could begin; give "
                f"{config.minutes - left + 1:.0f} and the same command goes on"
            )
        return {"minutes": left / len(load_recipe(config.finetune_config()).stages)}


def _asked(config: Any) -> dict[str, Any]:
    """The settings of a step that decide what it makes."""
    return {name: value for name, value in settings(config).items() if name not in NOT_ASKED}


def _pace(dense: dict[str, Any]) -> Pace:
    return Pace(dense["unit"], dense["measuring"])


def _measured(found: dict[str, Any]) -> Perplexity:
    """The perplexity on one text in the figures of a model."""
    known = {field.name for field in fields(Perplexity)}
    return Perplexity(**{name: value for name, value in found.items() if name in known})


def _per_token_of(small: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """The figures `dense` with their perplexities per token of the model of the figures `small`."""
    pairs = zip(dense["perplexity"], small["perplexity"], strict=True)
    texts = [
        {
            "text": own["text"],
            **_measured(own).per_token_of(_measured(other)).to_dict(),
            "perplexity_own_tokens": own["perplexity"],
        }
        for own, other in pairs
    ]
    return {**dense, "perplexity": texts}


def _metrics(folder: Path) -> dict[str, Any]:
    return read_json(folder / RECORDS / "metrics.json")


def _seconds(steps: Steps) -> dict[str, float]:
    return {name: step.get("seconds", 0.0) for name, step in steps.record["steps"].items()}


def _link(source: Any, target: Any) -> None:
    """The file `source` under a second name; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _log(steps: Steps) -> Iterator[RunLog]:
    """The run's log, which goes on with what earlier attempts have said."""
    file = steps.state / "run.log"
    begun = file.parent.is_dir()
    with RunLog(file if begun else None) as run_log:
        try:
            yield run_log
        except KeyboardInterrupt:
            if file.parent.is_dir():
                log.warning("the state is in %s; the same command continues", file.parent)
            raise
        finally:
            if not begun and file.parent.is_dir():
                run_log.save(file)
