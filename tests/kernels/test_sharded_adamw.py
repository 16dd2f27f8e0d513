"""AdamW on DTensors: two processes with half the batch each do what one does with all of it."""

import pytest
import torch
from processes import in_two
from sharded import DTYPES, train

pytestmark = pytest.mark.timeout(600)  # seconds: the processes of `two` share few cores


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What each of two processes found; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    in_two("sharded.py", folder)
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]


@pytest.fixture(params=["sharded", "replicated"])  # FSDP, and what is left of HSDP with two
def mesh(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_one_process_with_the_doubled_batch(two, mesh, dtype):
    one = train(None, dtype)
    # gradients are sums in another order; in bfloat16 they are rounded before they are added
    rtol = 1e-5 if dtype == torch.float32 else 0.05
    for found in (ranks[mesh, dtype] for ranks in two):
        assert found["norms"] == pytest.approx(one["norms"], rel=rtol)
        assert found["skipped"] == one["skipped"] == 1
        assert found["culprits"] == one["culprits"] == {"0.weight": 6}
        for name, weight in one["weights"].items():
            # four steps of at most lr = 1e-2; far below that where nothing is rounded
            atol = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=atol)
        for i, state in one["state"].items():
            assert found["state"][i].keys() == state.keys()
            for key, value in state.items():
                assert found["state"][i][key].shape == value.shape
                assert found["state"][i][key].dtype == value.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_processes_agree_and_resume_bit_for_bit(two, mesh, dtype):
    first, second = (ranks[mesh, dtype] for ranks in two)
    assert first["resumed"]
    assert second["resumed"]
    assert first["norms"] == second["norms"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
