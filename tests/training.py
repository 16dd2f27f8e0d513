"""Runs of `finetune` for `recover/test_distributed.py`, alone and under torchrun.

    torchrun --nproc-per-node 2 tests/training.py MODEL TEACHER TEXT HELD_OUT FOLDER

leaves every run of RUNS in FOLDER/ddp and FOLDER/fsdp; in FOLDER/resumed the second halves of a
sharded run, sharded and not; in FOLDER/launched one that `accelerate launch` shards; in
FOLDER/guarded-N.pt what process N found of one with broken gradients; and in FOLDER/tokenised a
line for each time a process tokenised.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import precise  # noqa: F401
import torch

from fastprune import FinetuneConfig, cli, finetune
from fastprune.data import tokenise
from fastprune.distributed import launched
from fastprune.models.load import load_model
from fastprune.recover import pipeline, range_test
from fastprune.sharding import local

FLAGS = ["--samples", "16", "--max-steps", "4", "--seq-len", "32", "--grad-accum", "2"]
FLAGS += ["--lr", "1e-3", "--eval-seq-len", "32", "--eval-windows", "2", "--device", "cpu"]
FLAGS += ["--save-steps", "2", "--quiet"]
RUNS = {
    "full": ["--val-size", "4", "--eval-steps", "2"],
    "lora": ["--method", "lora", "--lora-dropout", "0", "--prompt", "The"],
    "distill": ["--distill-hidden-weight", "0.1", "--gradient-checkpointing", "--find-lr"],
}
"""Flags of the runs, by the folder each leaves."""


class Runner:
    """Starts runs on the files of the tests: MODEL, TEACHER, TEXT, HELD_OUT."""

    def __init__(self, files: list[Path], batch_size: int) -> None:
        self.model, self.teacher, self.text, self.held_out = files
        self.batch_size = batch_size

        range_test.RATES, pipeline.SAMPLE_TOKENS = 3, 8  # less to wait for

    def __call__(self, name: str, out: Path, *flags: str) -> None:
        teacher = ["--teacher", str(self.teacher)] if name == "distill" else []
        common = ["--data", str(self.text), "--eval", str(self.held_out), "--out", str(out)]
        common += [*FLAGS, "--batch-size", str(self.batch_size)]
        command = ["finetune", str(self.model), *common, *teacher, *RUNS[name], *flags]
        if status := cli.main(command):
            sys.exit(f"{name} {flags}: exit status {status}")


def guarded(files: list[Path], batch_size: int, **settings) -> dict:
    """A run whose gradients are NaN three times from the third step on, as the first process sees
    them: what the guard did, and the weights."""
    model, tokenizer = load_model(files[0])
    calls = []

    def break_gradients(step: int, trained: torch.nn.Module) -> None:
        calls.append(step)
        if len(calls) in (3, 4, 5) and launched().first:
            for parameter in trained.parameters():
                local(parameter.grad)[:1] = float("nan")

    config = FinetuneConfig(
        data=str(files[2]), eval_windows=0, samples=32, max_steps=6, seq_len=32, lr=1e-3,
        batch_size=batch_size, grad_accum=1, device="cpu", guard_steps=2, **settings,
    )  # fmt: skip
    (stage,) = finetune(model, tokenizer, config, gradient_hook=break_gradients).metrics["stages"]
    found = {key: stage[key] for key in ("rollbacks", "skipped_steps", "lr_factor", "steps")}
    return found | {"weights": model.state_dict()}


def count_tokenising(file: Path) -> None:
    """From now on append this process's rank to `file` whenever it tokenises."""
    write = tokenise._write

    def counted(*args) -> None:
        with file.open("a") as lines:
            lines.write(f"{os.environ['RANK']}\n")
        write(*args)

    tokenise._write = counted


def main(*paths: Path) -> None:
    """What torchrun starts."""
    *files, folder = paths
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    count_tokenising(folder / "tokenised")
    run = Runner(files, batch_size=2)
    for name in RUNS:
        run(name, folder / "ddp" / name)
        run(name, folder / "fsdp" / name, "--shard")
    checkpoint = folder / "fsdp" / "full" / "fastprune" / "state" / "stage-0" / "checkpoint-2"
    run("full", folder / "resumed" / "fsdp", "--shard", "--resume", str(checkpoint))
    torch.save(guarded(files, 2, shard=True), folder / f"guarded-{launched().rank}.pt")
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` says it
    run("lora", folder / "launched")
    run("full", folder / "resumed" / "ddp", "--resume", str(checkpoint))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
