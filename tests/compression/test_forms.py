"""`prune --format` and `compress --format`: the result in other forms beside the checkpoint."""

import json

import pytest
import torch
from adapters import logits
from tiny import TEXT, tiny_checkpoint

from fastprune import cli
from fastprune.inspect.record import Origin
from fastprune.models.load import load_model

SMALL = ["--effort", "fast", "--ratio", "0.3", "--structures", "attention,mlp", "--quiet"]
SMALL += ["--calib-samples", "4", "--calib-seq-len", "32", "--eval-windows", "2"]
SMALL += ["--eval-seq-len", "32", "--keep-worse"]


@pytest.fixture
def run(tmp_path, capsys):
    tiny_checkpoint(tmp_path / "model", "qwen3")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    capsys.readouterr()

    def command(name: str, *flags: str) -> tuple[int, str]:
        texts = ["--calib", str(text), "--eval", str(text)]
        if name == "compress":
            texts += ["--data", str(text), "--eval-also", "none", "--no-speed", "--max-steps", "2"]
            texts += ["--seq-len", "32", "--lora-r", "2"]
        paths = [str(tmp_path / "model"), "--out", str(tmp_path / "out")]
        status = cli.main([name, *paths, *SMALL, *texts, *flags])
        return status, capsys.readouterr().err

    return command


@pytest.mark.parametrize("name", ["prune", "compress"])
def test_the_forms_lie_beside_the_checkpoint(run, tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--layout", "uniform", "--align", "1"]
    status, stderr = run(name, *flags, "--format", "hf-uniform,gguf", "--quant", "f32")
    assert status == 0, stderr
    out = tmp_path / "out"
    model, _ = load_model(out)
    for form in (out / "exported/hf-uniform", out / "exported/model.gguf"):
        read, _ = load_model(form)
        torch.testing.assert_close(logits(read), logits(model), rtol=1e-3, atol=1e-4)
    metrics = json.loads((out / "fastprune/metrics.json").read_text())
    assert metrics["settings"]["format"] == ["hf-uniform", "gguf"]
    dense = str(tmp_path / "model")
    assert [Origin.of(place).dense for place in (out, out / "exported/hf-uniform")] == [dense] * 2


@pytest.mark.parametrize("name", ["prune", "compress"])
def test_a_form_that_the_result_cannot_have_writes_no_model(run, tmp_path, name):
    status, stderr = run(name, "--allocation", "global", "--format", "gguf")
    assert status == 2
    assert "--layout uniform" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "floppy"], "not one of hf,"),
        (["--format", "gguf", "--quant", "q99"], "q99"),
        (["--format", "gguf", "--stream"], "--format does not go with --stream"),
    ],
)
def test_it_refuses(run, tmp_path, flags, words):
    status, stderr = run("prune", *flags)
    assert status == 2
    assert words in stderr
    assert not (tmp_path / "out").exists()
