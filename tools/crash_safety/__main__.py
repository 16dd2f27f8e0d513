"""Commands killed, cut off and starved of disk space: is anything lost, mixed or left behind?

    python tools/crash_safety [--commands prune,export] [--kinds kills,cuts] [--kills 50]
                              [--cuts 0] [--full 0] [--steps 2000] [--seed 0]

Every command runs on a tiny model and replaces, with --overwrite, an earlier result of its own.

    kills    SIGKILL at so many random moments
    stops    Ctrl-C or SIGTERM at as many: status 130 within seconds
    cuts     ended before each change of the disk in turn (0), or before so many of them at random:
             what a power cut leaves on a file system that keeps the order of changes
    signals  Ctrl-C or SIGTERM before each change in turn, or before so many as of `cuts`
    full     no space left from each change of the disk on, for as many of them; files limited in
             size; a disk of a few megabytes, where one may be mounted
    read     an output on a disk that is read only, where one may be mounted
    evals    20 `eval` at the same time, with one cold cache
    steps    the memory of a `finetune` of so many steps

After each the output must be the earlier result or the new one, whole. Then the same command runs
to its end: its result must have the bits of a run that was left in peace, and nothing may lie
beside it. Where two disturbances leave the same files, it runs once. Prints a line for each kind
and what went wrong; exits 1 if anything did. Quickest with TMPDIR in memory, such as /dev/shm.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from commands import ARGUMENTS, Command, fixtures  # noqa: E402
from disturb import (  # noqa: E402
    cuts,
    evals,
    full,
    kills,
    memory,
    read_only,
    signals,
    stops,
)

KINDS = ("kills", "stops", "cuts", "signals", "full", "read", "evals", "steps")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commands", default=",".join(ARGUMENTS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=0, help="0: each one")
    parser.add_argument("--full", type=int, default=0, help="0: each one")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    asked = options()
    draw, kinds = random.Random(asked.seed), asked.kinds.split(",")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        fixtures(root)
        for name in asked.commands.split(","):
            command = Command(name, root)
            command.prepare()
            for kind, disturb in (
                ("kills", lambda c: kills(c, asked.kills, draw)),
                ("stops", lambda c: stops(c, asked.kills, draw)),
                ("cuts", lambda c: cuts(c, asked.cuts, draw)),
                ("signals", lambda c: signals(c, asked.cuts, draw)),
                ("full", lambda c: full(c, asked.full, draw)),
                ("read", read_only),
            ):
                if kind in kinds:
                    begin = time.monotonic()
                    said = disturb(command)
                    print(f"{name}: {said}, {time.monotonic() - begin:.0f} s", flush=True)
            print(f"{name}: went on from {len(command.went_on)} states of the disk", flush=True)
            wrong += [f"{name}: {what}" for what in command.found]
        for kind, check in (("evals", evals), ("steps", lambda r: memory(r, asked.steps))):
            if kind in kinds:
                said, found = check(root)
                print(said, flush=True)
                wrong += found
        print(*wrong, f"{len(wrong)} faults", sep="\n")
        if wrong:
            print((root / "log").read_text()[-3000:])
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
