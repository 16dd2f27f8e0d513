"""`fastprune eval` and `fastprune generate` on a tiny model."""

import json

import pytest
from tiny import TEXT, tiny_checkpoint, tiny_model, tiny_tokenizer

from fastprune import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def test_eval_writes_its_figures(model, tmp_path, capsys):
    text, file = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text(TEXT * 10)
    flags = ["--text", str(text), "--seq-len", "32", "--windows", "3", "--json", str(file)]
    assert cli.main(["eval", str(model), *flags]) == 0
    result = json.loads(file.read_text())
    assert set(result) >= {
        "perplexity",
        "tokens",
        "seq_len",
        "windows",
        "seconds",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert (result["seq_len"], result["windows"]) == (32, 3)
    assert f"{result['perplexity']:.2f}" in capsys.readouterr().out


def test_generate_prints_the_continuation_alone(model, tmp_path, capsys):
    file = tmp_path / "result.json"
    flags = ["--prompt", "The river", "--max-new-tokens", "5", "--json", str(file)]
    assert cli.main(["generate", str(model), "--quiet", *flags]) == 0
    result = json.loads(file.read_text())
    assert 1 <= result["new_tokens"] <= 5
    assert capsys.readouterr().out == result["text"] + "\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "MODEL"], "missing --prompt"),
        (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "0"], "at least 1"),
        (["generate", "nowhere/at/all", "--prompt", "x"], "nowhere/at/all"),
        (["eval", "MODEL", "--text", "gone.txt"], "gone.txt"),
        (["eval", "MODEL", "--seq-len", "32", "--windows", "0"], "windows"),
        (["eval", "MODEL", "--seq-len", "513"], "the model has 512 positions"),
        (["eval", "MODEL", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_refusals(model, capsys, args, words):
    assert cli.main([str(model) if arg == "MODEL" else arg for arg in args]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("fastprune: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("command", ["eval", "prune"])
def test_broken_weights_are_numerical_trouble(tmp_path, capsys, command):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    flags = {
        "eval": ["--text", str(text), "--seq-len", "32"],
        "prune": ["--ratio", "0.2", "--eval", str(text), "--eval-seq-len", "32"],
    }[command]
    if command == "prune":
        flags += ["--calib", str(text), "--calib-samples", "4", "--calib-seq-len", "32"]
        flags += ["--out", str(tmp_path / "out")]
    assert cli.main([command, str(tmp_path / "broken"), *flags]) == 4
    assert "NaN or Inf: the weights hold" in capsys.readouterr().err
    left = [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert left == (["run.log"] if command == "prune" else [])
