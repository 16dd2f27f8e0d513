"""Devices, seeds and the CPU levels for the kernel tests."""

import pytest
import torch

from fastprune.kernels import backend

_CPU = backend.compiled(torch.device("cpu"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Each device that has compiled kernels; a test of the kernels makes no sense without them."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
    if backend.compiled(device) is None:
        pytest.skip(f"no compiled kernels for {device}")
    return device


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def module():
    if _CPU is None:
        pytest.skip("no compiled kernels")
    return _CPU


@pytest.fixture
def every_way(module):
    """Calls a function once per CPU level and thread count, and gives all its results."""

    def run(function):
        level, threads = module.cpu_level(), torch.get_num_threads()
        results = {}
        try:
            for name in module.cpu_levels():
                module.set_cpu_level(name)
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results[f"{name}, {count} threads"] = function()
        finally:
            module.set_cpu_level(level)
            torch.set_num_threads(threads)
        return results

    return run


@pytest.fixture
def same_bits(every_way):
    """Asserts that a function returns the same tensors, bit for bit, in every way."""

    def check(function):
        results = every_way(function)
        first, *others = results.items()
        for way, result in others:
            for a, b in zip(first[1], result):
                assert torch.equal(a.nan_to_num(nan=12345), b.nan_to_num(nan=12345)), (
                    f"{way} differs from {first[0]}"
                )

    return check
