"""What `compress` says at the end: one table of three models, on the terminal and as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fastprune.printing import Console
from fastprune.report import format
from fastprune.report.finetune import figure
from fastprune.report.html import environment, layer_figure
from fastprune.report.record import CompressRecord
from fastprune.report.speed import speed_rows

MODELS = ("dense", "pruned", "recovered")
NONE = "—"


def rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: what is measured, then a figure of each of MODELS. `metrics` as metrics.json."""
    found = [metrics[name] for name in MODELS]
    table = [
        ("parameters", *(format.count(f["params"]) for f in found)),
        ("in the blocks", *(format.count(f["block"]) for f in found)),
        ("weight files", *_sizes(metrics)),
    ]
    vocabulary = metrics.get("vocabulary")
    if vocabulary:
        sizes = (vocabulary[side] for side in ("before", "after", "after"))
        table.append(("tokens of the vocabulary", *(f"{size:,}" for size in sizes)))
    for i, text in enumerate(found[0]["perplexity"]):
        what = "perplexity per token of the result" if vocabulary else "perplexity"
        label = f"{what}, {text['text']}, {text['windows']} × {text['seq_len']}"
        table.append((label, *(_perplexity(f, found[0], i) for f in found)))
        if vocabulary:
            table.append((f"bits per byte, {text['text']}", *(_bits_per_byte(f, i) for f in found)))
    table += [
        (f"{task}, {name}", *(_metric(f, task, name) for f in found))
        for task, result in found[0]["tasks"].items()
        for name in result["metrics"]
    ]
    table.append(("peak memory, evaluating", *(format.size(f["peak_memory_bytes"]) for f in found)))
    speed = metrics["recovered"].get("speed")
    if speed:
        table += [(label, dense, NONE, small) for label, dense, small in speed_rows(speed)]
    return table


def regained(metrics: Mapping[str, Any]) -> str:
    """How much of what pruning cost the recovery brought back, in one sentence."""
    dense, pruned, recovered = (metrics[m]["perplexity"][0]["perplexity"] for m in MODELS)
    if pruned <= dense:
        return "Pruning cost no perplexity."
    share = (pruned - recovered) / (pruned - dense)
    line = f"The recovery made good {share * 100:.0f} % of the perplexity that pruning cost."
    if metrics["kept"] == "pruned":
        line = "The recovery made the model worse, so the pruned model was kept."
    return line


def show_compress(result: dict[str, Any]) -> None:
    """The table, the answers side by side, and where the result lies."""
    out = Console()
    out.print(_table(("", *MODELS), rows(result)))
    out.print()
    answers = zip(*(result[m]["answers"] for m in MODELS), strict=True)
    out.print(_table(("", "dense", "small"), list(_side_by_side(answers, result["kept"]))))
    out.print(Text(f"\n{regained(result)} It took {format.duration(result['seconds']['total'])}."))
    out.print(Text(f"checkpoint  {result['out']}"), soft_wrap=True)
    out.print(Text(f"report      {result['out']}/fastprune/report.html"), soft_wrap=True)


def write_compress_report(path: Path, records: Path, record: CompressRecord) -> None:
    """Write the page `path`; plan and training log are read from the folder `records`."""
    metrics = record.to_dict()
    plan = json.loads((records / "plan.json").read_text(encoding="utf-8"))
    log = records / "train_log.jsonl"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    stages = [stage["name"] for stage in record.finetune["stages"]]
    page = environment.get_template("compress.html.j2").render(
        m=metrics,
        models=MODELS,
        rows=rows(metrics),
        regained=regained(metrics),
        layers=layer_figure(plan["model"]["layers"], plan["layers"]),
        curve=figure(lines, stages),
        answers=list(zip(*(metrics[m]["answers"] for m in MODELS), strict=True)),
        seconds={name: s for name, s in record.seconds.items() if name != "total"},
        facts=[("Settings", record.settings), ("Versions", record.versions)],
    )
    path.write_text(page, encoding="utf-8")


def _sizes(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    dense = metrics["prune"]["bytes"]["before"]
    return tuple(format.size(n) for n in (dense, *(metrics[m]["bytes"] for m in MODELS[1:])))


def _perplexity(found: Mapping[str, Any], dense: Mapping[str, Any], index: int) -> str:
    value, before = (f["perplexity"][index]["perplexity"] for f in (found, dense))
    text = format.perplexity(value)
    return text if found is dense else f"{text} ({format.factor(before, value)})"


def _bits_per_byte(found: Mapping[str, Any], index: int) -> str:
    p = found["perplexity"][index]
    return f"{math.log2(p['perplexity']) * p['tokens'] / p['text_bytes']:.4f}"


def _metric(found: Mapping[str, Any], task: str, name: str) -> str:
    metric = found["tasks"].get(task, {}).get("metrics", {}).get(name)
    return NONE if metric is None else f"{metric['value']:.3f}"


def _side_by_side(answers: Any, kept: str) -> Any:
    for dense, pruned, recovered in answers:
        small = recovered if kept == "recovered" else pruned
        yield dense["prompt"], dense["text"], small["text"]


def _table(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=True)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i and len(columns) > 3 else "left")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table
