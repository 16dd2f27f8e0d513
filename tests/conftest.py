"""What every test needs: no network, English, fp32 products, `tiny` importable, and nothing of the
user's or of another test's: folders, variables, logging, threads, random states."""

import itertools
import logging
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import pytest

CHOICES = ("FASTPRUNE_", "WANDB_", "TRACKIO_", "TENSORBOARD_", "ACCELERATE_", "TORCHELASTIC_")
"""Beginnings of variables by which a user chooses something."""
REMOVED = {
    *("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES", "PYTHONUNBUFFERED"),
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
_libraries = tempfile.TemporaryDirectory(prefix="fastprune-tests-")

# Before any library is imported: most of them read these once.
for _name in {*REMOVED, *(name for name in os.environ if name.startswith(CHOICES))}:
    if _name != "FASTPRUNE_CPU_LEVEL":  # which instructions the kernels are tested with
        os.environ.pop(_name, None)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "FASTPRUNE_LANG": "en",  # whatever the locale is
    "HF_HOME": f"{_libraries.name}/huggingface",
    "XDG_CACHE_HOME": f"{_libraries.name}/cache",
    "COLUMNS": "80",
    "TERM": "xterm",
    "OMP_WAIT_POLICY": "PASSIVE",  # where cores are busy, child processes would say so
}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path.insert(0, str(Path(__file__).parent))

import precise  # noqa: E402, F401
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from fastprune import progress  # noqa: E402

settings.register_profile(
    "repeatable", deadline=None, database=None, derandomize=True, max_examples=60
)
settings.load_profile("repeatable")
_numbers = itertools.count()


def pytest_unconfigure():
    _libraries.cleanup()


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """A test depends on none before it, on no cache of the user's, and on no time that passes."""
    cache = tmp_path_factory.getbasetemp() / f"cache-{next(_numbers)}"  # not there yet
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(progress, "DELAY", 3600.0)  # seconds until a slow step says so
    threads, variables = torch.get_num_threads(), dict(os.environ)
    log = logging.getLogger("fastprune")
    before = log.handlers[:], log.level, log.propagate
    random.seed(0)
    torch.manual_seed(0)
    yield
    assert (log.handlers, log.level, log.propagate) == before
    torch.set_num_threads(threads)
    if os.environ != variables:
        os.environ.clear()
        os.environ.update(variables)
