"""Two processes with half the batch each compute what one process with the whole batch does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import in_two
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from training import RUNS, Runner, guarded

from fastprune.distributed import launched
from fastprune.errors import InputError
from fastprune.recover import pipeline, range_test
from fastprune.recover.processes import own_device
from fastprune.sharding import spread


@pytest.fixture(scope="module")
def files(model, text, held_out, tmp_path_factory) -> list[Path]:
    teacher = tiny_checkpoint(tmp_path_factory.mktemp("teacher") / "tiny", layers=3, seed=1)
    return [model, teacher, text, held_out]


@pytest.fixture(scope="module")
def two(files, tmp_path_factory) -> Path:
    """The folder that two processes left; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    in_two("training.py", *files, folder)
    return folder


@pytest.fixture(scope="module")
def one(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_test, "RATES", range_test.RATES)  # `Runner` sets them; this puts
        patch.setattr(pipeline, "SAMPLE_TOKENS", pipeline.SAMPLE_TOKENS)  # them back
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        run = Runner(files, batch_size=4)
        for name in RUNS:
            run(name, folder / name)
    return folder


def lines(out: Path) -> list[dict]:
    log = (out / "fastprune" / "train_log.jsonl").read_text()
    return list(map(json.loads, log.splitlines()))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next(out.glob("*model.safetensors")))


def metrics(out: Path) -> dict:
    return json.loads((out / "fastprune" / "metrics.json").read_text())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RUNS)
def test_the_same_losses_and_weights(one, two, name, kind):
    alone, together = lines(one / name), lines(two / kind / name)
    assert len(alone) == len(together) == (6 if name == "full" else 4)
    for expected, found in zip(alone, together):
        assert found.keys() == expected.keys()
        for key in expected.keys() & {"loss", "eval_loss"}:
            # fp32 sums over 248 tokens in another order; four Adam steps amplify it little
            assert found[key] == pytest.approx(expected[key], rel=1e-4)
        if "lr" in expected:
            assert found["lr"] == expected["lr"]
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    saved = weights(two / kind / name)
    for key, expected in weights(one / name).items():
        # an Adam step of a gradient near zero may go either way: two of four steps at most
        assert (saved[key] - expected).abs().max() <= 4e-3
        assert (saved[key] - expected).abs().mean() < 2e-5, key
    figures = [metrics(out / name)["perplexity"][0] for out in (one, two / kind)]
    for key in ("before", "after"):
        assert figures[1][key] == pytest.approx(figures[0][key], rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_prompts_are_continued_by_adapters_that_are_spread(one, two, kind):
    samples = [metrics(out / "lora")["samples"] for out in (one, two / kind)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 1


def test_a_sharded_run_resumes_bit_for_bit(two):
    whole, resumed = two / "fsdp" / "full", two / "resumed" / "fsdp"
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed).items())
    last = [[line.get("loss") for line in lines(out)][-3:] for out in (whole, resumed)]
    assert last[0] == last[1]


def test_a_sharded_run_resumes_unsharded(two):
    expected = weights(two / "fsdp" / "full")
    for key, value in weights(two / "resumed" / "ddp").items():
        # two steps of a run that differs in the order of fp32 sums
        assert (value - expected[key]).abs().mean() < 2e-5, key


def test_the_guard_brings_every_shard_back(one, two, files):
    alone = guarded(files, 4)
    assert (alone["rollbacks"], alone["skipped_steps"], alone["lr_factor"]) == (1, 3, 0.5)
    for rank in range(2):
        found = torch.load(two / f"guarded-{rank}.pt")
        for key, value in found.pop("weights").items():
            # as above, with three steps that count
            assert (value - alone["weights"][key]).abs().mean() < 2e-5, key
        assert found == {key: value for key, value in alone.items() if key != "weights"}


def test_several_dtypes_cannot_be_sharded():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).half())
    with pytest.raises(InputError, match="several dtypes"):
        spread(model, torch.device("cpu"))


def test_what_accelerate_launch_says_about_sharding_is_heard(two):
    assert metrics(two / "launched")["settings"]["shard"]
    assert not metrics(two / "ddp" / "lora")["settings"]["shard"]
    expected = weights(two / "fsdp" / "lora")
    assert all(torch.equal(v, expected[k]) for k, v in weights(two / "launched").items())


def test_the_first_process_tokenises_for_all(two):
    assert (two / "tokenised").read_text().split() == ["0"]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="--nproc-per-node 1, or --device cpu"):
        own_device("auto", launched())
    assert own_device("cpu", launched()) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert own_device("auto", launched()) == torch.device("cuda", 0)
