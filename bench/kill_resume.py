"""kill -9 at random moments of a run: resumed each time, does it end bit for bit the same?

    python bench/kill_resume.py MODEL --data TEXT [--steps 60] [--kills 10]

Runs `fastprune finetune` once to its end. Then begins the same run again, kills it with SIGKILL
after a random time, and continues it with the same command, until it has been killed so many
times; the last continuation goes to the end. Compares every weight and every logged loss.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from finetune_common import parser
from safetensors.torch import load_file


def command(options, out: Path) -> list[str]:
    flags = {
        "--data": options.data, "--out": out, "--max-steps": options.steps,
        "--save-steps": options.save_steps, "--seq-len": options.seq_len,
        "--batch-size": options.batch_size, "--grad-accum": 1, "--lr": options.lr,
        "--device": options.device, "--log-steps": 1, "--eval-windows": 0,
        "--precision": options.precision,
    }  # fmt: skip
    if options.threads:
        flags["--threads"] = options.threads
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, "-m", "fastprune", "finetune", options.model, *words, "--quiet"]


def steps_done(out: Path) -> int:
    log = out / "fastprune" / "train_log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def killed(options, out: Path, draw: random.Random, goal: int) -> str:
    """Start or continue the run and kill it some moments after its step number `goal`."""
    log, begin = out / "fastprune" / "train_log.jsonl", time.time()
    before = log.stat().st_ino if log.exists() else None
    process = subprocess.Popen(command(options, out))
    # A continued run begins by writing the log anew, without the steps it will do again.
    while process.poll() is None and (not log.exists() or log.stat().st_ino == before):
        time.sleep(0.005)
    while steps_done(out) < goal and process.poll() is None:
        time.sleep(0.005)
    moment = draw.uniform(0, options.spread)
    time.sleep(moment)
    if process.poll() is not None:
        return "it had ended already"
    process.send_signal(signal.SIGKILL)
    process.wait()
    writing = out / "fastprune/state/stage-0/writing"
    saving = writing.exists() and writing.stat().st_mtime > begin
    return f"killed at step {steps_done(out)}" + (", while saving" if saving else "")


def losses(out: Path) -> list[tuple]:
    text = (out / "fastprune" / "train_log.jsonl").read_text()
    return [
        (x["step"], x.get("loss"), x.get("grad_norm")) for x in map(json.loads, text.splitlines())
    ]


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--save-steps", type=int, default=5)
    options.add_argument("--spread", type=float, default=2.0, help="seconds after the step")
    options.add_argument("--lr", type=float, default=1e-5)
    options.add_argument("--precision", default="auto")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "killed"
        subprocess.run(command(chosen, whole), check=True)
        # rising, so that every kill finds the run further on and all of it is covered
        goals = sorted(draw.sample(range(1, chosen.steps), chosen.kills))
        for number, goal in enumerate(goals, start=1):
            print(f"{number}: {killed(chosen, broken, draw, goal)}", flush=True)
        if not (broken / "config.json").exists():
            subprocess.run(command(chosen, broken), check=True)
        one = load_file(whole / "model.safetensors")
        other = load_file(broken / "model.safetensors")
        different = [name for name in one if not torch.equal(one[name], other[name])]
        same = losses(whole) == losses(broken)
    print(f"weights that differ: {len(different)} of {len(one)}; losses equal: {same}")
    return int(bool(different) or not same)


if __name__ == "__main__":
    sys.exit(main())
