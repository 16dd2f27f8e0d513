"""Two processes on gloo, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

LIMIT = 800
"""Seconds after which a process that waits in vain is ended with its error, before pytest ends the
test."""


def in_two(script: str, *arguments: object, threads: int = 1) -> None:
    """Run `script`, a file beside this one, in two processes; fails with what they said."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", Path(__file__).with_name(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
