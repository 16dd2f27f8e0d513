"""The scripts in tools/examples, run as a user would, on a tiny model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import ROOT, program
from tiny import TEXT, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

import fastprune
from fastprune.models.load import load_model


@pytest.fixture(autouse=True)
def one_thread_and_an_own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_checkpoint(tmp_path / "model")


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 30)
    return file


@pytest.fixture
def run(monkeypatch, capsys):
    """What an example prints when it is started with `args`."""

    def start(name, *args):
        example = program(f"examples/{name}")
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        example.main()
        return capsys.readouterr().out

    return start


def parameters(folder):
    """Of the model in `folder`, as anyone with fastprune loads it."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() for p in loaded.parameters())


def test_prune(run, model, text, tmp_path):
    out = tmp_path / "out"
    calib = tmp_path / "calib.txt"
    calib.write_text(TEXT * 4)
    flags = ("--calib", calib, "--eval", text, "--effort", "fast", "--ratio", "0.3")
    printed = run("prune.py", model, out, *flags, "--calib-samples", "4", "--calib-seq-len", "32")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ratio"]["achieved"] == pytest.approx(0.3, abs=0.01)
    assert f"parameters  {metrics['params']['before']:,} -> {parameters(out):,}\n" in printed
    assert "layer 3: " in printed
    with pytest.raises(FileExistsError):
        run("prune.py", model, out)


def test_finetune(run, model, text, tmp_path):
    flags = ("--data", text, "--eval", text, "--seq-len", "32", "--lr", "1e-3", "--grad-accum", "1")
    printed = run("finetune.py", model, tmp_path / "out", *flags, "--samples", "8")
    assert "8 steps, 0 skipped\n" in printed
    before, after = map(float, printed.split("perplexity  ")[1].split(" -> "))
    assert after < before
    assert parameters(tmp_path / "out") == parameters(model)


def test_finetune_that_does_harm_is_not_saved(run, model, text, tmp_path):
    flags = ("--data", text, "--eval", text, "--seq-len", "32", "--lr", "10", "--samples", "8")
    with pytest.raises(SystemExit, match="not saved: "):
        run("finetune.py", model, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_post_train_lora(run, model, text, tmp_path):
    out = tmp_path / "out"
    text.write_text(TEXT * 6)
    flags = ("--data", text, "--eval", text, "--cutoff-len", "32", "--val-set-size", "2")
    batches = ("--batch-size", "4", "--micro-batch-size", "2", "--learning-rate", "1e-3")
    run("post_train_lora.py", model, out, *flags, *batches, "--num-epochs", "1")
    assert (out / "adapter" / "adapter_config.json").is_file()
    ids = torch.tensor([tiny_tokenizer()("The river").input_ids])
    logits = {}
    for name, source, adapter in (
        ("dense", model, None), ("merged", out / "merged", None), ("beside", model, out / "adapter")
    ):  # fmt: skip
        loaded, _ = load_model(source, adapter=adapter)
        logits[name] = loaded(ids).logits.detach()
    assert torch.allclose(logits["merged"], logits["beside"], atol=1e-4)  # sums in another order
    assert not torch.allclose(logits["merged"], logits["dense"], atol=1e-4)


def test_compress(monkeypatch, capsys, model, text, tmp_path):
    example = program("examples/compress.py")
    small = {"calib_samples": 4, "calib_seq_len": 32, "eval_seq_len": 32, "eval_windows": 2}
    training = {"seq_len": 32, "samples": 4, "batch_size": 2, "minutes": None, "epochs": 1}
    out = tmp_path / "out"
    config = replace(
        example.CONFIG, out=out, calib=str(text), eval=str(text), data=str(text), effort="fast",
        speed=False, threads=1, **small, **training,
    )  # fmt: skip
    for name, value in (("MODEL", str(model)), ("OUT", out), ("CONFIG", config)):
        monkeypatch.setattr(example, name, value)
    example.main()
    printed = capsys.readouterr().out
    for name in ("dense", "pruned", "recovered"):
        assert f"{name:9}  perplexity " in printed
    assert parameters(out) < parameters(model)


def test_kernels_only(run, model, text):
    lines = run("kernels_only.py", model, text, "--steps", 6, "--seq-len", 32, "--lr", 1e-2)
    losses = [float(line.split("loss ")[1]) for line in lines.splitlines() if "loss" in line]
    assert len(losses) == 6
    assert min(losses[3:]) < losses[0]
    assert "0 steps were skipped" in lines
    assert "layer 3: the least important of 96 channels are [" in lines


def test_every_example_says_how_it_is_started():
    for file in (ROOT / "tools" / "examples").glob("*.py"):
        assert f"python {file.name}" in program(f"examples/{file.name}").__doc__


def test_the_settings_of_compress_are_valid():
    assert isinstance(program("examples/compress.py").CONFIG, fastprune.CompressConfig)
