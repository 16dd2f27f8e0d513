"""Thousands of malformed inputs, each of which must end in one line and exit status 2.

    python tools/bad_inputs [--seed N] [--count N] [--only WORDS] [--minutes M] [--workers N]
                             [--keep FILE.json]

Every case calls `fastprune.cli.main` in a worker process with a limit on its address space and on
its time. Workers are forked once each command has ended well with sound inputs, so that they have
loaded what it needs. Checked are the exit status, what stands on stderr (one line of an error, no
traceback, no control characters), that a refused case leaves nothing new beside its files, and that
no case changes its inputs or leaves hidden files. The same seed gives the same cases. Prints
every case that fails, and counts; exits 1 if one fails.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "tests"), str(HERE)]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no case after so long")
    parser.add_argument("--only", default="", help="only cases whose names hold these words")
    parser.add_argument("--count", type=int, default=2400, help="cases, drawn by the seed")
    parser.add_argument("--keep", type=Path, help="write what was found of every case as JSON")
    args = parser.parse_args()
    from inputs import all_cases, make_base
    from pool import run_all, run_sound

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        base = make_base(Path(name) / "base")
        run_sound(base, Path(name) / "sound")
        cases = [case for case in all_cases(base, args.seed) if args.only in case.name]
        random.Random(args.seed).shuffle(cases)
        found = run_all(cases[: args.count], Path(name) / "work", args.workers, 60 * args.minutes)
    problems = collections.Counter(one.problem for one in found if one.problem)
    statuses = collections.Counter(one.status for one in found)
    seconds = time.monotonic() - start
    print(f"{len(found)} of {min(args.count, len(cases))} cases in {seconds:.0f} s")
    print(f"by exit status: {dict(statuses)}")
    print(f"{sum(problems.values())} fail: {dict(problems)}")
    if args.keep:
        args.keep.write_text(json.dumps([vars(one) for one in found], indent=1))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
