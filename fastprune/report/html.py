"""Self-contained HTML reports: one file, no scripts, nothing fetched, light and dark."""

from pathlib import Path
from typing import Any

import jinja2

from fastprune.report import format
from fastprune.report.summary import (
    budget_line,
    divergence_line,
    routing_lines,
    verdict_lines,
    vocabulary_lines,
)

LEFT, COLUMN, GAP = 44, 20, 4  # figure units: label margin, width of a layer, space between two
CELL, BARS = 12, 110  # height of a KV group and of the channel bars

environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # model names, paths and commands come from users
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters.update(
    count=format.count,
    size=format.size,
    duration=format.duration,
    percent=format.percent,
    perplexity=format.perplexity,
    milliseconds=format.milliseconds,
    bleu=format.bleu,
)
environment.globals["factor"] = format.factor


def write_prune_report(path: Path, metrics: dict[str, Any], plan: dict[str, Any]) -> None:
    """Write the report of one pruning run to `path`.

    `metrics` is what metrics.json holds, `plan` what plan.json holds: the kept KV groups and
    channels of every layer, and under "model" the geometry of every layer before.
    """
    path.write_text(render_prune_report(metrics, plan), encoding="utf-8")


def render_prune_report(metrics: dict[str, Any], plan: dict[str, Any]) -> str:
    """The HTML text that `write_prune_report` writes."""
    before = plan["model"]["layers"]
    kept = plan["layers"]
    params = metrics["params"]
    seconds = {k: v for k, v in metrics["seconds"].items() if k != "total"}
    longest = max(seconds.values(), default=0) or 1
    facts = [
        ("Settings", metrics.get("settings") or {}),
        ("Versions", metrics.get("versions") or {}),
    ]
    return environment.get_template("prune.html.j2").render(
        m={"peak_memory_bytes": None, "latency": None, "routing": None, **metrics},
        lines=[
            *vocabulary_lines(metrics),
            *filter(None, [budget_line(metrics), divergence_line(metrics)]),
            *routing_lines(metrics),
            *verdict_lines(metrics),
        ],
        dry=not metrics["perplexity"] or metrics["perplexity"][0].get("after") is None,
        f=layer_figure(before, kept),
        layers=[
            {
                **layer,
                "groups": chosen["kv_groups"],
                "before": size,
                "inner": format.mlp(layer),
                "inner_before": format.mlp(size),
            }
            for layer, size, chosen in zip(metrics["layers"], before, kept, strict=True)
        ],
        sizes=[
            {"name": "in the blocks", **_pair(params["block_before"], params["block_after"])},
            {"name": "outside them", **_pair(*(params[k] - params[f"block_{k}"] for k in _ENDS))},
            {"name": "total", **_pair(params["before"], params["after"])},
        ],
        stages=[
            {"name": name, "seconds": spent, "share": round(100 * spent / longest, 1)}
            for name, spent in seconds.items()
        ],
        facts=[(title, table) for title, table in facts if table],
    )


_ENDS = ("before", "after")


def _pair(before: int, after: int) -> dict[str, int]:
    return {"before": before, "after": after}


def _channels(size: dict[str, Any], layer: dict[str, Any]) -> tuple[int, int]:
    """Channels that `layer` of a plan keeps, and how many there are; of all experts together."""
    if "experts" not in size:
        return len(layer["channels"]), size["channels"]
    inside = layer.get("expert_channels")
    each = len(inside[0]) if inside else size["channels"]
    return len(layer["experts"]) * each, size["experts"] * size["channels"]


def layer_figure(before: list[dict[str, Any]], kept: list[dict[str, Any]]) -> dict[str, Any]:
    """Coordinates of the two panels: a grid of KV groups above, bars of channels below."""
    rows = max((size["kv_heads"] for size in before), default=0)
    cell = CELL if rows <= 8 else max(3, 8 * CELL / rows)
    top = 18
    bars_top = top + rows * cell + 36
    cells, bars, ticks = [], [], []
    step = 1 if len(before) <= 40 else 5
    for i, (size, layer) in enumerate(zip(before, kept, strict=True)):
        x = LEFT + i * COLUMN
        groups = set(layer["kv_groups"])
        cells += [
            {
                "layer": i,
                "group": group,
                "kept": group in groups,
                "x": x,
                "y": round(top + group * cell, 2),
                "w": COLUMN - GAP,
                "h": round(cell - min(2, cell / 4), 2),
            }
            for group in range(size["kv_heads"])
        ]
        stay, count = _channels(size, layer)
        share = stay / count if count else 0
        bars.append(
            {
                "layer": i,
                "kept": stay,
                "of": count,
                "x": x,
                "y": round(bars_top + BARS * (1 - share), 2),
                "w": COLUMN - GAP,
                "h": round(BARS * share, 2),
            }
        )
        if i % step == 0:
            ticks.append({"layer": i, "x": x + (COLUMN - GAP) / 2})
    return {
        "left": LEFT,
        "width": LEFT + max(len(before), 16) * COLUMN,
        "height": bars_top + BARS + 20,
        "cells": cells,
        "bars_top": bars_top,
        "bars_bottom": bars_top + BARS,
        "bars": bars,
        "ticks": ticks,
    }
