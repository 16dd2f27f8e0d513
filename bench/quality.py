"""The table of docs/benchmarks.md: what is left of a model, for every way to prune it.

    python bench/quality.py smollm2-135m --calib c4.jsonl --test wikitext2-test.txt \\
        --second handbook.txt --out runs/quality
    python bench/quality.py ... --ratios 0.2 --methods uniform --importance taylor-first obs \\
        -- --structures mlp --layers 3:27

Every cell is one `fastprune prune` in a process of its own (so its time and peak memory are its
own) with the flags that follow `--`, else those that `usual` has, then `fastprune eval` on windows
of both texts. Cells that are there already, in OUT, are not run again: an interrupted table goes on
where it was. Prints Markdown, and writes OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

METHODS = ("uniform", "inverse", "global", "search")
DEFAULT_SCORE = "activation-maw"
ROWS = (("uniform", "taylor-first"), *((method, DEFAULT_SCORE) for method in METHODS))
"""(allocation, score) of the table, where neither is chosen."""
COMPENSATION = ("none", "least-squares")
LONG, SHORT = (1024, 16), (128, 64)
"""(tokens, windows) in which every model is read on the test text, and in the first on another."""


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    readings = [(options.test, *LONG), (options.test, *SHORT), (options.second, *LONG)]
    dense = _perplexities(options, options.model, options.out / "dense", readings)
    rows = [["0 %", "dense", "", "", *(f"{p:.2f}" for p in dense), "", "", "", ""]]
    pairs: Iterable[tuple[str, str]] = ROWS
    if options.methods or options.importance:
        pairs = product(options.methods or METHODS, options.importance or (DEFAULT_SCORE,))
    for ratio, pair, compensation in product(options.ratios, pairs, options.compensation):
        cell = (ratio, *pair, compensation)
        folder = options.out / "-".join((f"{ratio:g}", *pair, compensation))
        if not (folder / "fastprune" / "metrics.json").is_file():
            flags = _prune(options, cell)
            _fastprune(options, "prune", options.model, "--out", str(folder), *flags)
        metrics = json.loads((folder / "fastprune" / "metrics.json").read_text(encoding="utf-8"))
        found = _perplexities(options, str(folder), folder, readings)
        rows.append(_row(cell, metrics, found, dense))
        table = _table(rows)
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
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--importance", nargs="+")
    parser.add_argument("--compensation", nargs="+", default=COMPENSATION, choices=COMPENSATION)
    parser.add_argument("--calib-seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    own, prune = sys.argv[1:], []
    if "--" in own:
        own, prune = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    options.prune = prune
    return options


def usual(ratio: float, method: str) -> list[str]:
    """Flags with which `method` does well at `ratio`.

    KV groups are worth their place until a third of the model goes; equal shares spare both ends;
    the search, whose time goes into finding a mix, has more text for the last refit of it.
    """
    flags = ["--structures", "mlp" if ratio <= 1 / 3 else "attention,mlp"]
    if method == "uniform":
        flags += ["--layers", "3:-3"]
    if method == "search":
        flags += ["--calib-samples", "512", "--exchange-rounds", "1"]
    return flags


def _prune(options: argparse.Namespace, cell: tuple) -> list[str]:
    ratio, method, importance, compensation = cell
    return [
        *("--ratio", str(ratio), "--allocation", method, "--importance", importance),
        *("--compensate", compensation, *(options.prune or usual(ratio, method))),
        *("--calib", options.calib, "--calib-seq-len", str(options.calib_seq_len)),
        *("--eval", options.test, "--eval-windows", "1"),  # `fastprune eval` does the reading
    ]


def _perplexities(
    options: argparse.Namespace, model: str, folder: Path, readings: list[tuple[str, int, int]]
) -> list[float]:
    """Perplexity in each of `readings`: text, tokens of a window, windows."""
    found = []
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
    if status := subprocess.run([*command, "--quiet"]).returncode:
        raise SystemExit(status)  # it has said why


def _row(cell: tuple, metrics: dict, found: list[float], dense: list[float]) -> list[str]:
    seconds = metrics["seconds"]
    return [
        f"{100 * metrics['ratio']['achieved']:.1f} %",
        *cell[1:],
        *(f"{p:.2f}" for p in found),
        f"{found[0] / dense[0]:.2f}",
        f"{found[2] / dense[2]:.2f}",
        f"{(seconds['total'] - seconds['evaluate']) / 60:.1f}",
        f"{metrics['peak_memory_bytes'] / 1e9:.2f}",
    ]


def _table(rows: list[list[str]]) -> str:
    names = [f"{s} × {n}" for s, n in (LONG, SHORT)] + [f"second text, {LONG[0]} × {LONG[1]}"]
    columns = [
        *("removed", "allocation", "score", "compensation", *names),
        *("× dense, test", "× dense, second", "minutes", "peak GB"),
    ]
    rule = "|---|---|---|---|" + "---:|" * (len(columns) - 4)
    first, *others = ("| " + " | ".join(row) + " |" for row in [columns, *rows])
    return "\n".join([first, rule, *others]) + "\n"


if __name__ == "__main__":
    main()
