"""`fastprune merge`, and `--adapter` of `eval` and `generate`, on a tiny per-layer model."""

import json

import pytest
from adapters import saved
from tiny import TEXT, tiny_checkpoint

from fastprune import cli


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    text = folder / "text.txt"
    text.write_text(TEXT * 10)
    return *saved(folder)[:2], text


def test_commands_with_an_adapter(adapted, tmp_path, capsys):
    base, adapter, text = (str(path) for path in adapted)
    out = str(tmp_path / "out")
    assert cli.main(["merge", base, "--adapter", adapter, "--out", out]) == 0
    assert "change of the logits, float32" in capsys.readouterr().out
    found = {}
    flags = ["--text", text, "--seq-len", "32", "--windows", "3", "--quiet", "--json"]
    for name, model in (
        ("plain", [base]),
        ("unmerged", [base, "--adapter", adapter]),
        ("merged", [out]),
    ):
        file = tmp_path / f"{name}.json"
        assert cli.main(["eval", *model, *flags, str(file)]) == 0
        found[name] = json.loads(file.read_text())["perplexity"]
    # logits that agree to 1e-4 of order 10
    assert found["merged"] == pytest.approx(found["unmerged"], rel=1e-3)
    assert found["plain"] != pytest.approx(found["unmerged"], rel=1e-2)
    prompt = ["--prompt", "The river", "--max-new-tokens", "8", "--quiet"]
    said = {}
    for name, model in (("unmerged", [base, "--adapter", adapter]), ("merged", [out])):
        assert cli.main(["generate", *model, *prompt]) == 0
        said[name] = capsys.readouterr().out
    assert said["unmerged"] == said["merged"]


@pytest.mark.parametrize("command", ["merge", "eval", "generate"])
def test_a_wrong_base_is_bad_input(adapted, tmp_path, capsys, command):
    other = str(tiny_checkpoint(tmp_path / "other"))
    flags = {
        "merge": ["--out", str(tmp_path / "out")],
        "eval": [],
        "generate": ["--prompt", "x"],
    }[command]
    capsys.readouterr()  # what saving has said
    assert cli.main([command, other, "--adapter", str(adapted[1]), *flags]) == 2
    captured = capsys.readouterr()
    assert "was trained on" in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
