"""What minutes buy: perplexity of `fastprune compress` against its time, as a table and a drawing.

    python bench/frontier.py smollm2-135m --out runs/frontier [--points 0.2:10 0.2:30 0.3:30]
        [--peers peers.json] [-- FLAGS]

Every point is a ratio and the minutes of the whole command; FLAGS go to `fastprune compress` (for
example --tasks). A point that is there already is not run again. `peers.json`, a list of
{"name", "ratio", "minutes", "perplexity"}, adds what other tools came to (bench/peers.py). Writes
OUT/frontier.md and OUT/frontier.svg.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

POINTS = ("0.2:10", "0.2:30", "0.3:30", "0.5:60")


def main() -> None:
    """Run what is missing, then write the table and the drawing."""
    own, flags = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, flags = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", nargs="+", default=POINTS)
    parser.add_argument("--peers", type=Path)
    args = parser.parse_args(own)
    runs = []
    for point in args.points:
        ratio, minutes = map(float, point.split(":"))
        folder = args.out / f"{ratio:g}-{minutes:g}"
        if not (folder / "fastprune/metrics.json").is_file():
            command = ["fastprune", "compress", args.model, "--out", str(folder)]
            command += ["--ratio", f"{ratio:g}", "--minutes", f"{minutes:g}", *flags]
            subprocess.run(command, check=True)
        found = json.loads((folder / "fastprune/metrics.json").read_text(encoding="utf-8"))
        runs.append((ratio, minutes, found))
    peers = json.loads(args.peers.read_text(encoding="utf-8")) if args.peers else []
    (args.out / "frontier.md").write_text(table(runs), encoding="utf-8")
    draw(runs, peers, args.out / "frontier.svg")
    print(table(runs))


def table(runs: list) -> str:
    """A row for every run: asked and taken minutes, perplexities of each text, tasks kept."""
    texts = [
        f"{p['text']} {p['windows']} × {p['seq_len']}" for p in runs[0][2]["dense"]["perplexity"]
    ]
    head = ["removed", "minutes asked", "taken", "peak GB", *texts, "tasks kept"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for ratio, minutes, found in runs:
        cells = [f"{ratio:.0%}", f"{minutes:g}", f"{found['seconds']['total'] / 60:.1f}"]
        cells.append(f"{found['peak_memory_bytes'] / 1e9:.2f}")
        for dense, small in zip(found["dense"]["perplexity"], found["recovered"]["perplexity"]):
            a, b = dense["perplexity"], small["perplexity"]
            cells.append(f"{a:.2f} → {b:.2f} (×{b / a:.2f})")
        cells.append(kept(found))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def kept(found: dict) -> str:
    """Mean accuracy over the tasks, recovered against dense; — without tasks."""
    means = []
    for model in ("dense", "recovered"):
        tasks = found[model]["tasks"].values()
        values = [task["metrics"]["acc"]["value"] for task in tasks if "acc" in task["metrics"]]
        means.append(sum(values) / len(values) if values else None)
    return "—" if None in means else f"{means[1] / means[0]:.1%}"


def draw(runs: list, peers: list, file: Path) -> None:
    """Perplexity against minutes, a line for each ratio; peers as crosses."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for ratio in sorted({r for r, _, _ in runs}):
        points = sorted(
            (found["seconds"]["total"] / 60, found["recovered"]["perplexity"][0]["perplexity"])
            for r, _, found in runs
            if r == ratio
        )
        axes.plot(*zip(*points), marker="o", label=f"less {ratio:.0%}")
    for peer in peers:
        axes.plot(peer["minutes"], peer["perplexity"], "x", color="grey")
        axes.annotate(f"{peer['name']}, {peer['ratio']:.0%}", (peer["minutes"], peer["perplexity"]))
    dense = runs[0][2]["dense"]["perplexity"][0]
    axes.axhline(dense["perplexity"], color="grey", linestyle=":", label="dense")
    axes.set(xlabel="minutes, everything counted", ylabel=f"perplexity, {dense['text']}")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
