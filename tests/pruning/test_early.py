"""What sizes, settings and files rule out is refused before weights are read."""

import json
import shutil

import pytest
from tiny import TEXT, tiny_checkpoint

from fastprune import cli
from fastprune.pruning import pipeline
from fastprune.recover import pipeline as recovery


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("early") / "model", layers=2)


@pytest.fixture
def refused(tmp_path, folder, monkeypatch, capsys):
    """Runs a command that must be refused before it loads a model, and leave nothing."""

    def forbidden(*_, **__):
        raise AssertionError("a model was loaded")

    for module, name in ((pipeline, "load_model"), (recovery, "load_or_start")):
        monkeypatch.setattr(module, name, forbidden)
    (tmp_path / "text.txt").write_text(TEXT * 10)
    (tmp_path / "blank.txt").write_text(" \n")

    def run(command, *args):
        before = sorted(tmp_path.rglob("*"))
        text = {"prune": ["--calib", "text.txt", "--eval", "text.txt"], "finetune": []}[command]
        monkeypatch.chdir(tmp_path)
        given = [command, str(folder), "--out", "out", *text, *map(str, args)]
        assert cli.main(given) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ratio", "0.2", "--layers", "29:3"], "selects nothing usable of 2 layers"),
        (["--ratio", "0.2", "--layers", "9" * 5000 + ":1"], "must be written A:B"),
        (["--vocab", "9" * 5000], "give keep:TEXT, a number of tokens, or a share"),
        (["--vocab", "9" * 400 + "%"], "give keep:TEXT, a number of tokens, or a share"),
        (["--ratio", "0.5", "--max-layer-ratio", "0.2"], "cannot be reached"),
        (["--ratio", "0.2", "--align", "1000"], "--align 1000: layer 0 has 96 channels"),
        (["--ratio", "1e-9"], "rounds to nothing"),
        (["--target-params", "5"], "cannot be reached"),
        (["--ratio", "0.2", "--eval-seq-len", "4096"], "the model has 512 positions"),
        (["--ratio", "0.2", "--calib", "missing.txt"], "no such file"),
        (["--ratio", "0.2", "--eval", "blank.txt"], "no text in it"),
        (["--plan", "missing.json"], "cannot be read"),
        (
            ["--ratio", "0.2", "--allocation", "inverse", "--layer-importance", "missing.json"],
            "cannot be read",
        ),
    ],
)
@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["in memory", "streamed"])
def test_pruning_is_refused_at_once(refused, args, words, stream):
    assert words in refused("prune", *args, *stream)


def test_a_plan_for_another_model_is_refused_at_once(refused, tmp_path, folder):
    size = {"query_heads": 8, "kv_heads": 4, "head_dim": 16, "channels": 96}
    layer = {"index": 0, "kv_groups": [0], "channels": [0]}
    plan = {"format": "fastprune-plan/1", "model": {"layers": [size]}, "layers": [layer]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert "it has 1 layers, the model 2" in refused("prune", "--plan", "plan.json")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "missing.jsonl"], "no such file"),
        (["--data", "text.txt", "--freeze", "last:" + "9" * 5000], "--freeze"),
        (["--data", "empty.jsonl"], "no data in it"),
        (["--data", "text.txt", "--test-data", "missing.txt"], "no such file"),
        (["--data", "text.txt", "--eval", "blank.txt"], "no text in it"),
        (["--data", "text.txt", "--teacher", "missing"], "neither a local path"),
        (["--data", "text.txt", "--teacher", "broken"], "broken or unknown config"),
    ],
)
def test_finetuning_is_refused_at_once(refused, tmp_path, folder, args, words):
    (tmp_path / "empty.jsonl").write_text("")
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken/config.json").write_text("[" * 10**5)
    assert words in refused("finetune", *args)
