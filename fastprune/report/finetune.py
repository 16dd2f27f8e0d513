"""The report of a finetuning run: one HTML file with its loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastprune.report.html import environment
from fastprune.report.summary import recovery_lines, verdict_lines

WIDTH, HEIGHT, RATE = 640, 220, 60  # of the loss and of the learning rate panel, figure units
LEFT, TOP, GAP = 52, 18, 34
TICKS = 5
SMOOTHING = 0.9

KINDS = {
    "flat": "flat",
    "jump": "a jump",
    "oscillation": "oscillating",
    "overfitting": "overfitting",
}


def write_finetune_report(path: Path, metrics: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Write the report of one run to `path`.

    `metrics` is what metrics.json holds, `lines` those of train_log.jsonl.
    """
    path.write_text(render_finetune_report(metrics, lines), encoding="utf-8")


def render_finetune_report(metrics: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """The HTML text that `write_finetune_report` writes."""
    seconds = {k: v for k, v in metrics["seconds"].items() if k != "total"}
    longest = max(seconds.values(), default=0) or 1
    return environment.get_template("finetune.html.j2").render(
        m=metrics,
        lines=[*recovery_lines(metrics), *verdict_lines(metrics)],
        f=figure(lines, [stage["name"] for stage in metrics["stages"]]),
        tokens=sum(stage["tokens"] for stage in metrics["stages"]),
        steps=sum(stage["steps"] for stage in metrics["stages"]),
        kinds=KINDS,
        times=[
            {"name": name, "seconds": spent, "share": round(100 * spent / longest, 1)}
            for name, spent in seconds.items()
        ],
        facts=[("Settings", metrics["settings"]), ("Versions", metrics["versions"])],
    )


def figure(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """Coordinates of the loss and learning rate curves; None where nothing was logged.

    Stages follow one another along the x axis. Losses that were not finite leave a gap in nothing:
    the curve joins what is left, and the points are marked at the bottom.
    """
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return None
    offsets, at = {}, 0
    for stage in sorted({line["stage"] for line in trained}):
        offsets[stage] = at
        at += max(line["step"] for line in trained if line["stage"] == stage)
    span = max(at, 1)

    def x(line: dict[str, Any]) -> float:
        return round(LEFT + WIDTH * (offsets[line["stage"]] + line["step"]) / span, 1)

    sound = [line for line in trained if line["loss"] is not None]
    checked = [line for line in lines if "eval_loss" in line and line["stage"] in offsets]
    losses = [line["loss"] for line in sound] + [line["eval_loss"] for line in checked]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    high = max(high, low + 1e-3)

    def y(loss: float) -> float:
        return round(TOP + HEIGHT * (high - loss) / (high - low), 1)

    rates = [line["lr"] for line in trained]
    top_rate = max([*rates, 1e-30])
    rate_top = TOP + HEIGHT + GAP
    means = _running_means([line["loss"] for line in sound])
    levels = [low + (high - low) * i / (TICKS - 1) for i in range(TICKS)]
    return {
        "width": LEFT + WIDTH + 8,
        "height": rate_top + RATE + 22,
        "left": LEFT,
        "right": LEFT + WIDTH,
        "top": TOP,
        "bottom": TOP + HEIGHT,
        "rate_top": rate_top,
        "rate_bottom": rate_top + RATE,
        "raw": _points([(x(line), y(line["loss"])) for line in sound]),
        "smooth": _points([(x(line), y(mean)) for line, mean in zip(sound, means, strict=True)]),
        "checked": [
            {"x": x(line), "y": y(line["eval_loss"]), "value": line["eval_loss"]}
            for line in checked
        ],
        "bad": [{"x": x(line), "step": line["step"]} for line in trained if line["loss"] is None],
        "rate": _points(
            [(x(line), round(rate_top + RATE * (1 - line["lr"] / top_rate), 1)) for line in trained]
        ),
        "top_rate": f"{top_rate:.2g}",
        "ticks": [{"y": y(level), "value": level} for level in levels],
        "stages": [
            {
                "x": round(LEFT + WIDTH * at / span, 1),
                "name": names[stage] if stage < len(names) else "",
            }
            for stage, at in offsets.items()
        ],
        "steps": span,
    }


def _running_means(losses: Sequence[float]) -> list[float]:
    """The exponential mean of the losses up to each of them, from the first one on."""
    found: list[float] = []
    for loss in losses:
        found.append(SMOOTHING * found[-1] + (1 - SMOOTHING) * loss if found else loss)
    return found


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:g},{py:g}" for px, py in points)
