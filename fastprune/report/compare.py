"""Runs side by side: a table, and a Pareto plot for each text they were measured on.

A run is what `prune`, `finetune` or `merge` left, or the JSON of an `eval`.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.config import CommonConfig, Positional
from fastprune.errors import InputError
from fastprune.files import check_file
from fastprune.readers import read_json
from fastprune.report import format
from fastprune.report.html import environment
from fastprune.report.pareto import Point, figure, front
from fastprune.report.run import as_json, marked
from fastprune.workplace import NEW, claimed

NOT_SHOWN = (
    *(
        "model",
        "ratio",
        "target_params",
        "target_bytes",
        "target_latency",
        "eval",
        "eval_seq_len",
        "eval_windows",
    ),
    *("out", "overwrite", "json", "quiet", "verbose"),
    *("tokenizer", "allow_pickle", "trust_remote_code"),
)
"""Settings that the other columns show, and those that leave the result as it is."""
SAME_TEXT = 0.01
"""The perplexity of one model on one text differs by less than this share between precisions."""
PAGE = re.compile(rb"<title>\d+ (?:pruning )?runs? compared</title>")
"""What a page begins with, within its first kilobyte."""
UNITS = ("ratio", "parameters", "bytes", "ms/token")
"""Units of a run's budget."""
WANTED = "name folders that compress, prune, finetune or merge wrote, or the --json of an eval"
KINDS = ("compress", "prune", "finetune", "merge", "eval")
"""Commands whose runs compare."""
SIZES = ("before", "after", "block_before", "block_after")
LARGEST = 2**63  # of any whole number

Measurement = tuple[str, int, int]
"""A text, the tokens of a window, and the number of windows: what makes perplexities comparable."""


@dataclass(kw_only=True)
class CompareConfig(CommonConfig):
    """Put runs side by side: a table and a Pareto plot in one HTML file, and as JSON.

    For example:
        fastprune compare small recovered --out runs.html
        fastprune compare runs/* result.json --out runs.html
    """

    runs: Positional[tuple[Path, ...]] = ()
    """one or more folders that compress, prune, finetune or merge wrote, metrics.json files, or
    what eval wrote with --json"""
    out: Path
    """the .html file to write; a .json file of the same name goes beside it"""


def run_compare(config: CompareConfig) -> dict[str, Any]:
    """Read the runs, write the page and the JSON beside it, return what the JSON holds.

    Raises InputError for a run that is missing, broken or named twice, and for an `--out` that
    cannot be written or would replace something else; both files are complete or untouched.
    """
    if not config.runs:
        raise InputError(f"no run given: {WANTED}")
    _check_out(config)
    result = marked({"out": str(config.out), **compare(config.runs)})
    files = {
        config.out.with_suffix(".json"): as_json(result),
        config.out: render_comparison(result),
    }
    try:
        with claimed(config.out) as work:
            fresh = work / NEW
            fresh.mkdir()
            for path, text in files.items():
                (fresh / path.name).write_text(text, encoding="utf-8")
            _check_out(config)
            for path in files:
                os.replace(fresh / path.name, path)
    except OSError as error:
        raise InputError(f"--out {config.out}: cannot be written: {error.strerror}") from error
    return result


def compare(runs: Iterable[Path]) -> dict[str, Any]:
    """What the runs have in common and what not, as JSON-ready data. Raises InputError."""
    files = {run: _metrics_file(run) for run in dict.fromkeys(runs)}
    seen: dict[Path, Path] = {}
    for run in runs:
        first = seen.setdefault(files[run].resolve(), run)
        if first is not run:
            raise InputError(f"{run}: the same run as {first}; name each run once")
    found = [_read(file) for file in files.values()]
    names = _names(files)
    differing: dict[str, None] = {}  # each command has settings of its own
    for kind in KINDS:
        same = [metrics["settings"] for metrics in found if metrics["made_by"] == kind]
        differing.update(dict.fromkeys(_differing(same)))
    rows = [
        {
            "name": name,
            "file": str(file),
            **metrics,
            "settings": {key: metrics["settings"].get(key) for key in differing},
        }
        for name, file, metrics in zip(names, files.values(), found, strict=True)
    ]
    keys: dict[Measurement, None] = {}
    for row in rows:
        keys.update(dict.fromkeys(_key(p) for p in row["perplexity"]))
    return {"runs": rows, "measurements": [_measurement(key, rows) for key in keys]}


def render_comparison(result: dict[str, Any]) -> str:
    """The HTML page of what `compare` found."""
    runs = result["runs"]
    return environment.get_template("compare.html.j2").render(
        runs=[
            {
                **run,
                "by_text": [_measured(run, _key(m)) for m in result["measurements"]],
                "marked": [run["name"] in m["pareto"] for m in result["measurements"]],
                "budget": _budget_words(run["budget"]),
                "settings": {key: _words(value) for key, value in run["settings"].items()},
            }
            for run in runs
        ],
        kinds=len({run["made_by"] for run in runs}) > 1,
        budgets=any(run["budget"] and run["budget"]["unit"] != "ratio" for run in runs),
        settings=[key.replace("_", "-") for key in runs[0]["settings"]],
        models=sorted({run["model"] for run in runs}),
        measurements=[{**m, "f": _figure(m, runs)} for m in result["measurements"]],
    )


def _measurement(key: Measurement, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One text in one kind of window: the runs measured on it, and those worth having."""
    measured = [(row, _measured(row, key)) for row in rows]
    drawn = [
        (row["name"], row["model"], (row["params"]["block_after"], p["after"]))
        for row, p in measured
        if p and p["after"] is not None and math.isfinite(p["after"])
        if row["params"]["block_after"] is not None
    ]
    before: dict[tuple[str, int], list[float]] = {}
    for row, p in measured:
        if p and p["before"] is not None and row["params"]["block_before"] is not None:
            before.setdefault((row["model"], row["params"]["block_before"]), []).append(p["before"])
    disagreeing = [
        model
        for (model, _), values in before.items()
        if max(values) - min(values) > SAME_TEXT * min(values)
    ]
    best = [] if disagreeing else front([place for *_, place in drawn])
    names = [name for name, *_ in drawn]
    return {
        "text": key[0],
        "seq_len": key[1],
        "windows": key[2],
        "pareto": [names[i] for i in best],
        "drawn": names,
        "not_drawn": [row["name"] for row, p in measured if p and row["name"] not in names],
        "models": sorted({model for _, model, _ in drawn}),
        "disagreeing": disagreeing,
    }


def _figure(measurement: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The plot of one measurement; None where no run has a finite perplexity on it."""
    key = _key(measurement)
    points = []
    dense: dict[tuple[str, int], float] = {}
    for run in runs:
        if run["name"] not in measurement["drawn"]:
            continue
        p, params = _measured(run, key), run["params"]
        assert p is not None  # it was drawn
        kept = f"{format.count(params['block_after'])} of {format.count(params['block_before'])}"
        kind = "front" if run["name"] in measurement["pareto"] else "other"
        about = (
            f"{run['name']}: {kept} block parameters, perplexity {format.perplexity(p['after'])}"
        )
        points.append(Point(run["name"], params["block_after"], p["after"], kind, about))
        if p["before"] is not None and math.isfinite(p["before"]):
            dense.setdefault((run["model"], params["block_before"]), p["before"])
    for (model, size), value in dense.items():
        name = f"{model.rstrip('/').rpartition('/')[2]}, before"
        about = f"{model} before: {format.count(size)} block parameters, perplexity "
        points.append(Point(name, size, value, "dense", about + format.perplexity(value)))
    return figure(points) if points else None


def _key(measured: dict[str, Any]) -> Measurement:
    return measured["text"], measured["seq_len"], measured["windows"]


def _measured(run: dict[str, Any], key: Measurement) -> dict[str, Any] | None:
    return next((p for p in run["perplexity"] if _key(p) == key), None)


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for one in settings for name in one)
    first = settings[0] if settings else {}
    return [
        name
        for name in names
        if name not in NOT_SHOWN and any(one.get(name) != first.get(name) for one in settings)
    ]


def _budget_words(budget: dict[str, Any] | None) -> str:
    if budget is None:
        return "—"
    reached, asked = (format.budget(budget["unit"], budget[k]) for k in ("achieved", "requested"))
    return f"{reached} of {asked}" if reached != asked else reached


def _words(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _names(files: dict[Path, Path]) -> list[str]:
    """A name for each run: its folder's, or the path as given where two folders share a name."""
    short = []
    for file in files.values():
        folder = file.resolve().parent
        if file.name != "metrics.json":
            short.append(file.stem)
        else:
            short.append((folder.parent if folder.name == "fastprune" else folder).name)
    often = Counter(short)
    names = [name if often[name] == 1 else str(run) for name, run in zip(short, files, strict=True)]
    return [os.fsencode(name).decode("utf-8", "replace") for name in names]


def _metrics_file(run: Path) -> Path:
    if run.is_file():
        return run
    if not run.is_dir():
        raise InputError(f"{run}: no such file or folder")
    for file in (run / "fastprune" / "metrics.json", run / "metrics.json"):
        if file.is_file():
            return file
    raise InputError(f"{run}: no metrics.json in it; {WANTED}")


def _read(file: Path) -> dict[str, Any]:
    """What a comparison needs of one metrics.json, checked. Raises InputError."""
    metrics = read_json(file)
    kind = _kind(metrics)
    try:
        read = _Reader(metrics)
        return {
            "made_by": kind,
            "model": read("model", str),
            **READERS.get(kind, _trained)(read),
            "peak_memory_bytes": read.number("peak_memory_bytes", optional=True),
            "settings": read("settings", dict) if "settings" in metrics else {},
        }
    except InputError as error:
        wanted = "an eval" if kind == "eval" else f"a {kind}"
        raise InputError(f"{file}: not the metrics of {wanted} run: {error}") from error


def _kind(metrics: Any) -> str:
    """The command that wrote `metrics`; prune where they do not look like another's."""
    if not isinstance(metrics, dict) or "ratio" in metrics:
        return "prune"
    if isinstance(metrics.get("perplexity"), (int, float)):
        return "eval"
    if {"dense", "pruned", "recovered"} <= metrics.keys():
        return "compress"
    return "merge" if "adapter" in metrics else "finetune" if "stages" in metrics else "prune"


def _pruned(read: _Reader) -> dict[str, Any]:
    budget = read.data.get("budget")
    return {
        "params": {size: read.count(f"params.{size}") for size in SIZES},
        "ratio": {
            "requested": read.number("ratio.requested", optional=True),
            "achieved": read.number("ratio.achieved"),
        },
        "budget": _budget(_Reader(budget)) if budget else None,
        "perplexity": [_perplexity(_Reader(p)) for p in read("perplexity", list)],
        "seconds": read.number("seconds.total"),
    }


def _compressed(read: _Reader) -> dict[str, Any]:
    """Of the whole way: the dense model, and the one that was kept in the end."""
    kept = read("kept", str)
    names = ("dense", "pruned" if kept == "pruned" else "recovered")
    (before, block_before), (after, block_after) = (
        (read.count(f"{name}.params"), read.count(f"{name}.block")) for name in names
    )
    if not block_before:
        raise InputError("dense.block is 0")
    texts = []
    dense, small = (read(f"{name}.perplexity", list) for name in names)
    for measured, other in zip(dense, small, strict=False):
        both = {"before": _Reader(measured), "after": _Reader(other)}
        values = {when: one.number("perplexity") for when, one in both.items()}
        texts.append(_perplexity(_Reader({**measured, **values})))
    budget = read("prune", dict).get("budget")
    return {
        "params": dict(zip(SIZES, (before, after, block_before, block_after), strict=True)),
        "ratio": {
            "requested": read.number("prune.ratio.requested", optional=True),
            "achieved": 1 - block_after / block_before,
        },
        "budget": _budget(_Reader(budget)) if budget else None,
        "perplexity": texts,
        "seconds": read.number("seconds.total"),
    }


def _trained(read: _Reader) -> dict[str, Any]:
    """Of a finetuning or a merge, which leave the sizes as they are."""
    params = read("params", dict)
    measured = read("perplexity", list) if "perplexity" in read.data else []
    return {
        **_same_size(read, "params.total" if "total" in params else "params.model"),
        "perplexity": [_perplexity(_Reader(p)) for p in measured],
        "seconds": read.number("seconds.total"),
    }


def _evaluated(read: _Reader) -> dict[str, Any]:
    found = {"text": read("text", str), "before": None, "after": read("perplexity", int, float)}
    found |= {key: read(key, int) for key in ("seq_len", "windows")}
    return {
        **_same_size(read, "params.total"),
        "perplexity": [_perplexity(_Reader(found))],
        "seconds": read.number("seconds"),
    }


READERS = {"prune": _pruned, "compress": _compressed, "eval": _evaluated}
"""What is read of the metrics of each command; of the others `_trained`."""


def _same_size(read: _Reader, total: str) -> dict[str, Any]:
    """The parameters of a run that removes none; those of the blocks where they were counted."""
    whole = read.count(total)
    block = read.count("params.block") if "block" in read("params", dict) else None
    sizes = {"before": whole, "after": whole, "block_before": block, "block_after": block}
    return {"params": sizes, "ratio": {"requested": None, "achieved": None}, "budget": None}


def _budget(read: _Reader) -> dict[str, Any]:
    unit = read("unit", str)
    if unit not in UNITS:
        raise InputError(f"budget.unit is not one of {', '.join(UNITS)}")
    requested, achieved = read.number("requested"), read.number("achieved", optional=True)
    return {"unit": unit, "requested": requested, "achieved": achieved}


def _perplexity(read: _Reader) -> dict[str, Any]:
    before, after = (read.number(key, optional=True) for key in ("before", "after"))
    if 0 in (before, after):
        raise InputError("a perplexity is 0")
    return {
        "text": read("text", str),
        "seq_len": read.count("seq_len"),
        "windows": read.count("windows"),
        "before": before,
        "after": after,
        "factor": after / before if before and after else None,
    }


@dataclass(frozen=True)
class _Reader:
    """Takes values of the wanted kind out of nested objects; InputError names what is wrong."""

    data: Any

    def __call__(self, key: str, *kinds: type) -> Any:
        value = self.data
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise InputError(f"{key} is missing")
            value = value[part]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{key} is of another type than expected")
        return value

    def number(self, key: str, *, optional: bool = False) -> Any:
        """A number that is not negative (infinity is one); None too where it is optional."""
        value = self(key, int, float, *([type(None)] if optional else []))
        usable = value is None or (value >= 0 and (isinstance(value, float) or value < LARGEST))
        if not usable:
            raise InputError(f"{key} is out of range")
        return value

    def count(self, key: str) -> int:
        """A whole number, 0 or more."""
        self(key, int)
        count: int = self.number(key)
        return count


def _check_out(config: CompareConfig) -> None:
    """InputError when the page or its JSON cannot be written, or would replace something else."""
    out = config.out
    if out.suffix != ".html":
        raise InputError(f"--out {out}: name a file that ends in .html")
    data = out.with_suffix(".json")
    if config.json is not None and config.json.resolve() == out.resolve():
        raise InputError(f"--json {config.json}: is the file --out names; the JSON goes to {data}")
    for path in (out, data):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"--out {out}: {path} is no plain file; choose another name")
    check_file("--out", out, _is_page, "a page that fastprune compare wrote")
    check_file(f"--out {out}: replaces", data, _is_comparison, "a comparison")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return PAGE.search(file.read(1024)) is not None


def _is_comparison(path: Path) -> bool:
    try:
        content = read_json(path)
    except InputError:
        return False
    return isinstance(content, dict) and {"runs", "measurements"} <= set(content)
