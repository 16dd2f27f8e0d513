"""One pruning run, step by step: windows, dense figures, plan, surgery, figures of the result."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.distributed import ALONE, Processes
from fastprune.errors import InputError
from fastprune.inspect.memory import peak_memory_bytes
from fastprune.inspect.perplexity import Perplexity, evaluate_layers, sound, with_bytes
from fastprune.inspect.record import Origin
from fastprune.messages import Message
from fastprune.models.checkpoint import one_size_only, settle_enclosing
from fastprune.models.decilm import obstacle
from fastprune.models.families import (
    KINDS,
    Geometry,
    block_parameters,
    family_of,
    geometries,
    is_adopted,
)
from fastprune.models.layers import Layers
from fastprune.models.streamed import StreamedModel
from fastprune.pruning import latency
from fastprune.pruning.budget import Budget, budget_of, far_off, saved_bytes, total_parameters
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.compensation import compensate
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.curves import judging
from fastprune.pruning.divergence import Yardstick
from fastprune.pruning.dryrun import facts
from fastprune.pruning.early import check_settled
from fastprune.pruning.effort import decided
from fastprune.pruning.iterate import plan_in_steps
from fastprune.pruning.latency import CostTable
from fastprune.pruning.mixtures import (
    Shares,
    check_mixture,
    check_routed,
    collapse,
    shares_record,
)
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.planning import Planned, Request, parameters_removed
from fastprune.pruning.stream import write_cut
from fastprune.pruning.surgery import apply_plan
from fastprune.pruning.texts import run_windows, with_lengths
from fastprune.pruning.trial import check_decoder, check_surgery
from fastprune.pruning.vocabulary import Vocabulary, trim, twin
from fastprune.pruning.worth import check_worth, conclude
from fastprune.report.record import PruneRecord
from fastprune.report.run import Clock, command_line, settings, versions
from fastprune.report.summary import prune_lines
from fastprune.space import check_space

log = logging.getLogger("fastprune")

STAGES = ("load", "score", "plan", "surgery", "compensate", "evaluate", "save")


class PruneRun:
    """The steps of a run in their order, and what each leaves for the next.

    ``layers`` are the model's, wherever its weights are. The result is the model itself, cut in
    place, or goes to ``directory`` where its weights stay on disk; ``processes`` share the
    calibration and the evaluation. A dry run is `trim`, `prepare` and `make_plan`; `record` may be
    called after either.
    """

    def __init__(
        self,
        layers: Layers,
        tokenizer: Any,
        config: PruneConfig,
        clock: Clock,
        directory: Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        check_layout(layers.model, config)
        check_mixture(layers.model, config)
        self.layers, self.directory, self.processes = layers, directory, processes
        self.tokenizer, self.clock = tokenizer, clock
        self.config = with_lengths(config, layers.model)
        self.model: nn.Module = layers.model.eval()
        self.params = total_parameters(self.model)
        self.block = block_parameters(self.model)
        self.sizes: list[Geometry] = geometries(self.model)
        self.bytes = saved_bytes(self.model)
        self.given = Plan.load(config.plan) if config.plan else None
        if self.given:
            self.given.check_model(self.sizes)
            check_routed(self.model, self.given)
            if len(set(self.given.result())) > 1 and (why := one_size_only(self.model)):
                raise InputError(f"--plan: {why}")
        if config.only_trims:
            self.given = keep_all(self.sizes)
        self.vocabulary: Vocabulary | None = None
        self.untrimmed: nn.Module | None = None
        self.own_tokens: Perplexity | None = None
        self.budget: Budget | None = None
        self.table: CostTable | None = None
        self.test: Tensor | None = None
        self.calibration: Calibration | None = None
        self.dense: Perplexity | None = None
        self.pruned: Perplexity | None = None
        self.yardstick: Yardstick | None = None
        self.divergence: float | None = None
        self.shares: dict[str, dict[int, list[float]]] = {}
        self.earlier = Origin.of(config.model)
        self.milliseconds: float
        self.made: Planned

    @property
    def plan(self) -> Plan:
        """What `make_plan` decided."""
        return self.made.plan

    @property
    def refits(self) -> bool:
        """Whether what is kept takes over what it can of what is removed."""
        return self.config.compensate != "none" and not self.config.only_trims

    def trim(self) -> None:
        """Trim the vocabulary where that is asked for; what follows goes by what is left.

        The perplexity of the dense model is measured before, unless it is known or this is a dry
        run, which trims a copy. Raises InputError as `vocabulary.trim`.
        """
        config = self.config
        if config.vocab is None:
            return
        if not config.dry_run and self.dense is None:
            test, _ = run_windows(config, self.model, self.tokenizer, calibrate=False)
            with self.clock("evaluate"):
                found = evaluate_layers(self.layers, test, self.processes)
                found = sound(found, self.model, Message("the loss of the model"))
                self.dense = with_bytes(found, self.tokenizer, test)
        dense, timed = self.model, config.target_latency is not None
        with self.clock("surgery"):
            if config.dry_run:
                self.model = twin(dense)
            elif timed:
                dense = twin(dense)
            self.untrimmed = dense if timed else None
            self.tokenizer, self.vocabulary = trim(self.model, self.tokenizer, config)
        self.layers = type(self.layers)(self.model, self.layers.device)

    def prepare(self, *, texts: bool) -> None:
        """Time the model where a latency is asked for, read the budget, and cut the ``texts``.

        Raises InputError for a budget that cannot be met, for texts that are missing, and where the
        disk has no room for the result.
        """
        if self.config.target_latency is not None:
            with self.clock("plan"):
                context = self.config.latency_context
                # by one process alone: the others would disturb the clock
                self.table = self.processes.by_first(partial(latency.measure, self.model, context))
                self.milliseconds = self.table.dense
                if self.untrimmed is not None:
                    again = partial(latency.measure_again, self.untrimmed, self.table)
                    self.milliseconds, self.untrimmed = self.processes.by_first(again), None
        if self.given is None:
            self.budget = budget_of(self.config, self.model, self.table)
        share = self._share()
        self.config = decided(self.config, self.model, share)
        if is_adopted(self.model.config):
            check_surgery(self.model, self._structures())
        if self.budget is not None:
            check_settled(self.config, self.model, self.budget)
        if self.directory is not None and not self.config.dry_run:
            assert self.config.out is not None  # where `directory` comes to lie
            left = self.bytes * (1 - share * self.block / self.params)
            check_space(self.config.out, left, "the pruned model")
        if texts:
            calibrate = self.given is None or self.refits
            self.test, windows = run_windows(
                self.config,
                self.model,
                self.tokenizer,
                calibrate=calibrate,
                processes=self.processes,
            )
            check_decoder(self.model, self.test)
            if windows is not None:
                self.calibration = Calibration(self.layers, windows, self.processes)

    def _structures(self) -> list[str]:
        """The kinds of units that may be removed, or that the given plan removes."""
        if self.given is None:
            return [kind for kind in KINDS if kind in self.config.structures]
        pairs = list(zip(self.sizes, self.given.result(), strict=True))
        return [kind for kind in KINDS if any(a.units[kind] != b.units[kind] for a, b in pairs)]

    def _share(self) -> float:
        """Part of the block parameters that the budget takes; about, where it is one of time."""
        if self.budget is None:
            assert self.given is not None
            return parameters_removed(self.model, self.given) / self.block
        if self.budget.table is not None:
            return self.budget.need / self.budget.table.dense
        return self.budget.need / self.block

    def measure_dense(self) -> None:
        """Perplexity of the model as it came, unless it is known. Raises NumericalError when it is
        not a number."""
        assert self.test is not None
        if self.dense is not None:
            return
        with self.clock("evaluate"):
            found = self._evaluated("before")
            self.dense = sound(found, self.model, Message("the loss of the model"))

    def _evaluated(self, when: str) -> Perplexity:
        """The perplexity of the model as it is, and on the way its routed shares."""
        assert self.test is not None
        shares = Shares(self.layers)
        with shares.watching():
            found = evaluate_layers(self.layers, self.test, self.processes)
        self.shares[when] = shares.complete(self.processes)
        return found

    def make_plan(self, planning: PruneConfig | None = None) -> None:
        """Take the plan that was given, or make one: by ``planning`` where that is given."""
        config = self.config
        if planning is not None:
            config = decided(with_lengths(planning, self.model), self.model, self._share())
        if self.given is not None:
            self.made = Planned(self.given)
        else:
            assert self.budget is not None  # config.check() has seen a budget or a plan
            text = self.calibration or Calibration(  # what is planned by sizes alone needs none
                self.layers, torch.empty(0, 0, dtype=torch.int64), self.processes
            )
            self.made = plan_in_steps(Request(text, self.budget, config), self.clock)
        if self.made.divergence is not None and self.dense is not None:
            assert self.calibration is not None  # the search has used it
            with self.clock("evaluate"):
                some = self.calibration.part(slice(self.config.search_samples))
                self.yardstick = Yardstick(some.part(slice(len(judging(some.windows)))))
        self.removed = parameters_removed(self.model, self.plan)
        if self.budget is not None:
            told = far_off(self.budget, self.config, self.removed, self.block)
            if told:
                log.warning("%s", told)

    def cut(self) -> None:
        """Refit what is kept and apply the plan; the layers are those of the result then."""
        calibration = self.calibration if self.refits else None
        if isinstance(self.layers, StreamedModel):
            assert self.directory is not None  # run_prune has seen --out or --dry-run
            with self.clock("surgery"):
                write_cut(self.layers, self.plan, calibration, self.directory, self.processes)
            self.layers = StreamedModel(self.directory, device=str(self.layers.device))
            return
        if calibration is not None:
            with self.clock("compensate"):
                compensate(calibration, self.plan)
        with self.clock("surgery"):
            self.layers.commit()
            apply_plan(self.model, self.plan)
            settle_enclosing(self.model)
        self.layers = type(self.layers)(self.model, self.layers.device)

    def measure_pruned(self) -> None:
        """Perplexity, unless it is known, and divergence of the result.

        Raises GateError as `check_worth`.
        """
        assert self.test is not None and self.dense is not None
        if self.pruned is None:
            with self.clock("evaluate"):
                found = self._evaluated("after")
                self.pruned = sound(
                    found, self.layers.model, Message("the loss of the pruned model")
                )
                if self.vocabulary is not None:
                    self.pruned = with_bytes(self.pruned, self.tokenizer, self.test)
        if self.vocabulary is not None:
            self._count_alike()
        written = self.directory is not None
        check_worth(self.config, self.dense, self.pruned, self.earlier, written=written)
        if self.yardstick is not None:
            with self.clock("evaluate"):
                self.divergence = self.yardstick.divergence(self.layers)

    def _count_alike(self) -> None:
        """Express what was measured before the trimming per token of the result."""
        assert self.dense is not None and self.pruned is not None
        own, new = self.dense, self.pruned
        self.own_tokens, self.dense = own, own.per_token_of(new)
        if self.earlier is not None:
            before, after = ((self.config.eval, p.seq_len, p.windows) for p in (own, new))
            longer = new.bytes_per_token / own.bytes_per_token
            self.earlier = self.earlier.in_other_tokens(before, after, longer)

    def _routing(self) -> dict[str, Any] | None:
        """The routed shares of kept experts before and after; warns where the routing collapsed."""
        if not (self.shares.get("before") and self.shares.get("after")):
            return None
        layers = shares_record(self.plan, self.shares["before"], self.shares["after"])
        findings = collapse(layers)
        for sentence in findings:
            log.warning("%s", sentence)
        return {"layers": layers, "findings": findings}

    def record(self) -> PruneRecord:
        """What is known of the run so far."""
        config, plan = self.config, self.plan
        found = _latency(self) if self.table is not None else None
        trimmed = 0 if self.vocabulary is None else self.vocabulary.params
        record = PruneRecord(
            model=config.model or type(self.model).__name__,
            params={
                "before": self.params,
                "after": self.params - self.removed - trimmed,
                "block_before": self.block,
                "block_after": self.block - self.removed,
            },
            ratio={
                "requested": _ratio(self.budget, self.block),
                "achieved": self.removed / self.block,
            },
            bytes={"before": self.bytes, "after": saved_bytes(self.model, plan.result())},
            perplexity=_perplexities(config.eval, self.dense, self.pruned, self.own_tokens),
            vocabulary=None if self.vocabulary is None else self.vocabulary.to_dict(),
            layers=_layers(self.sizes, plan),
            routing=self._routing(),
            divergence=None
            if self.made.divergence is None
            else {"predicted": self.made.divergence, "actual": self.divergence},
            latency=found,
            seconds=self.clock.totals(STAGES),
            peak_memory_bytes=self.processes.largest(peak_memory_bytes(self.layers.device)),
            processes=self.processes.count,
            versions=versions(),
            command=command_line(),
            settings=settings(config),
            **(facts(self.model, plan, config) if config.dry_run else {}),
        )
        if self.budget is not None:
            record.budget = _budget(self.budget, record)
        conclude(record, config, self.earlier)
        for line in prune_lines(record.to_dict()):
            log.info("%s", line)
        return record


def check_layout(model: nn.Module, config: PruneConfig) -> None:
    """InputError when no model like ``model``, which must be of a supported family, can have the
    layout that ``config`` asks for.
    """
    family_of(model)
    planned = config.plan is None and not config.only_trims
    if config.layout != "uniform" and planned and (why := one_size_only(model)):
        raise InputError(why)
    if config.target_latency is not None and is_adopted(model.config):
        raise InputError(
            f"--target-latency: no latency is predicted of a '{model.config.model_type}', for that "
            "type has no declaration; use --ratio, --target-params or --target-bytes"
        )
    if config.layout == "deci" and (reason := obstacle(model.config)):
        raise InputError(f"--layout deci: {reason}; use --layout per-layer or uniform")


def _ratio(budget: Budget | None, block: int) -> float | None:
    """The budget as a share of ``block`` parameters, where it is one of parameters."""
    return None if budget is None or budget.table is not None else budget.need / block


def _latency(run: PruneRun) -> dict[str, float | int | None]:
    """Milliseconds a token at batch 1: dense, as the table foresaw, and of the pruned model."""
    table, after = run.table, None
    assert table is not None
    with run.clock("evaluate"):
        if not run.config.dry_run:
            after = run.processes.by_first(partial(latency.measure_again, run.model, table))
    return {
        "before": run.milliseconds,
        "predicted": table.predicted(run.plan.result()),
        "after": after,
        "context": table.context,
        "threads": torch.get_num_threads(),
    }


def _budget(budget: Budget, record: PruneRecord) -> dict[str, Any]:
    """What was asked for and what was reached, in the budget's own unit."""
    achieved = {
        "ratio": record.ratio["achieved"],
        "parameters": record.params["after"],
        "bytes": record.bytes["after"],
        "ms/token": (record.latency or {}).get("after"),
    }[budget.unit]
    if budget.table is not None and achieved is not None and achieved > budget.requested:
        log.warning(
            "decoding takes %.3g ms a token, above the %.3g asked for: the prediction or the "
            "clock was off; ask for less to be sure",
            achieved,
            budget.requested,
        )
    return {"unit": budget.unit, "requested": budget.requested, "achieved": achieved}


def _perplexities(
    text: str, dense: Perplexity | None, pruned: Perplexity | None, own: Perplexity | None
) -> list[dict[str, Any]]:
    """The figures of both models; ``own`` is the dense one's per token of its own vocabulary, where
    the result has another."""
    if dense is None or pruned is None:
        return []
    found = {
        "text": text,
        "seq_len": dense.seq_len,
        "windows": dense.windows,
        "before": dense.perplexity,
        "after": pruned.perplexity,
    }
    if own is not None:
        found["before_own_tokens"] = own.perplexity
        found["bits_per_byte_before"] = own.bits_per_byte
        found["bits_per_byte_after"] = pruned.bits_per_byte
    return [found]


def _layers(sizes: list[Geometry], plan: Plan) -> list[dict[str, int]]:
    return [
        {
            "index": i,
            "query_heads": g.query_heads,
            "kv_heads": g.kv_heads,
            "channels": g.channels,
            "query_heads_before": before.query_heads,
            "kv_heads_before": before.kv_heads,
            "channels_before": before.channels,
            **({"experts": g.experts, "experts_before": before.experts} if before.experts else {}),
        }
        for i, (g, before) in enumerate(zip(plan.result(), sizes, strict=True))
    ]
