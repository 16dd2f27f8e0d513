"""Zero-shot and few-shot tasks, computed by lm-evaluation-harness on a model in memory.

A task is a name that the harness knows, whose items it fetches from the hub, or a task file of the
user's own (`FILE.yaml`, in the harness's form). Where `--tasks-data` names a folder, the tasks
defined in `tasks/*.yaml` here read their items from its `NAME.jsonl` instead, without a network.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from fastprune.bounds import STEPS, Range, check_ranges
from fastprune.config import Group
from fastprune.data.records import read_file
from fastprune.errors import InputError
from fastprune.models.quiet import quiet_libraries
from fastprune.models.seq2seq import is_seq2seq
from fastprune.progress import stage
from fastprune.readers import read_yaml

FOLDER = Path(__file__).with_name("tasks")
EXTRA = "fastprune[eval]"
BATCH_ITEMS = 8
"""Requests in one forward pass where no batch size is given."""
BOOTSTRAPS = 1000
"""Samples behind the standard error of metrics that have no formula for it."""
METRICS = ("acc", "acc_norm", "exact_match", "f1", "word_perplexity", "perplexity")
"""The metrics people look at first, in this order; a task's others follow."""


@dataclass(kw_only=True)
class TaskOptions:
    """Which tasks to evaluate, and how."""

    tasks: tuple[str, ...] = ()
    """also evaluate these tasks of lm-evaluation-harness (pip install 'fastprune[eval]'), for
    example arc_easy,piqa, or task files of your own (FILE.yaml)"""
    tasks_data: Annotated[Path | None, Group.TASKS] = None
    """folder with arc_easy.jsonl, piqa.jsonl, lambada.jsonl: these tasks read their items there
    instead of from the hub"""
    task_limit: Annotated[int | None, Group.TASKS, STEPS] = None
    """evaluate only the first so many items of each task"""
    task_fewshot: Annotated[int | None, Group.TASKS, Range(0, 10_000)] = None
    """solved examples before each item (default: what the task says, mostly none)"""

    def check_tasks(self) -> None:
        """InputError when a value is out of range, or the harness is not installed."""
        check_ranges(self)
        if not self.tasks:
            return
        if self.tasks_data is not None and not self.tasks_data.is_dir():
            raise InputError(f"--tasks-data {self.tasks_data}: no such folder")
        for name in self.tasks:
            if (name.endswith((".yaml", ".yml")) or "/" in name) and not os.path.isfile(name):
                raise InputError(f"--tasks {name}: no such task file; check the path")
        _harness()


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    options: TaskOptions,
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The metrics of `model` on every task of `options`, by the name of the task.

    Each has `metrics` (a value and its `stderr`, None where there is none, by name), `items`,
    `fewshot` and `seed`; groups of tasks have what the harness averages over them. `batch_size`
    counts requests in one forward pass. The model stays as it is, and so do the random states of
    torch, numpy and Python. Raises InputError for a task that is unknown or cannot be read, or
    when the harness is missing.
    """
    options.check_tasks()
    harness = _harness()
    names = ", ".join(Path(name).stem for name in options.tasks)
    training = model.training
    with _undisturbed(), stage(f"evaluating {names}"):
        tasks = _load(options)
        wrapped = harness.models.huggingface.HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="seq2seq" if is_seq2seq(model) else "causal",
            batch_size=batch_size or BATCH_ITEMS,
        )
        try:
            found = harness.simple_evaluate(
                wrapped,
                tasks=tasks,
                task_manager=_index(whole=False),
                num_fewshot=options.task_fewshot,
                limit=options.task_limit,
                log_samples=False,
                bootstrap_iters=BOOTSTRAPS,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        finally:
            model.train(training)
    return {name: _measured(name, found, seed) for name in found["results"]}


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(
            f"--tasks needs lm-evaluation-harness: pip install '{EXTRA}' ({error})"
        ) from error
    return lm_eval


def _load(options: TaskOptions) -> list[Any]:
    """The tasks and groups of tasks that `options` names, with their items. Raises InputError."""
    own = {file.stem for file in FOLDER.glob("*.yaml")} if options.tasks_data else set()
    tasks: list[Any] = []
    for name in options.tasks:
        spec: Any = name
        if name in own:
            assert options.tasks_data is not None  # else there are no own ones
            spec = _local(name, options.tasks_data / f"{name}.jsonl")
        try:
            try:
                loaded = _index(whole=False).load([spec])
            except KeyError:  # a name of the harness, or a file that uses one
                loaded = _index(whole=True).load([spec])
        except Exception as error:  # whatever a task file or the hub leads to
            if isinstance(error, KeyError) and not Path(name).is_file():
                raise InputError(
                    f"--tasks {name}: lm-evaluation-harness has no task of this name, and there is "
                    "no such file; `lm_eval ls tasks` lists its tasks"
                ) from error
            reason = next(iter(str(error).splitlines()), "")
            raise InputError(
                f"--tasks {name}: cannot be loaded ({type(error).__name__}: {reason}); the items "
                "of most tasks come from the hub, so check the network, or see --tasks-data"
            ) from error
        groups = loaded.get("groups", {})
        inner = {child for group in groups.values() for child in group.child_names}
        tasks += [group for key, group in groups.items() if key not in inner]
        tasks += [] if groups else loaded["tasks"].values()
    return tasks


@cache
def _index(*, whole: bool) -> Any:
    """The harness's tasks by name; the `whole` index takes seconds to make, without it none is."""
    return _harness().tasks.TaskManager(include_defaults=whole)


def _local(name: str, file: Path) -> dict[str, Any]:
    """The definition of the task `name` here, with the items in `file`. Raises InputError."""
    import datasets

    definition = read_yaml(FOLDER / f"{name}.yaml")
    fields = definition["metadata"]["fields"]
    if not file.is_file():
        raise InputError(f"--tasks {name}: {file} is not there, where --tasks-data has its items")
    items = []
    for record in read_file(file):
        if not isinstance(record.value, Mapping) or not record.value.keys() >= set(fields):
            raise InputError(f"{record.where}: not an object with the fields {', '.join(fields)}")
        items.append({field: record.value[field] for field in fields})
    if not items:
        raise InputError(f"{file}: no items in it")
    content = {definition["test_split"]: datasets.Dataset.from_list(items)}
    return {**definition, "custom_dataset": lambda **_: content}


def _measured(name: str, found: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What the harness says of one task: keys as `evaluate_tasks` promises."""
    values = found["results"][name]
    metrics = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            number = stderr if isinstance(stderr, (int, float)) else None
            metrics[label] = {"value": value, "stderr": number}
    order = {metric: place for place, metric in enumerate(METRICS)}
    return {
        "metrics": dict(sorted(metrics.items(), key=lambda item: order.get(item[0], len(order)))),
        "items": found["n-samples"].get(name, {}).get("effective"),
        "fewshot": found["n-shot"].get(name),
        "seed": seed,
    }


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps random states as they are, and what the harness says off the console."""
    log = logging.getLogger("lm_eval")
    level, python, numbers = log.level, random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    log.setLevel(logging.CRITICAL)
    try:
        with (
            quiet_libraries(),
            torch.random.fork_rng(devices),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        log.setLevel(level)
        random.setstate(python)
        np.random.set_state(numbers)
