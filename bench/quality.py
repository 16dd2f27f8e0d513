"""The table of docs/quality.md: what is left of a model, for every way to prune it.

    python bench/quality.py smollm2-135m --calib c4.jsonl --test wikitext2-test.txt \\
        --second wiki.jsonl --out runs/quality

Every cell is one `fastprune prune` in a process of its own (so its time and peak memory are its
own), then `fastprune eval` on further windows and texts. Cells that are there already, in OUT, are
not run again: an interrupted table goes on where it was. Prints Markdown, and writes OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

METHODS = {
    "uniform": ["--allocation", "uniform", "--importance", "taylor-first"],
    "inverse": ["--allocation", "inverse", "--importance", "taylor-first"],
    "global": ["--allocation", "global", "--importance", "taylor-first"],
    "search": ["--allocation", "search"],
}
"""Options of each row; what they leave out is the command's default."""
COMPENSATION = ("none", "least-squares")
WINDOWS = ((1024, 16), (128, 64))
"""(tokens, windows) in which every model is read."""


def main() -> None:
    options = _options()
    dense = options.out / "dense"
    cells = {
        (ratio, method, compensation): options.out / f"{ratio:g}-{method}-{compensation}"
        for ratio in options.ratios
        for method in options.methods
        for compensation in options.compensation
    }
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {None: _perplexities(options, options.model, dense)}
    for (ratio, method, compensation), folder in cells.items():
        if not (folder / "fastprune" / "metrics.json").is_file():
            flags = [*METHODS[method], "--ratio", str(ratio), "--compensate", compensation]
            _fastprune(
                options, "prune", options.model, "--out", str(folder), *flags, *_prune(options)
            )
        figures[ratio, method, compensation] = _perplexities(options, str(folder), folder)
        table = _table(options, cells, figures)
        (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="text of the first figures")
    parser.add_argument("--second", required=True, help="a text that no choice was made on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--compensation", nargs="+", default=COMPENSATION, choices=COMPENSATION)
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--calib-seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _prune(options: argparse.Namespace) -> list[str]:
    seq_len, windows = WINDOWS[0]
    return [
        *("--calib", options.calib, "--calib-samples", str(options.calib_samples)),
        *("--calib-seq-len", str(options.calib_seq_len), "--eval", options.test),
        *("--eval-seq-len", str(seq_len), "--eval-windows", str(windows)),
    ]


def _perplexities(options: argparse.Namespace, model: str, folder: Path) -> list[float]:
    """On the test text in all WINDOWS, then on the second text in the first of them."""
    found = []
    readings = [(options.test, *w) for w in WINDOWS] + [(options.second, *WINDOWS[0])]
    for text, seq_len, windows in readings:
        record = folder.parent / f"{folder.name}-{Path(text).stem}-{seq_len}x{windows}.json"
        if not record.is_file():
            flags = ["--text", text, "--seq-len", str(seq_len), "--windows", str(windows)]
            _fastprune(options, "eval", model, *flags, "--json", str(record))
        found.append(json.loads(record.read_text(encoding="utf-8"))["perplexity"])
    return found


def _fastprune(options: argparse.Namespace, *arguments: str) -> None:
    command = [sys.executable, "-m", "fastprune", *arguments, "--threads", str(options.threads)]
    print("$ fastprune", *arguments, file=sys.stderr, flush=True)
    subprocess.run([*command, "--quiet"], check=True)


def _table(options: argparse.Namespace, cells: dict, figures: dict) -> str:
    names = [f"{s} × {n}" for s, n in WINDOWS] + [f"second text, {WINDOWS[0][0]} × {WINDOWS[0][1]}"]
    lines = [
        "| removed | allocation | compensation | " + " | ".join(names) + " | × dense, test | "
        "× dense, second | minutes | peak GB |",
        "|---|---|---|" + "---:|" * (len(names) + 4),
    ]
    dense = figures[None]
    lines.append("| 0 % | dense | | " + " | ".join(f"{p:.2f}" for p in dense) + " | | | | |")
    for key, folder in cells.items():
        if key not in figures:
            continue
        metrics = json.loads((folder / "fastprune" / "metrics.json").read_text(encoding="utf-8"))
        found, (_, method, compensation) = figures[key], key
        row = [
            f"{100 * metrics['ratio']['achieved']:.1f} %",
            method,
            compensation,
            *(f"{p:.2f}" for p in found),
            f"{found[0] / dense[0]:.2f}",
            f"{found[2] / dense[2]:.2f}",
            f"{metrics['seconds']['total'] / 60:.1f}",
            f"{metrics['peak_memory_bytes'] / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
