"""A sample of the random calls of tools/fuzz_kernels, in this process, and that it finds faults."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools" / "fuzz_kernels"))

import examples

from fastprune.kernels import backend, reference

pytestmark = pytest.mark.skipif(
    backend.compiled(torch.device("cpu")) is None, reason="no compiled kernels"
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_sample_is_computed_or_refused():
    found = examples.run_examples(seed=0, first=0, count=300, large=0)
    assert sum(found.values()) == 300
    assert min(found.values()) > 60


def test_the_same_seed_makes_the_same_calls():
    first, again = (examples.run_examples(1, 10, 20, 0.1) for _ in range(2))
    assert first == again


def test_a_wrong_definition_is_found(monkeypatch):
    right = reference.taylor
    monkeypatch.setattr(reference, "taylor", lambda *a, **k: [2 * s for s in right(*a, **k)])
    with pytest.raises(AssertionError, match="taylor"):
        examples.run_examples(seed=0, first=0, count=100, large=0)


def test_a_byte_beside_the_results_is_found():
    block = torch.zeros(10)
    before = [block.clone()]
    block[3] = 1
    examples.check_memory([block], before, [block[2:5]])
    with pytest.raises(AssertionError, match="memory beside the results changed"):
        examples.check_memory([block], before, [block[4:6]])
