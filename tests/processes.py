"""Two processes on gloo, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path


def in_two(script: str, *arguments: object, threads: int = 1, timeout: int = 560) -> None:
    """Run `script`, a file beside this one, in two processes; fails with what they said.

    `timeout` is in seconds: a process that waits in vain is ended with its error.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", Path(__file__).with_name(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
