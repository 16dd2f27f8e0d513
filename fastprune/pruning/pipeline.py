"""The main job: score → plan → surgery → evaluate → save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fastprune.config import resolve_device
from fastprune.distributed import ALONE, Processes, joined, launched
from fastprune.errors import InputError
from fastprune.models.adopted import check_known, is_known
from fastprune.models.checkpoint import check_savable, save_checkpoint
from fastprune.models.layers import Layers, resident
from fastprune.models.load import STATE_SUFFIXES, load_config, load_model, load_tokenizer
from fastprune.models.multimodal import is_multimodal, text_part
from fastprune.models.readback import check_read_back
from fastprune.models.skeleton import skeleton
from fastprune.models.streamed import StreamedModel
from fastprune.output import RECORDS, RUN_LOG, check_out, staged
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.dryrun import lacks_weights, sizes_only
from fastprune.pruning.early import check_early
from fastprune.pruning.plan import Plan
from fastprune.pruning.run import STAGES, PruneRun, check_layout
from fastprune.pruning.sensitivity import save_layer_importance
from fastprune.report.html import write_prune_report
from fastprune.report.record import PruneRecord, write_record
from fastprune.report.run import Clock, RunLog, lasting_log


@dataclass
class PruneResult:
    """What `prune` made. ``model`` was cut in place unless it was a dry run; ``tokenizer`` is
    another one where the vocabulary was trimmed."""

    model: nn.Module
    tokenizer: Any
    plan: Plan
    record: PruneRecord
    layer_importance: list[float] | None = None
    out: Path | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """The record as metrics.json holds it."""
        return self.record.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The metrics, and where the checkpoint and the report lie."""
        where = {} if self.out is None else {"out": str(self.out)}
        return {**self.metrics, **where}


class Beside(Protocol):
    """What else is made of the pruned model, in the folder of the result."""

    def check(self, model: nn.Module) -> None:
        """InputError when it cannot be made; called as soon as the model is cut."""

    def write(self, model: nn.Module, tokenizer: Any, directory: Path) -> None:
        """Make it in `directory`, where the checkpoint is already."""


def run_prune(config: PruneConfig, beside: Beside | None = None) -> PruneResult:
    """Load, prune, evaluate, and save: the `prune` command.

    Raises InputError, GateError or NumericalError; ``config.out`` is complete or untouched, but for
    the run's log, which stays there whatever the end, unless that is an InputError.
    """
    if not config.model:
        raise InputError("no MODEL given: name a directory, a hub id, a .gguf file or smollm2-135m")
    if config.out is None and not config.dry_run:
        raise InputError("--out DIR is needed (or --dry-run)")
    config.check()
    if config.out is not None and launched().first:
        check_out(config.out, config.overwrite, config.inputs())
    clock = Clock()
    if lacks_weights(config):
        model, decided = sizes_only(config)
        tokenizer = None if config.vocab is None else load_tokenizer(config.model)
        run = PruneRun(resident(model), tokenizer, config, clock)
        return carry_out(run, planning=decided)
    check_early(config)
    with (
        joined(config.device) as processes,
        _staged(config.out, config.overwrite, processes) as directory,
        _log(config, processes) as run_log,
    ):
        with clock("load"):
            layers, tokenizer = _load(config)
        if directory is None:
            return carry_out(PruneRun(layers, tokenizer, config, clock, processes=processes))
        check_savable(layers.model, tokenizer)
        run = PruneRun(layers, tokenizer, config, clock, directory, processes)
        result = carry_out(run, beside=beside)
        result.out = config.out
        if processes.first:
            write_result(directory, result, config, clock, run_log)
            if beside is not None:
                beside.write(result.model, result.tokenizer, directory)
    return result


def write_result(
    directory: Path, result: PruneResult, config: PruneConfig, clock: Clock, run_log: RunLog
) -> None:
    """Fill ``directory`` with the checkpoint, read it back, and put the records beside it.

    A streamed result is there already. Raises ReadBackError.
    """
    with clock("save"):
        weights = not config.stream and not config.dry_run
        _save(directory, result, weights=weights)
        if weights and config.read_back:
            check_read_back(result.model, directory)
    if not config.dry_run:
        _weigh(directory, result.record)
    result.record.seconds = clock.totals(STAGES)
    _record(directory / RECORDS, result, run_log)


def _log(config: PruneConfig, processes: Processes) -> AbstractContextManager[RunLog]:
    """The log of the run, in its place from the first second on; in memory where there is none."""
    if config.out is None or not processes.first:
        return RunLog()
    return lasting_log(Path(config.out).absolute() / RECORDS / RUN_LOG)


@contextmanager
def _staged(out: Path | None, overwrite: bool, processes: Processes) -> Iterator[Path | None]:
    """`staged` of the first of ``processes``, under its name in all; the others must not write.

    None where there is no ``out``.
    """
    if out is None:
        yield None
        return
    if not processes.first:
        yield processes.from_first(out)
        return
    with staged(out, overwrite) as directory:
        yield processes.from_first(directory)


def prune(
    model: nn.Module,
    tokenizer: Any,
    config: PruneConfig,
    *,
    clock: Clock | None = None,
    processes: Processes = ALONE,
) -> PruneResult:
    """Prune ``model`` in place (unless ``config.dry_run``) and measure it before and after.

    Of a multimodal model it is the decoder that is pruned and measured, on text.
    The ``processes`` that `fastprune.distributed.joined` gives share the calibration and the
    evaluation; each has the model, and calls this.
    Nothing is written. Raises InputError for settings that cannot be met, GateError when perplexity
    grows beyond ``config.gate_ppl_ratio``, NumericalError for non-finite scores.
    """
    config.check()
    decoder = text_part(model)
    check_known(decoder, config.family)
    run = PruneRun(resident(decoder), tokenizer, config, clock or Clock(), processes=processes)
    result = carry_out(run)
    result.model = model
    return result


def carry_out(
    run: PruneRun, *, planning: PruneConfig | None = None, beside: Beside | None = None
) -> PruneResult:
    """All steps of ``run``; what it leaves in memory is not written.

    A dry run with ``planning`` plans by that instead of the run's own settings, and uses no text
    and no weights. ``beside`` is asked whether it can be made of the result. Raises what `prune`
    raises.
    """
    model, tokenizer = run.model, run.tokenizer
    run.trim()
    run.prepare(texts=planning is None)
    if not run.config.dry_run:
        run.measure_dense()
    run.make_plan(planning)
    if not run.config.dry_run:
        run.cut()
        if beside is not None:
            beside.check(run.model)
        run.measure_pruned()
        tokenizer = run.tokenizer
    return PruneResult(model, tokenizer, run.plan, run.record(), run.made.layer_importance)


def _load(config: PruneConfig) -> tuple[Layers, Any]:
    """The layers of the model that ``config`` names, and its tokenizer. Raises InputError."""
    check_type(config)
    own = config.tokenizer
    if config.stream:
        source = StreamedModel(
            config.model,
            dtype=config.dtype,
            device=config.device,
            tokenizer=own,
            family=config.family,
        )
        return source, source.tokenizer
    model, tokenizer = load_model(
        config.model,
        dtype=config.dtype,
        device=str(resolve_device(config.device)),
        allow_pickle=config.allow_pickle,
        tokenizer=own,
    )
    check_known(model, config.family)
    return resident(model), tokenizer


def check_type(config: PruneConfig) -> None:
    """InputError, before weights are read, when the model that ``config`` names is neither of a
    declared type nor like one, or cannot have the layout that is asked for."""
    if Path(config.model).suffix in STATE_SUFFIXES:
        return  # what they hold is known once they are read
    model_config = load_config(config.model)
    if config.family is None and not is_multimodal(model_config) and is_known(model_config):
        return
    model = skeleton(model_config, torch.float32)
    check_known(model, config.family)
    check_layout(model, config)


def _save(directory: Path, result: PruneResult, *, weights: bool) -> None:
    if weights:
        save_checkpoint(result.model, result.tokenizer, directory)
    records = directory / RECORDS
    records.mkdir()
    result.plan.save(records / "plan.json")
    if result.layer_importance is not None:
        method = result.record.settings["layer_importance"]
        save_layer_importance(records / "layer_importance.json", method, result.layer_importance)


def _weigh(directory: Path, record: PruneRecord) -> None:
    """Put the bytes that the weight files really have into ``record``."""
    written = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    record.bytes["after"] = written
    if (record.budget or {}).get("unit") == "bytes":
        assert record.budget is not None
        record.budget["achieved"] = written


def _record(directory: Path, result: PruneResult, run_log: RunLog) -> None:
    write_record(directory, result.record)
    write_prune_report(directory / "report.html", result.metrics, result.plan.to_dict())
    run_log.save(directory / RUN_LOG)
