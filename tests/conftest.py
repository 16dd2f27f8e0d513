"""What every test needs: no network, English, fp32 products, `tiny` importable, and nothing of the
user's or of another test's: folders, variables, logging, threads, random states."""

import itertools
import logging
import os
import random
import sys
import tempfile
from pathlib import Path

import pytest

CHOSEN = (
    "FASTPRUNE_",
    "WANDB_",
    "TRACKIO_",
    "ACCELERATE_",
    "TENSORBOARD_",
    "TORCHELASTIC_",
    "SLURM_",
)
"""Beginnings of variables with which a user chooses something; the tests choose for themselves."""
REMOVED = {
    *("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("LINES", "PYTHONUNBUFFERED", "PYTHONOPTIMIZE", "HF_TOKEN", "HF_ENDPOINT"),
}
_libraries = tempfile.TemporaryDirectory(prefix="fastprune-tests-")

# Before any library is imported: most of them read these once.
for _name in [*os.environ]:
    if _name in REMOVED or (_name.startswith(CHOSEN) and _name != "FASTPRUNE_CPU_LEVEL"):
        del os.environ[_name]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "FASTPRUNE_LANG": "en",  # whatever the locale is
    "HF_HOME": f"{_libraries.name}/huggingface",
    "XDG_CACHE_HOME": f"{_libraries.name}/cache",
    "COLUMNS": "80",
    "TERM": "xterm",
    "OMP_WAIT_POLICY": "PASSIVE",  # cores that are busy: child processes neither probe nor tell
}
sys.path.insert(0, str(Path(__file__).parent))

import precise  # noqa: F401
import torch

from fastprune import progress

_numbers = itertools.count()


def pytest_unconfigure():
    _libraries.cleanup()


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """No test depends on those before it, on how busy the machine is, or on the user's cache."""
    number = f"cache-{next(_numbers)}"  # made by what writes into it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / number))
    monkeypatch.setattr(progress, "DELAY", 3600.0)  # seconds: no progress lines, however slow
    threads, variables = torch.get_num_threads(), dict(os.environ)
    log = logging.getLogger("fastprune")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    random.seed(0)
    torch.manual_seed(0)
    yield
    assert (log.handlers, log.level, log.propagate) == (handlers, level, propagate)
    torch.set_num_threads(threads)
    if os.environ != variables:
        os.environ.clear()
        os.environ.update(variables)
