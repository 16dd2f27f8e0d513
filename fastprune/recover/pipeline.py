"""The `finetune` command, start to end: load → check → stages with gates → measure → save."""

from __future__ import annotations

import logging
import math
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune.data.describe import describe
from fastprune.data.encode import Encoder
from fastprune.data.instruct import has_template, template_of
from fastprune.data.training import TrainingData
from fastprune.distributed import joined
from fastprune.errors import InputError
from fastprune.inspect.generate import generate, read_prompts, stop_at_end_of_turn
from fastprune.inspect.health import check_weights
from fastprune.inspect.memory import peak_memory_bytes
from fastprune.inspect.perplexity import (
    evaluate,
    sound,
    window_length,
)
from fastprune.inspect.record import Origin
from fastprune.messages import Message
from fastprune.models.adapter import fold
from fastprune.models.checkpoint import check_savable, save_checkpoint
from fastprune.models.checks import layer_parameters
from fastprune.models.load import load_or_start
from fastprune.models.multimodal import text_part
from fastprune.models.readback import check_read_back
from fastprune.models.seq2seq import is_seq2seq
from fastprune.models.vocabulary import check_largest, grow_embeddings
from fastprune.output import check_place
from fastprune.precision import convert_weights
from fastprune.progress import log as progress_log
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.distill import load_teacher
from fastprune.recover.early import check_inputs
from fastprune.recover.evaluation import perplexity_windows
from fastprune.recover.folder import RunFolder
from fastprune.recover.guard import bits
from fastprune.recover.held_out import held_out_figures
from fastprune.recover.loggers import check_logger
from fastprune.recover.loop import GradientHook
from fastprune.recover.lora import save_adapter
from fastprune.recover.moments import left_moments
from fastprune.recover.objective import autocast_dtype, warn_of_slow
from fastprune.recover.outcome import (
    check_changed,
    check_gain,
    check_gates,
    outcome,
    warn_of_broken,
)
from fastprune.recover.processes import (
    check_shardable,
    own_device,
    shards,
    take_over_sharding,
)
from fastprune.recover.recipes import Recipe, Stage, load_recipe
from fastprune.recover.stage import Course, data_kind, gate_passed, put_back, run_stage, snapshot
from fastprune.report.finetune import write_finetune_report
from fastprune.report.run import Clock, command_line, settings, versions, write_json
from fastprune.report.summary import recovery_lines, verdict_lines
from fastprune.sharding import is_sharded
from fastprune.workplace import claimed

log = logging.getLogger("fastprune")

STAGES = ("load", "data", "evaluate", "train", "save")
SAMPLE_TOKENS = 64  # of a continued prompt


@dataclass
class FinetuneResult:
    """What `finetune` made. ``model`` was trained in place; after a LoRA stage at the end it is a
    PeftModel around what was given, and `adapter` is true."""

    model: nn.Module
    tokenizer: Any
    metrics: dict[str, Any]
    adapter: bool = False
    out: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """The metrics, and where the checkpoint and the report lie."""
        where = {} if self.out is None else {"out": str(self.out)}
        return {**self.metrics, **where}


def run_finetune(config: FinetuneConfig) -> FinetuneResult:
    """Load, finetune, evaluate and save: the `finetune` command.

    Raises InputError, GateError or NumericalError; KeyboardInterrupt after an interrupt, with the
    state saved. The model's files in ``config.out`` are complete or not there.
    """
    if not config.model:
        raise InputError("no MODEL given: name a directory, a hub id, a .gguf file or smollm2-135m")
    if (out := config.out) is None:
        raise InputError("--out DIR is needed")
    config = take_over_sharding(config)
    recipe = _checked(config)
    check_place(out)
    with (
        joined(config.device) as processes,
        claimed(out) if processes.first else nullcontext() as claim,
    ):
        folder = RunFolder.open(config, processes)
        folder.claim = claim
        processes.wait()  # all have seen the folder as it was
        with folder.keeping_log():
            return _run(config, recipe, folder)


def _run(config: FinetuneConfig, recipe: Recipe, folder: RunFolder) -> FinetuneResult:
    """`run_finetune` in the run's `folder`."""
    clock, base, processes = Clock(), config.model, folder.processes
    sharded = shards(config, processes)
    with clock("load"):
        model, tokenizer = load_or_start(
            base,
            dtype=config.dtype,
            device=torch.device("cpu") if sharded else own_device(config.device, processes),
            allow_pickle=config.allow_pickle,
            trust_remote_code=config.trust_remote_code,
            tokenizer=config.tokenizer,
        )
    check_savable(model, tokenizer)
    check_shardable(model, config, processes)
    result = _finetune(model, tokenizer, config, recipe, folder, clock)
    result.out = config.out
    if processes.first:
        with clock("save"):

            def write(directory: Path) -> None:
                _write(directory, result, base)
                if config.read_back:
                    adapter_of = base if result.adapter else None
                    check_read_back(result.model, directory, adapter_of)
                result.metrics["seconds"] = clock.totals(STAGES)
                _record(directory / "fastprune", result, folder)

            folder.finish(write)
    return result


def finetune(
    model: nn.Module,
    tokenizer: Any,
    config: FinetuneConfig,
    *,
    gradient_hook: GradientHook | None = None,
) -> FinetuneResult:
    """Finetune ``model`` in place on ``config.data`` and measure it before and after; of a
    multimodal model its decoder, which the result holds.

    Nothing is written: the state lives in a temporary folder, ``config.out`` is not used.
    ``gradient_hook`` is called with (step, model) when the gradients of a step are complete. Raises
    as `run_finetune`; after a GateError ``model`` holds what was trained, not what it began with.
    """
    config = take_over_sharding(config)
    recipe = _checked(config)
    with (
        joined(config.device) as processes,
        tempfile.TemporaryDirectory(prefix="fastprune-") as records,
    ):
        folder = RunFolder(Path(records), config, processes)
        own = text_part(model)
        return _finetune(own, tokenizer, config, recipe, folder, Clock(), gradient_hook)


def _checked(config: FinetuneConfig) -> Recipe:
    config.check()
    if not config.data:
        raise InputError("--data DATA is needed: a file, a folder, hf:NAME or a short name")
    check_logger(config.log_to)
    if config.prompt is not None:
        read_prompts(config.prompt)  # an unreadable file is told now
    data_kind(config)
    recipe = load_recipe(config)
    check_inputs(config)
    if config.resize_embeddings and any(stage.method == "lora" for stage in recipe.stages):
        raise InputError(
            "--resize-embeddings changes the model itself, which an adapter is not: finetune all "
            "weights (--method full) first"
        )
    return recipe


def _finetune(
    model: nn.Module,
    tokenizer: Any,
    config: FinetuneConfig,
    recipe: Recipe,
    folder: RunFolder,
    clock: Clock,
    gradient_hook: GradientHook | None = None,
) -> FinetuneResult:
    device = own_device(config.device, folder.processes)
    recipe = _fitted(recipe, config, model)
    if config.resize_embeddings:
        grow_embeddings(model, tokenizer, config.seed)
    saved_dtype, given = model.dtype, bits(model.parameters())
    dtypes = {autocast_dtype(s.precision, device) for s in recipe.stages}
    warn_of_slow(dtypes, device)
    if None in dtypes:
        model.float()  # fp32 throughout; what is saved is rounded back
    if (start := folder.start_weights()) is not None:
        put_back(model, start)
    else:
        check_weights(model)
    with clock("evaluate"):
        windows = perplexity_windows(config, model, tokenizer)
    course = Course(
        config,
        tokenizer,
        folder,
        device,
        windows=windows,
        teacher=_teacher(config, tokenizer, device, clock, shard=shards(config, folder.processes)),
        seq2seq=is_seq2seq(model),
        origin=Origin.of(config.model),
        sample=lambda m, step: _continue(m, course, step),
        gradient_hook=gradient_hook,
        moments=left_moments(model, config.model) if _begins_full(recipe, folder) else {},
    )
    with clock("data"):
        _prepare(model, course, recipe.stages[folder.record["stage"] :])
    folder.begin()
    _measure_before(model, course, recipe.stages[-1], clock)
    block = layer_parameters(model)
    model = _stages(model, recipe, course, clock)
    check_gates(config, folder)
    if config.prompt is not None:
        course.sample(course.placed(model), None)
    test = _tested(model, course, recipe.stages[-1])
    check_weights(model)
    _measure_validation(model, course, recipe.stages[-1], "after")
    check_gain(course, folder.perplexity())
    adapter = hasattr(model, "peft_config")
    if not adapter:
        convert_weights(model, saved_dtype)
        check_changed(model, given, folder.record["results"])
    metrics = _metrics(model, recipe, course, clock) | ({} if test is None else {"test": test})
    metrics["params"]["block"] = block
    for line in (*recovery_lines(metrics), *verdict_lines(metrics)):
        log.info("%s", line)
    return FinetuneResult(model.eval(), tokenizer, metrics, adapter)


def _measure_before(model: nn.Module, course: Course, stage: Stage, clock: Clock) -> None:
    """Note perplexity and held-out loss before training, unless a continued run has them."""
    _measure_validation(model, course, stage, "before")
    windows, record = course.windows, course.folder.record
    if windows is None or "before" in record:
        return
    with clock("evaluate"):
        measured = evaluate(course.placed(model), windows)
        record["before"] = sound(
            measured, model, Message("the loss before any training")
        ).perplexity
    warn_of_broken(model, course, record["before"])


def _measure_validation(model: nn.Module, course: Course, stage: Stage, when: str) -> None:
    """Note the loss on held-out answers before and after all training, where there are some.

    Of text the perplexity of --eval says as much. A run that is continued keeps what was before.
    """
    record = course.folder.record
    data = course.data_of(stage)
    if data.kind == "text" or data.validation is None or course.windows is None:
        return
    if when == "before" and "validation" in record:
        return
    figures = _held_out(model, course, stage, replace(data, train=data.validation))
    loss = figures["loss"]
    record.setdefault("validation", {})[when] = math.inf if loss is None else loss


def _held_out(
    model: nn.Module, course: Course, stage: Stage, data: TrainingData, bleu_samples: int = 0
) -> dict[str, Any]:
    return held_out_figures(
        course.placed(model),
        course.tokenizer,
        data,
        dtype=autocast_dtype(stage.precision, course.device),
        batch_size=stage.batch_size,
        bleu_samples=bleu_samples,
    )


def _teacher(
    config: FinetuneConfig, tokenizer: Any, device: torch.device, clock: Clock, *, shard: bool
) -> nn.Module | None:
    """The model to learn from besides the text, where one is named."""
    if config.teacher is None:
        return None
    with clock("load"):
        return load_teacher(
            config.teacher,
            tokenizer,
            device=device,
            allow_pickle=config.allow_pickle,
            trust_remote_code=config.trust_remote_code,
            words=config.tokenizer,
            shard=shard,
        )


def _metrics(model: nn.Module, recipe: Recipe, course: Course, clock: Clock) -> dict[str, Any]:
    """What metrics.json says of the run that ended with ``model``."""
    config, record, windows = course.config, course.folder.record, course.windows
    after, adapter = course.folder.perplexity(), hasattr(model, "peft_config")
    total = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    perplexity = []
    if windows is not None:
        perplexity.append(
            {
                "text": config.eval,
                "seq_len": windows.shape[1],
                "windows": len(windows),
                "before": record["before"],
                "after": after,
            }
        )
    return {
        "model": config.model or type(model).__name__,
        "data": {"spec": config.data, **next(iter(course.data.values())).to_dict()}
        if course.data
        else {"spec": config.data},
        "recipe": {"name": recipe.name, "about": recipe.about},
        "params": {
            "total": total,
            "learning": max((r["learning_parameters"] for r in record["results"]), default=0),
        },
        "perplexity": perplexity,
        **outcome(course, after, total, adapter=adapter),
        **({"validation": record["validation"]} if "validation" in record else {}),
        "stages": record["results"],
        "samples": record.get("samples", []),
        "seconds": clock.totals(STAGES),
        "peak_memory_bytes": peak_memory_bytes(course.device),
        "versions": versions(),
        "command": command_line(),
        "settings": settings(config),
    }


def _begins_full(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the first stage is yet to come, and trains the weights themselves."""
    return folder.record["stage"] == 0 and recipe.stages[0].method == "full"


def _tested(model: nn.Module, course: Course, stage: Stage) -> dict[str, Any] | None:
    """The figures of the finished `model` on --test-data, in windows of the last `stage`."""
    data = course.test_data(stage)
    if data is None:
        return None
    for part in data.parts:
        check_largest(model, course.tokenizer, part.largest, part.name)
    figures = _held_out(model, course, stage, data, stage.bleu_samples)
    log.info("%s: loss %s on %d samples", course.config.test_data, figures["loss"], len(data.train))
    return {"data": course.config.test_data, **figures}


def _fitted(recipe: Recipe, config: FinetuneConfig, model: nn.Module) -> Recipe:
    """`recipe` with no window longer than the model has positions. InputError for --seq-len."""
    stages = (
        replace(s, seq_len=window_length(model, "--seq-len", config.seq_len, s.seq_len))
        for s in recipe.stages
    )
    return replace(recipe, stages=tuple(stages))


def _prepare(model: nn.Module, course: Course, stages: tuple[Stage, ...]) -> None:
    """Tokenise and check what `stages` learn from, and say what it is.

    Where it has answers, the tokenizer keeps the wording they are asked in, and the model ends what
    it generates where they end. Raises InputError.
    """
    for stage in stages:
        for part in course.data_of(stage).parts:
            check_largest(model, course.tokenizer, part.largest, part.name)
    if not course.data:
        return
    data = next(iter(course.data.values()))
    for line in describe(data, course.tokenizer):
        progress_log.info("%s", line)
    if data.kind != "text" and not course.seq2seq:
        stop_at_end_of_turn(model, course.tokenizer)
        if not has_template(course.tokenizer):
            course.tokenizer.chat_template = template_of(course.tokenizer)


def _stages(model: nn.Module, recipe: Recipe, course: Course, clock: Clock) -> nn.Module:
    """Run the stages that are left, each from the best state so far; the model as it ends."""
    folder, record = course.folder, course.folder.record
    for number in range(record["stage"], len(recipe.stages)):
        stage = recipe.stages[number]
        last = number + 1 == len(recipe.stages)
        before = snapshot(model) if stage.gate is not None and stage.method == "full" else None
        with clock("train"):
            run = run_stage(model, stage, number, course)
        if run.interrupted:
            raise KeyboardInterrupt
        result = run.result
        standing = folder.perplexity()
        result["perplexity"] = {"before": standing, "after": None}
        if course.windows is not None:
            with clock("evaluate"):
                measured = evaluate(course.placed(run.model), course.windows)
                result["perplexity"]["after"] = measured.perplexity
        kept = gate_passed(stage, standing, result["perplexity"]["after"])
        result["kept"] = kept
        if kept:
            if course.windows is not None:
                sound(measured, run.model, Message("the loss after {stage}", stage=stage.name))
            alone = last and all(not r["kept"] for r in record["results"])
            # Another stage follows, or another one came before: a whole model goes on.
            model = run.model if stage.method == "full" or alone else fold(run.model)
        else:
            log.warning(
                Message(
                    "{stage}: perplexity {after:.2f} after, {before:.2f} before, gate {gate:g}: "
                    "rolled back",
                    stage=stage.name,
                    after=result["perplexity"]["after"],
                    before=standing,
                    gate=stage.gate,
                )
            )
            if before is None:
                model = run.model.unload()
            else:
                put_back(model, before)
        if not hasattr(model, "peft_config"):
            model.requires_grad_(True)
        ends = last or (not kept and stage.on_worse == "stop")
        folder.add_result(result)
        if ends:
            if left_out := [s.name for s in recipe.stages[number + 1 :]]:
                log.warning("left out: %s", ", ".join(left_out))
            break
        folder.next_stage(model)
    return model


def _continue(model: nn.Module, course: Course, step: int | None) -> None:
    """Note how the model as it is now continues the prompts; `step` None at the end.

    They are put to it as the training data put theirs.
    """
    config, folder, tokenizer = course.config, course.folder, course.tokenizer
    if config.prompt is None or not (course.processes.first or is_sharded(model)):
        return
    encoder, kind = Encoder(tokenizer, course.seq2seq), next(iter(course.data.values())).kind
    stage = folder.record["stage"] if step is not None else None
    kept = [s for s in folder.record.get("samples", []) if (s["stage"], s["step"]) != (stage, step)]
    for prompt in read_prompts(config.prompt):
        asked = encoder.prompt(prompt, kind)
        text = generate(model, tokenizer, asked, SAMPLE_TOKENS, seed=config.seed).text
        log.info("step %s: %r → %r", "end" if step is None else step, prompt, text)
        kept.append({"stage": stage, "step": step, "prompt": prompt, "text": text})
    folder.record["samples"] = kept
    folder.save()


def _write(directory: Path, result: FinetuneResult, base: str) -> None:
    """The checkpoint, or the adapter, into `directory`."""
    if result.adapter:
        save_adapter(result.model, directory, base)
        result.tokenizer.save_pretrained(directory)
    else:
        save_checkpoint(result.model, result.tokenizer, directory)


def _record(directory: Path, result: FinetuneResult, folder: RunFolder) -> None:
    directory.mkdir()
    write_json(directory / "metrics.json", result.metrics)
    write_finetune_report(directory / "report.html", result.metrics, folder.lines())
