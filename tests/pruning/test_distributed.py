"""Two processes under torchrun, on gloo: the plans and models that one process makes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import in_two
from safetensors.torch import load_file
from sharing import RUNS, measure, prune
from tiny import TEXT, tiny_checkpoint

from fastprune.distributed import ALONE, joined
from fastprune.errors import InputError

pytestmark = pytest.mark.timeout(600)  # seconds: the processes of `two` share few cores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"{n}: {TEXT}" for n in range(40)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def two(checkpoint, text, tmp_path_factory) -> Path:
    """The folder that two processes left; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    # as many threads as here: torch's matrix products may depend on that
    in_two("sharing.py", checkpoint, text, folder, threads=torch.get_num_threads())
    return folder


@pytest.fixture(scope="module")
def one(checkpoint, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "")  # `prune` sets it; this puts it back
        assert not any(prune(checkpoint, text, folder))
    return folder


def tolerance(name: str) -> float:
    """Relative to the largest value."""
    if name.startswith(("taylor", "removal", "perplexity")):
        return 1e-12  # the same terms, summed in fp64 in another order
    if name.startswith("activation"):
        return 1e-6  # fp64 sums rounded to fp32 norms: the last bit may differ
    # fp32 moments in another order of the sum (1e-7 per term), through the inverse of a matrix
    # whose condition number the damping holds to about 1e3
    return 1e-3


@pytest.mark.parametrize("windows", [9, 1])  # one window: the second process has nothing to do
def test_sums_over_windows(two, windows):
    alone = measure(windows)
    shared = torch.load(two / "measured-0.pt")[windows]
    assert shared.keys() == alone.keys()
    for name, expected in alone.items():
        error = (shared[name] - expected).abs().max() / expected.abs().max()
        assert error <= tolerance(name), name


def test_all_processes_hold_the_same_bits(two):
    first, second = (torch.load(two / f"measured-{n}.pt") for n in range(2))
    for windows, measured in first.items():
        for name, value in measured.items():
            assert torch.equal(value, second[windows][name]), name


@pytest.mark.parametrize("run", RUNS)
def test_prune_makes_the_same_model(one, two, run):
    plan = json.loads((one / run / "fastprune/plan.json").read_text())
    assert json.loads((two / run / "fastprune/plan.json").read_text()) == plan
    alone, shared = (load_file(folder / run / "model.safetensors") for folder in (one, two))
    assert shared.keys() == alone.keys()
    for name, weight in alone.items():
        if "--compensate" not in RUNS[run]:
            assert torch.equal(shared[name], weight)
        else:  # see `tolerance`
            torch.testing.assert_close(
                shared[name], weight, rtol=0, atol=1e-3 * weight.abs().max().item()
            )
    before, after = (
        json.loads((folder / run / "fastprune/metrics.json").read_text()) for folder in (one, two)
    )
    assert (before["processes"], after["processes"]) == (1, 2)
    for when in ("before", "after"):
        # 1e-3 of the weights moves the mean loss by less than that
        assert after["perplexity"][0][when] == pytest.approx(
            before["perplexity"][0][when], rel=1e-3
        )


def test_nothing_else_is_left(two):
    assert {p.name for p in two.iterdir()} == {
        *RUNS,
        "cache",
        "measured-0.pt",
        "measured-1.pt",
    }


class TestOneProcess:
    def test_everything_is_its_own(self):
        values = torch.arange(5.0)
        assert torch.equal(ALONE.share(values), values)
        ALONE.sum_(values)
        assert values.tolist() == [0, 1, 2, 3, 4]
        assert ALONE.sums([1.5, 2.5]) == [1.5, 2.5]
        assert (ALONE.largest(3), ALONE.from_first("x"), ALONE.by_first(list)) == (3, "x", [])
        with joined() as processes:
            assert processes is ALONE and (ALONE.rank, ALONE.count) == (0, 1)

    def test_each_takes_its_own_gpu(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(InputError, match="--nproc-per-node 2"), joined():
            pass
        with pytest.raises(InputError, match="leave --device out"), joined("cuda:0"):
            pass
