"""A sound model whose activations leave float16: every command says so, and that bfloat16 helps."""

import io
import json

import pytest
import torch
from tiny import TEXT, saved, tiny_model, tiny_tokenizer

from fastprune import cli
from fastprune.errors import NumericalError
from fastprune.inspect.health import unsound

TOLD = "the model overflows in float16; use --dtype bfloat16"


def overflowing(dtype=torch.bfloat16, factor=1000.0):
    """A tiny model that computes the same in bf16 as without the factors, and not in fp16."""
    model = tiny_model("llama", layers=2)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(20)
        mlp.up_proj.weight.mul_(factor)
        mlp.down_proj.weight.div_(factor)
    return model.to(dtype)


@pytest.fixture
def folder(tmp_path):
    folder = saved(tmp_path / "model", overflowing())
    tokenizer = tiny_tokenizer().__class__.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 40)
    return file


def flags_of(command, text, out):
    calibrating = ["--calib", str(text), "--calib-samples", "4", "--calib-seq-len", "32"]
    measured = ["--eval", str(text), "--eval-seq-len", "32", "--eval-windows", "2"]
    return {
        "eval": ["--text", str(text), "--seq-len", "32", "--windows", "2"],
        "generate": ["--prompt", "The river"],
        "chat": [],
        "diagnose": [],
        "prune": ["--ratio", "0.2", "--out", str(out), *calibrating, *measured],
        "prune --dry-run": ["--ratio", "0.2", "--dry-run", *calibrating, *measured],
        "prune --stream": ["--ratio", "0.2", "--stream", "--out", str(out), *calibrating,
                           *measured],
        "finetune": ["--data", str(text), "--out", str(out), "--precision", "bf16", *measured],
    }[command]  # fmt: skip


@pytest.mark.parametrize("command", [
    "eval", "generate", "chat", "diagnose", "prune", "prune --dry-run", "finetune",
])  # fmt: skip
def test_float16_is_named_and_not_the_weights(tmp_path, folder, text, capsys, monkeypatch, command):
    monkeypatch.setattr("sys.stdin", io.StringIO("The river\n"))
    flags = flags_of(command, text, tmp_path / "out")
    status = cli.main([command.split()[0], str(folder), *flags, "--dtype", "float16"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 4, error
    assert "overflows in float16; use --dtype bfloat16" in error
    assert "broken" not in error
    assert not (tmp_path / "out/config.json").exists()


def test_streamed_weights_are_not_blamed_either(tmp_path, folder, text, capsys):
    flags = flags_of("prune --stream", text, tmp_path / "out")
    assert cli.main(["prune", str(folder), *flags, "--dtype", "float16"]) == 4
    told = capsys.readouterr().err
    assert "the weights are broken, or the model overflows in float16; use --dtype bfloat16" in told


@pytest.mark.parametrize("command", ["eval", "generate", "diagnose"])
def test_bfloat16_helps(tmp_path, folder, text, capsys, command):
    assert cli.main([command, str(folder), *flags_of(command, text, tmp_path)]) == 0


def test_diagnose_says_where_and_what_to_run(tmp_path, folder):
    file = tmp_path / "found.json"
    assert cli.main(["diagnose", str(folder), "--dtype", "float16", "--json", str(file)]) == 4
    found = json.loads(file.read_text())
    (broken,) = (f["what"] for f in found["findings"] if f["severity"] == "broken")
    assert broken.endswith("use --dtype bfloat16 or float32 (in model.layers.1.mlp.down_proj)")
    assert found["advice"][0]["command"] == f"fastprune diagnose {folder} --dtype bfloat16"


@pytest.mark.parametrize("scores", ["taylor-first", "activation"])
def test_scores_too(folder, text, tmp_path, capsys, scores):
    flags = flags_of("prune --dry-run", text, tmp_path)
    flags += ["--importance", scores, "--dtype", "float16"]
    assert cli.main(["prune", str(folder), *flags]) == 4
    assert f"the {scores} scores came out as NaN or Inf: {TOLD}" in capsys.readouterr().err


def test_weights_are_blamed_where_they_are_at_fault():
    half, single = overflowing(torch.float16), tiny_model("llama", layers=1)
    assert TOLD in str(unsound(half, "the loss"))
    assert "use --precision bf16" in str(unsound(single, "the loss", torch.float16))
    assert "overflows in float32, though every weight is finite" in str(unsound(single, "the loss"))
    single.lm_head.weight.data[0, 0] = torch.inf
    assert "the weights hold 1 Inf in" in str(unsound(single, "the loss"))
    half.lm_head.weight.data[0, 0] = torch.inf  # 1e5 of a checkpoint in bf16 becomes that
    assert "the weights overflow in float16; use --dtype bfloat16" in str(unsound(half, "x"))
    half.lm_head.weight.data[0, 0] = torch.nan
    error = unsound(half, "the loss")
    assert "the weights hold 1 NaN in" in str(error) and isinstance(error, NumericalError)
