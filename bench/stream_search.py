"""The search over a model of 0.47 GB, streamed in less address space than half of that.

    python bench/stream_search.py [--folder DIR] [--layers 32] [--room 0.2]

Makes random Llamas of --layers, of half as many and of 2 (once, kept in the folder). In a process
of its own the smallest is pruned with --stream and --allocation search, so that all code is loaded;
then RLIMIT_AS is set --room GB above what the process uses, and another one is pruned in that. What
is mapped beyond the start is printed for each: it grows by hidden states, not by weights. The
ordinary run in the same room is tried too: it must fail. Exits 1 when something is not so.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

from stream_2b import GB, random_llama

SIZES = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
FLAGS = [
    *("--ratio", "0.2", "--allocation", "search", "--structures", "mlp", "--device", "cpu"),
    *("--calib-samples", "16", "--search-samples", "8", "--calib-seq-len", "64"),
    *("--eval-seq-len", "64", "--eval-windows", "2", "--threads", "1", "--overwrite", "--quiet"),
]


def mapped(key: str) -> int:
    """Bytes of addresses that this process uses (key VmSize) or has used at most (VmPeak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def limited(folder: Path, layers: int, room: int, *flags: str) -> int:
    """Prune the model of so many layers within `room` bytes; prints the most that it used."""
    from fastprune import cli

    def prune(count: int, *more: str) -> int:
        source, out = str(folder / str(count)), str(folder / f"pruned-{count}")
        return cli.main(["prune", source, "--out", out, *FLAGS, *more])

    if status := prune(2, "--stream"):
        return status
    start = mapped("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (start + room, start + room))
    status = prune(layers, *flags)
    used = max(0, mapped("VmPeak") - start) / GB
    print(f"  exit status {status}; at most {used:.3f} GB more than before", flush=True)
    return status


def child(folder: Path, layers: int, room: float, *flags: str) -> bool:
    """Whether `limited` succeeds in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--layers", str(layers)]
    # An arena of glibc's malloc reserves 64 MB of addresses for each thread; one for all will do.
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),  # measured levels of the search
    }
    command += ["--room", str(room), "--limited", *flags]
    return subprocess.run(command, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/stream-search"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--room", type=float, default=0.2, help="GB of address space")
    parser.add_argument("--limited", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder, layers, room = options.folder, options.layers, options.room
    if options.limited is not None:
        return limited(folder, layers, int(room * GB), *(f"--{flag}" for flag in options.limited))
    sizes = {}
    for count in (2, layers // 2, layers):
        model = folder / str(count)
        if not (model / "config.json").is_file():
            random_llama(model, **SIZES, num_hidden_layers=count)
        sizes[count] = sum(file.stat().st_size for file in model.glob("*.safetensors")) / GB
    done = True
    for count in (layers // 2, layers):
        print(f"{count} layers, {sizes[count]:.2f} GB, streamed in {room} GB:", flush=True)
        done = child(folder, count, room, "stream") and done
    print(f"{layers} layers, in memory in {room} GB (must fail):", flush=True)
    return 0 if not child(folder, layers, room) and done else 1


if __name__ == "__main__":
    sys.exit(main())
