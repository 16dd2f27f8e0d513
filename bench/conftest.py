"""What the kernel benchmarks share.

A group is one task; the test ids in it name providers, and its `bytes` (in extra_info) are the
bytes that must move, counted alike for every provider. table.py turns that into GB/s and ratios.
"""

import statistics
import sys
import time
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
    """Times a function after two warm-up calls; rounds by the bytes that must move.

    `beside` is run and timed before each round, so that the ratio of the two holds on a machine
    whose speed changes from minute to minute; its median goes into extra_info.
    """

    def run(function, group, moved, beside=None):
        benchmark.group = f"{group}, {torch.get_num_threads()} threads"
        benchmark.extra_info["bytes"] = moved
        rounds, warm = 7 if moved > 3e8 else 15, 2
        seconds = []

        def time_beside():
            start = time.perf_counter()
            beside()
            seconds.append(time.perf_counter() - start)

        setup = time_beside if beside else None
        result = benchmark.pedantic(
            function, setup=setup, rounds=rounds, warmup_rounds=warm, iterations=1
        )
        if beside:
            benchmark.extra_info["beside"] = statistics.median(seconds[warm:])
        return result

    return run
