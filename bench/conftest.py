"""What the kernel benchmarks share.

A group is one task; the test ids in it name providers, and its `bytes` (in extra_info) are the
bytes that must move, counted alike for every provider. table.py turns that into GB/s and ratios.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=0, help="torch threads; 0: as torch chooses")


def pytest_configure(config):
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


@pytest.fixture
def measure(benchmark):
    """Times a function after two warm-up calls; rounds by the bytes that must move."""

    def run(function, group, moved):
        benchmark.group = f"{group}, {torch.get_num_threads()} threads"
        benchmark.extra_info["bytes"] = moved
        rounds = 7 if moved > 3e8 else 15
        return benchmark.pedantic(function, rounds=rounds, warmup_rounds=2, iterations=1)

    return run
