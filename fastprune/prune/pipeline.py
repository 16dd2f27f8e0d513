"""The main job: score → plan → surgery → evaluate → save."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.config import resolve_device
from fastprune.data.records import SELF, source_names
from fastprune.data.text import load_sources, sample_mix, token_stream
from fastprune.data.written import written_windows
from fastprune.errors import GateError, InputError, NumericalError
from fastprune.inspect.perplexity import (
    Perplexity,
    check_positions,
    evaluate,
    peak_memory_bytes,
    text_windows,
)
from fastprune.models.checkpoint import check_out, save_checkpoint, staged
from fastprune.models.families import block_parameters, family_of, geometries
from fastprune.models.load import load_model
from fastprune.models.streamed import StreamedModel
from fastprune.prune import latency, stream
from fastprune.prune.budget import Budget, budget_of, saved_bytes
from fastprune.prune.compensation import compensate
from fastprune.prune.config import PruneConfig
from fastprune.prune.curves import judging
from fastprune.prune.divergence import Yardstick
from fastprune.prune.dryrun import facts, lacks_weights, sizes_only
from fastprune.prune.iterate import plan_in_steps
from fastprune.prune.latency import CostTable
from fastprune.prune.plan import Plan
from fastprune.prune.planning import Planned, parameters_removed
from fastprune.prune.sensitivity import save_layer_importance
from fastprune.prune.surgery import apply_plan
from fastprune.report.html import write_prune_report
from fastprune.report.run import Clock, RunLog, command_line, settings, versions, write_json
from fastprune.report.summary import prune_lines

log = logging.getLogger("fastprune")


STAGES = ("load", "score", "plan", "surgery", "compensate", "evaluate", "save")


@dataclass
class PruneResult:
    """What `prune` made. ``model`` was cut in place unless it was a dry run."""

    model: nn.Module
    tokenizer: Any
    plan: Plan
    metrics: dict[str, Any]
    layer_importance: list[float] | None = None
    out: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """The metrics, and where the checkpoint and the report lie."""
        where = {} if self.out is None else {"out": str(self.out)}
        return {**self.metrics, **where}


def run_prune(config: PruneConfig) -> PruneResult:
    """Load, prune, evaluate, and save: the `prune` command.

    Raises InputError, GateError or NumericalError; ``config.out`` is complete or untouched.
    """
    if not config.model:
        raise InputError("no MODEL given: name a directory, a hub id, a .gguf file or smollm2-135m")
    if config.out is None and not config.dry_run:
        raise InputError("--out DIR is needed (or --dry-run)")
    config.check()
    if config.out is not None and distributed.rank() == 0:
        check_out(config.out, config.overwrite)
    clock = Clock()
    if lacks_weights(config):
        model, decided = sizes_only(config)
        return prune(model, None, config, clock=clock, planning=decided)
    with distributed.joined(config.device), RunLog() as run_log:
        with clock("load"):
            source = None
            if config.stream:
                source = StreamedModel(config.model, dtype=config.dtype, device=config.device)
                model, tokenizer = source.model, source.tokenizer
            else:
                model, tokenizer = load_model(
                    config.model,
                    dtype=config.dtype,
                    device=str(resolve_device(config.device)),
                    allow_pickle=config.allow_pickle,
                )
        if config.out is None:
            return prune(model, tokenizer, config, clock=clock, source=source)
        with _staged(config.out, config.overwrite) as directory:
            result = prune(
                model, tokenizer, config, clock=clock, source=source, directory=directory
            )
            result.out = config.out
            if distributed.rank() == 0:
                with clock("save"):
                    _save(directory, result, weights=source is None and not config.dry_run)
                if not config.dry_run:
                    _weigh(directory, result.metrics)
                result.metrics["seconds"] = clock.totals(STAGES)
                _record(directory / "fastprune", result, run_log)
    return result


@contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """`staged` of the first process, under its name in all; the others must not write there."""
    if distributed.rank() > 0:
        yield distributed.from_first(out)
        return
    with staged(out, overwrite) as directory:
        yield distributed.from_first(directory)


def prune(
    model: nn.Module,
    tokenizer: Any,
    config: PruneConfig,
    *,
    clock: Clock | None = None,
    source: StreamedModel | None = None,
    directory: Path | None = None,
    planning: PruneConfig | None = None,
) -> PruneResult:
    """Prune ``model`` in place (unless ``config.dry_run``) and measure it before and after.

    Inside `fastprune.distributed.joined` the processes share the calibration and the evaluation.
    Nothing is written, unless ``source`` has the weights and ``model`` sizes only: the result then
    goes straight to ``directory``. A dry run with ``planning`` plans by that instead of ``config``,
    and uses no text and no weights. Raises InputError for settings that cannot be met, GateError
    when perplexity grows beyond ``config.gate_ppl_ratio``, NumericalError for non-finite scores.
    """
    clock = clock or Clock()
    config.check()
    family_of(model)
    model.eval()
    params = sum(p.numel() for p in model.parameters())
    block = block_parameters(model)
    sizes = geometries(model)
    plan = Plan.load(config.plan) if config.plan else None
    if plan:
        plan.check_model(sizes)
    table = None
    if config.target_latency is not None:
        with clock("plan"):
            alone = distributed.rank() == 0  # the others wait, or they would disturb the clock
            measured_here = latency.measure(model, config.latency_context) if alone else None
            table = distributed.from_first(measured_here)
    budget = budget_of(config, model, table)
    dense_bytes = saved_bytes(model)
    refit = config.compensate != "none"
    test = calibration = None
    if planning is None:
        test, calibration = _texts(config, model, tokenizer, calibrate=plan is None or refit)
    device = next(model.parameters()).device if source is None else source.device
    dense = pruned = yardstick = None
    if not config.dry_run:
        with clock("evaluate"):
            measured = evaluate(model, test) if source is None else stream.evaluate(source, test)
            dense = _sound(measured, "the model")
    if plan is None:
        assert budget is not None  # config.check() has seen a budget or a plan
        made = plan_in_steps(model, calibration, budget, planning or config, clock, source)
        plan = made.plan
    else:
        made = Planned(plan)
    if made.divergence is not None and dense is not None:
        assert calibration is not None  # the search has used it
        with clock("evaluate"):
            yardstick = Yardstick(model, judging(calibration[: config.search_samples]))
    removed = parameters_removed(model, plan)
    if dense is not None and source is not None:
        assert directory is not None  # run_prune has seen --out or --dry-run
        with clock("surgery"):
            stream.cut(source, plan, calibration if refit else None, directory)
        with clock("evaluate"):
            written = StreamedModel(directory, device=str(device))
            pruned = _sound(stream.evaluate(written, test), "the pruned model")
        _check_gate(config, dense, pruned)
    elif dense is not None:
        if refit:
            with clock("compensate"):
                compensate(model, plan, calibration)
        with clock("surgery"):
            apply_plan(model, plan)
        with clock("evaluate"):
            pruned = _sound(evaluate(model, test), "the pruned model")
        _check_gate(config, dense, pruned)
    actual = None
    if yardstick is not None:
        with clock("evaluate"):
            actual = yardstick.divergence(model)
    metrics: dict[str, Any] = {
        "model": config.model or type(model).__name__,
        "params": {
            "before": params,
            "after": params - removed,
            "block_before": block,
            "block_after": block - removed,
        },
        "ratio": {"requested": _ratio(budget, block), "achieved": removed / block},
        "bytes": {"before": dense_bytes, "after": saved_bytes(model, plan.result())},
        "perplexity": [_perplexities(config.eval, dense, pruned)] if dense and pruned else [],
        "layers": [
            {
                "index": i,
                "query_heads": g.query_heads,
                "kv_heads": g.kv_heads,
                "channels": g.channels,
                "query_heads_before": before.query_heads,
                "kv_heads_before": before.kv_heads,
                "channels_before": before.channels,
            }
            for i, (g, before) in enumerate(zip(plan.result(), sizes, strict=True))
        ],
        "seconds": clock.totals(STAGES),
        "peak_memory_bytes": distributed.largest(peak_memory_bytes(device)),
        "processes": distributed.world(),
        "versions": versions(),
        "command": command_line(),
        "settings": settings(config),
    }
    if made.divergence is not None:
        metrics["divergence"] = {"predicted": made.divergence, "actual": actual}
    if table is not None:
        with clock("evaluate"):
            measured_now = not config.dry_run and distributed.rank() == 0
            found = _latency(model, plan, table, measured=measured_now)
            metrics["latency"] = distributed.from_first(found)
        metrics["seconds"] = clock.totals(STAGES)
    if budget is not None:
        metrics["budget"] = _budget(budget, metrics)
        achieved = metrics["budget"]["achieved"]
        if table is not None and achieved is not None and achieved > budget.requested:
            log.warning(
                "decoding takes %.3g ms a token, above the %.3g asked for: the prediction or the "
                "clock was off; ask for less to be sure",
                achieved,
                budget.requested,
            )
    if config.dry_run:
        metrics |= facts(model, plan, config)
    for line in prune_lines(metrics):
        log.info("%s", line)
    return PruneResult(model, tokenizer, plan, metrics, made.layer_importance)


def _ratio(budget: Budget | None, block: int) -> float | None:
    """The budget as a share of ``block`` parameters, where it is one of parameters."""
    return None if budget is None or budget.table is not None else budget.need / block


def _latency(
    model: nn.Module, plan: Plan, table: CostTable, *, measured: bool
) -> dict[str, float | int | None]:
    """Milliseconds a token at batch 1: dense, as the table foresaw, and of the pruned model."""
    return {
        "before": table.dense,
        "predicted": table.predicted(plan.result()),
        "after": latency.measure_again(model, table) if measured else None,
        "context": table.context,
        "threads": torch.get_num_threads(),
    }


def _budget(budget: Budget, metrics: dict[str, Any]) -> dict[str, Any]:
    """What was asked for and what was reached, in the budget's own unit."""
    achieved = {
        "ratio": metrics["ratio"]["achieved"],
        "parameters": metrics["params"]["after"],
        "bytes": metrics["bytes"]["after"],
        "ms/token": metrics.get("latency", {}).get("after"),
    }[budget.unit]
    return {"unit": budget.unit, "requested": budget.requested, "achieved": achieved}


def _texts(
    config: PruneConfig, model: nn.Module, tokenizer: Any, *, calibrate: bool
) -> tuple[Tensor, Tensor | None]:
    """Evaluation windows from the text's start, calibration windows from what is not tested."""
    check_positions(model, "--eval-seq-len", config.eval_seq_len)
    sources = load_sources(config.eval)
    documents = [text for texts in sources.values() for text in texts]
    test = text_windows(tokenizer, documents, config.eval_seq_len, config.eval_windows)
    if not calibrate:
        return test, None
    check_positions(model, "--calib-seq-len", config.calib_seq_len)
    tested = {}
    left = test.numel()
    for name, texts in sources.items():
        tested[name] = len(token_stream(tokenizer, texts, left)) if left else 0
        left -= tested[name]
    streams = {}
    names = source_names(config.calib)
    for first, name in enumerate(names):
        if name == SELF:
            share = len(range(first, config.calib_samples, len(names)))
            streams[name] = _written(config, model, tokenizer, share)
        else:
            texts = sources.get(name) or load_sources(name)[name]
            streams[name] = token_stream(tokenizer, texts)[tested.get(name, 0) :]
    return test, sample_mix(streams, config.calib_seq_len, config.calib_samples, config.seed)


def _written(config: PruneConfig, model: nn.Module, tokenizer: Any, windows: int) -> Tensor:
    """A stream of so many calibration windows that ``model`` writes; the first process has it do
    so for all."""
    written = torch.empty(0, dtype=torch.int64)
    if distributed.rank() == 0:
        written = written_windows(
            model, tokenizer, config.calib_seq_len, max(1, windows), seed=config.seed
        )
    return distributed.from_first(written).flatten()


def _sound(measured: Perplexity, what: str) -> Perplexity:
    """``measured``, or NumericalError when it is not a number."""
    if math.isnan(measured.perplexity):
        raise NumericalError(f"the loss of {what} is not a number; nothing was written")
    return measured


def _check_gate(config: PruneConfig, dense: Perplexity, pruned: Perplexity) -> None:
    growth = pruned.perplexity / dense.perplexity
    if config.gate_ppl_ratio is not None and not growth <= config.gate_ppl_ratio:
        raise GateError(
            f"perplexity grew from {dense.perplexity:.2f} to {pruned.perplexity:.2f}, a factor of "
            f"{growth:.2f}; the gate is {config.gate_ppl_ratio:g}; nothing was written"
        )


def _perplexities(text: str, dense: Perplexity, pruned: Perplexity) -> dict[str, Any]:
    return {
        "text": text,
        "seq_len": dense.seq_len,
        "windows": dense.windows,
        "before": dense.perplexity,
        "after": pruned.perplexity,
    }


def _save(directory: Path, result: PruneResult, *, weights: bool) -> None:
    if weights:
        save_checkpoint(result.model, result.tokenizer, directory)
    records = directory / "fastprune"
    records.mkdir()
    result.plan.save(records / "plan.json")
    if result.layer_importance is not None:
        method = result.metrics["settings"]["layer_importance"]
        save_layer_importance(records / "layer_importance.json", method, result.layer_importance)


def _weigh(directory: Path, metrics: dict[str, Any]) -> None:
    """Put the bytes that the weight files really have into ``metrics``."""
    written = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    metrics["bytes"]["after"] = written
    if (metrics.get("budget") or {}).get("unit") == "bytes":
        metrics["budget"]["achieved"] = written


def _record(directory: Path, result: PruneResult, run_log: RunLog) -> None:
    write_json(directory / "metrics.json", result.metrics)
    write_prune_report(directory / "report.html", result.metrics, result.plan.to_dict())
    run_log.save(directory / "run.log")
