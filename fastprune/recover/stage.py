"""One stage of a recipe: data, what learns, the learning rate, the training, the best weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.data.columns import Columns
from fastprune.data.training import Collator, Reading, TrainingData, training_data
from fastprune.distributed import Processes
from fastprune.errors import InputError, NumericalError
from fastprune.inspect.bleu import check_installed
from fastprune.inspect.conclude import risen
from fastprune.inspect.findings import LARGE
from fastprune.inspect.generate import pad_token
from fastprune.inspect.record import Origin
from fastprune.models.families import PRUNED_PREFIX
from fastprune.models.script_optimizer import Moments
from fastprune.progress import log as progress_log
from fastprune.recover.checkpoints import checkpoints, step_of
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.distill import Distiller
from fastprune.recover.evaluation import Samples
from fastprune.recover.folder import RunFolder
from fastprune.recover.freeze import freeze, warmup_steps
from fastprune.recover.guard import bits
from fastprune.recover.loop import GradientHook, Hooks, Loop
from fastprune.recover.lora import attach
from fastprune.recover.monitor import Monitor
from fastprune.recover.objective import Objective, autocast_dtype
from fastprune.recover.pace import PASSES, Timetable, seconds_per_step
from fastprune.recover.processes import first_of_node_first, shards
from fastprune.recover.range_test import range_test
from fastprune.recover.recipes import Stage
from fastprune.recover.steps import StepCounts
from fastprune.report.format import duration
from fastprune.sharding import bring_back, sharded_copy
from fastprune.space import check_space

log = logging.getLogger("fastprune")

Sampler = Callable[[nn.Module, int | None], None]
"""(model, optimizer step, None at the end) -> None: continues the prompts."""

CHECKPOINT_BYTES = 12
"""Of a weight that learns: its value and its two moments in fp32."""
GROWTH = 10.0
"""Times the largest weight before: larger ones were not learnt."""


@dataclass
class Course:
    """What the stages of a run share."""

    config: FinetuneConfig
    tokenizer: Any
    folder: RunFolder
    device: torch.device
    windows: Tensor | None = None
    """(n, s) token ids whose perplexity is measured"""
    teacher: nn.Module | None = None
    sample: Sampler = lambda model, step: None
    gradient_hook: GradientHook | None = None
    origin: Origin | None = None
    """the dense model that the model goes back to, where that is known"""
    seq2seq: bool = False
    """the model reads prompts with an encoder: its data are pairs"""
    moments: Moments = field(default_factory=dict)
    """where the optimizer of the first stage begins, by the name of a parameter"""
    data: dict[tuple[Any, ...], TrainingData] = field(default_factory=dict)

    @property
    def processes(self) -> Processes:
        """Those that train together."""
        return self.folder.processes

    def data_of(self, stage: Stage) -> TrainingData:
        """The training data of `stage`; stages that want the same share it.

        Of several processes the first on each node tokenises, the others read what it has cached.
        """
        key = (stage.seq_len, stage.samples, stage.val_size)
        if key not in self.data:
            with first_of_node_first(self.processes):
                found = self._read(self.config.data, stage, stage.samples, stage.val_size)
                if self.config.val_data is not None:
                    held_out = self._read(self.config.val_data, stage)
                    parts = [*found.parts, *held_out.parts]
                    found = replace(found, validation=held_out.train, parts=parts)
                self.data[key] = found
        return self.data[key]

    @property
    def teaches_answers(self) -> bool:
        """Whether anything but text is learnt, as far as the data has been read."""
        return any(data.kind != "text" for data in self.data.values())

    def test_data(self, stage: Stage) -> TrainingData | None:
        """What the finished model is measured on, in windows of `stage`; None without any."""
        if self.config.test_data is None:
            return None
        with first_of_node_first(self.processes):
            return self._read(self.config.test_data, stage)

    def _read(
        self, spec: str, stage: Stage, samples: int | None = None, val_size: float = 0
    ) -> TrainingData:
        reading = Reading(
            seq_len=stage.seq_len,
            samples=samples,
            val_size=val_size,
            kind=data_kind(self.config),
            seed=self.config.seed,
            seq2seq=self.seq2seq,
        )
        return training_data(spec, self.tokenizer, reading)

    def placed(self, model: nn.Module) -> nn.Module:
        """`model` on the device: itself, or under --shard a copy spread over the processes.

        Such a copy has weights of its own. All processes must call it.
        """
        if shards(self.config, self.processes):
            return sharded_copy(model, self.device)
        return model.to(self.device)


def data_kind(config: FinetuneConfig) -> str | Columns:
    """What the data is: as `config` says, or the columns it names. InputError for both."""
    if not config.columns:
        return config.kind
    if config.kind != "auto":
        raise InputError("--columns says what the data is: leave out --kind")
    return Columns.parse(config.columns)


@dataclass
class StageRun:
    """What a trained stage leaves behind; its weights are in `model` already."""

    model: nn.Module
    """with LoRA matrices beside its weights where the stage was of that kind"""
    result: dict[str, Any]
    interrupted: bool


def run_stage(model: nn.Module, stage: Stage, number: int, course: Course) -> StageRun:
    """Train `model` as `stage` says, from the beginning or from the folder's checkpoint.

    Raises InputError, or NumericalError when the guard gives up, when no step changed a weight, and
    when the weights grew out of all proportion.
    """
    data = course.data_of(stage)
    stage = _with_answers(stage, data)
    if stage.method == "lora":
        torch.manual_seed(course.config.seed)  # the same matrices in all processes
        model = attach(model, stage)
    learning = freeze(model, stage.freeze)
    if course.processes.first:
        _check_room(model, stage, course, number)
    trained, largest = course.placed(model), _largest(model)
    if course.config.gradient_checkpointing:
        _recompute_activations(trained)
    dtype = autocast_dtype(stage.precision, course.device)
    objective = Objective(trained, dtype, _distiller(model, stage, course), course.processes)
    collate = Collator(pad_token(model, course.tokenizer))
    folder = course.folder.stage_folder(number)
    found = None
    if stage.find_lr:
        stage, found = _find_rate(objective, stage, data, collate, course, number)
    batch = _first_batch(data, collate, stage, course.device)
    checkpoint = course.folder.checkpoint
    hooks = Hooks(
        _line_writer(course.folder, number),
        lambda step: course.sample(trained, step),
        course.gradient_hook,
        save=course.folder.sync_log,
    )
    if stage.minutes is not None:
        timetable = _timetable(objective, stage, batch, number, course.folder)
        stage = replace(stage, max_steps=timetable.steps(step_of(checkpoint)))
        hooks = replace(hooks, steps=timetable.look)
    course.folder.checkpoint = None  # the stages that follow begin at their beginning
    samples = Samples(data.train, collate, data.validation, course.windows, course.tokenizer)
    moments = course.moments if number == 0 and stage.method == "full" else None
    loop = Loop(objective, stage, course.config, samples, folder, hooks, moments)
    if checkpoint is None:
        seconds = None
        if not course.processes.several:
            seconds = seconds_per_step(objective, stage, batch) * loop.steps
        _announce(loop.counts, learning, seconds)
        unusual = loop.counts.unusual_for_answers() if data.kind != "text" else []
        if unusual:
            progress_log.info("usual for learning answers: %s", "; ".join(unusual))
    course.folder.cut_log(number, step_of(checkpoint) if checkpoint else -1)
    before = bits(p for p in trained.parameters() if p.requires_grad)
    _train(loop, checkpoint, folder if course.folder.lasting else None)
    if not loop.interrupted:
        _check_learnt(loop, before)
    loop.finish()
    best = _take_best(loop)
    if trained is not model:
        bring_back(trained, model)
    if not loop.interrupted:
        _check_size(model, stage, max(LARGE, GROWTH * largest))
    return StageRun(model, _result(loop, stage, learning, found, best), loop.interrupted)


def _check_room(model: nn.Module, stage: Stage, course: Course, number: int) -> None:
    """InputError where the disk has no room for the checkpoints of `stage` and for the result."""
    folder = course.folder
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    there = len(checkpoints(folder.stage_folder(number)))
    more = max(1, stage.keep_last + 1 - there)  # one is written before the oldest goes
    result = sum(p.nbytes for p in model.parameters() if folder.lasting)
    check_space(folder.records, more * CHECKPOINT_BYTES * learning + result, "what this run writes")


def _distiller(model: nn.Module, stage: Stage, course: Course) -> Distiller | None:
    """What `model` learns from the teacher by, where there is one."""
    if course.teacher is None:
        return None
    return Distiller(
        course.teacher,
        weight=stage.distill_weight,
        temperature=stage.distill_temperature,
        hidden_weight=stage.distill_hidden_weight,
        student=model,
    )


def _take_best(loop: Loop) -> int | None:
    """Put the best evaluated weights back; the step they are of, None where none was evaluated."""
    stage, monitor = loop.stage, loop.state.monitor
    if stage.eval_steps is None or monitor.best is None:
        return None
    best = monitor.best_step
    if best != loop.state.step and not loop.interrupted:
        progress_log.info("%s: the weights of step %d were the best, taken back", stage.name, best)
        loop.checkpoints.read_best()
    return best


def _check_learnt(loop: Loop, before: list[int]) -> None:
    """NumericalError when what learns still has the `bits` that it had before the first step.

    All processes must call it.
    """
    same = before == bits(p for p in loop.model.parameters() if p.requires_grad)
    if loop.processes.largest(int(not same)):
        return
    state, guard = loop.state, loop.state.guard
    skipped = int(loop.optimizer.skipped_steps)
    half = torch.float16 in {loop.objective.dtype, loop.model.dtype}
    if skipped and guard.rollbacks:
        why = (
            f"{skipped} had a non-finite loss or gradient, and the last sound state was the first. "
            "Lower --lr, or let --find-lr choose it"
        )
    elif skipped:
        why = f"{skipped} had a non-finite loss or gradient. " + (
            "Use --precision bf16 or fp32, or let it take more steps to find its loss scale"
            if half
            else "Look at the data and at the model: fastprune diagnose MODEL"
        )
    elif state.masked_batches:
        why = f"{state.masked_batches} had no token to learn from. Raise --seq-len"
    else:
        why = "all updates were too small for the weights' precision. Raise --lr"
    raise NumericalError(
        f"{loop.stage.name}: 0 of {state.step} steps changed the weights: {why}; "
        "nothing was kept, --resume never begins anew"
    )


def _largest(model: nn.Module) -> float:
    """The largest absolute value in the weights of `model`; NaN where one of them is."""
    sizes = torch.stack([p.detach().abs().max().float() for p in model.parameters()])
    return float(sizes.max())


def _check_size(model: nn.Module, stage: Stage, limit: float) -> None:
    """NumericalError where the weights that `stage` has trained are larger than `limit`.

    Where weights are that large, norms make all of them alike: the loss may be finite all the same.
    """
    largest = _largest(model)
    if not largest > limit:
        return
    rate = max(stage.layer_lrs, default=stage.lr)
    raise NumericalError(
        f"{stage.name}: the weights have grown to {largest:.3g} at the learning rate {rate:.3g}; "
        "nothing was kept. Lower --lr, or let --find-lr choose it, and begin anew with --resume "
        "never"
    )


def _result(
    loop: Loop,
    stage: Stage,
    learning: int,
    found: dict[str, Any] | None,
    best: int | None,
) -> dict[str, Any]:
    """What metrics.json says of the stage."""
    state, monitor, guard = loop.state, loop.state.monitor, loop.state.guard
    return {
        "name": stage.name,
        "gate": stage.gate,
        "method": stage.method,
        "learning_parameters": learning,
        "lr": list(stage.layer_lrs) or stage.lr,
        "range_test": found,
        "steps": state.step,
        "planned_steps": loop.steps,
        "stopped": state.stopped,
        "tokens": state.tokens,
        "seconds": loop.elapsed(),
        "loss": monitor.smooth,
        "best": None if best is None else _best(stage, monitor),
        "bleu": state.bleu,
        "skipped_steps": int(loop.optimizer.skipped_steps),
        "masked_batches": state.masked_batches,
        "rollbacks": guard.rollbacks,
        "lr_factor": guard.rate_factor,
        "findings": dict(monitor.said),
    }


def _best(stage: Stage, monitor: Monitor) -> dict[str, Any]:
    """Step and figure of the best evaluation, and what figure it is."""
    by_bleu = stage.best_by == "bleu"
    figure = monitor.best
    if by_bleu and figure is not None:
        figure = -figure  # the monitor takes what is lower for better
    return {"step": monitor.best_step, "figure": figure, "by": stage.best_by}


def _with_answers(stage: Stage, data: TrainingData) -> Stage:
    """`stage` as it is, or without BLEU where the data is text, which has no answers to compare."""
    if not stage.bleu_samples:
        return stage
    if data.kind != "text":
        check_installed()
        return stage
    log.warning("%s: the data is text, without prompts and answers: no BLEU", stage.name)
    return replace(stage, bleu_samples=0, best_by="loss")


def _find_rate(
    objective: Objective,
    stage: Stage,
    data: TrainingData,
    collate: Any,
    course: Course,
    number: int,
) -> tuple[Stage, dict[str, Any]]:
    """`stage` at the rate that a range test finds; a resumed run takes the one found before."""
    record = course.folder.record
    found = record.get("range_tests", {}).get(str(number))
    if found is None:
        found = range_test(
            objective,
            stage,
            data.train,
            collate,
            device=course.device,
            master=course.config.optimizer_master,
            seed=course.config.seed,
        ).to_dict()
        progress_log.info("learning rate %.2g: %s", found["chosen"], found["reason"])
        record.setdefault("range_tests", {})[str(number)] = found
        course.folder.save()
    return replace(stage, lr=found["chosen"]), found


def _timetable(
    objective: Objective, stage: Stage, batch: dict[str, Any], number: int, folder: RunFolder
) -> Timetable:
    """How many steps of stage `number` fit into its minutes, as the run's record goes on."""
    assert stage.minutes is not None
    decided = folder.record.setdefault("timed_steps", {}).setdefault(str(number), [])
    timetable = Timetable(stage.minutes, decided, folder.save, folder.processes)
    timetable.begin(lambda: seconds_per_step(objective, stage, batch, passes=PASSES))
    return timetable


def _train(loop: Loop, checkpoint: Path | None, folder: Path | None) -> None:
    """Take the steps that are left. An error names the newest checkpoint in `folder`, if any."""
    try:
        loop.run(checkpoint)
    except NumericalError as error:
        kept = [] if folder is None else checkpoints(folder)
        if not kept:
            raise
        raise NumericalError(f"{error}, in {kept[-1]}") from error


def _first_batch(
    data: TrainingData, collate: Collator, stage: Stage, device: torch.device
) -> dict[str, Any]:
    """A batch of the stage's size, to time a step with."""
    chosen = [data.train[i % len(data.train)] for i in range(stage.batch_size)]
    return {k: v.to(device) for k, v in collate(chosen).items() if isinstance(v, Tensor)}


def _announce(counts: StepCounts, learning: int, seconds: float | None) -> None:
    """Say before the start what is to be done, and about how long it will take in `seconds`."""
    stage, steps = counts.stage, counts.total
    warmup = warmup_steps(stage, steps)
    rate = ", ".join(f"{lr:.3g}" for lr in stage.layer_lrs) or f"{stage.lr:.3g}"
    progress_log.info(
        "%s: %d samples (%s), %d steps an epoch, %d steps in all, warm-up %d (%.0f %%), lr %s, "
        "%s parameters learn%s",
        stage.name,
        counts.samples,
        counts.describe(),
        counts.per_epoch,
        steps,
        warmup,
        100 * warmup / steps,
        rate,
        f"{learning:,}",
        "" if seconds is None else f"; about {duration(seconds)}",
    )


def _line_writer(folder: RunFolder, number: int) -> Callable[[dict[str, Any]], None]:
    return lambda line: folder.add_line({"stage": number, **line})


def _recompute_activations(model: nn.Module) -> None:
    """Keep layer inputs only and compute the rest again in the backward pass."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise InputError(f"--gradient-checkpointing: {type(model).__name__} cannot do it")
    kind = model.config.model_type.removeprefix(PRUNED_PREFIX)
    log.info("%s: activations are computed twice", kind)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Frozen embeddings pass no gradient on; a checkpointed layer needs inputs that ask for one.
    inner.enable_input_require_grads()
    enable = getattr(inner, "activation_checkpointing_enable", None)
    (enable or inner.gradient_checkpointing_enable)()


def gate_passed(stage: Stage, before: float | None, after: float | None) -> bool:
    """Whether the stage may stay, by the perplexities of the best state before and of its own."""
    if stage.gate is None or before is None or after is None:
        return True
    return math.isfinite(after) and not risen(before, after, stage.gate)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights of `model` on the host."""
    return {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()}


@torch.no_grad()
def put_back(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the parameters of `model` the values in `weights`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
