"""`fastprune compare` of runs of several commands."""

import json

import pytest
from tiny import TEXT, tiny_checkpoint

from fastprune import cli
from fastprune.errors import InputError
from fastprune.report.compare import compare

WINDOWS = {"text": "a.txt", "seq_len": 128, "windows": 16}
PRUNE = {
    "model": "org/tiny",
    "params": {"before": 2000, "after": 1800, "block_before": 1000, "block_after": 800},
    "ratio": {"requested": 0.2, "achieved": 0.2},
    "perplexity": [{**WINDOWS, "before": 20.0, "after": 30.0}],
    "seconds": {"total": 75.0},
    "settings": {"importance": "taylor-first"},
}
FINETUNE = {
    "model": "runs/pruned",
    "params": {"total": 1800, "block": 800, "learning": 500},
    "perplexity": [{**WINDOWS, "before": 30.0, "after": 24.0}],
    "stages": [],
    "seconds": {"total": 60.0},
    "settings": {"lr": 1e-4, "seed": 0},
}
MERGE = {
    "model": "runs/pruned",
    "adapter": "runs/lora",
    "params": {"model": 1800, "block": 800, "adapter": 30},
    "seconds": {"total": 6.0},
    "settings": {"strength": 1.0},
}
EVAL = {
    "model": "runs/merged",
    "perplexity": 23.0,
    **WINDOWS,
    "seconds": 3.5,
    "params": {"total": 1800, "block": 800},
}


@pytest.fixture
def files(tmp_path):
    found = {}
    for name, metrics in (("p", PRUNE), ("f", FINETUNE), ("m", MERGE), ("e", EVAL)):
        found[name] = tmp_path / f"{name}.json"
        found[name].write_text(json.dumps(metrics | {"peak_memory_bytes": 1024}))
    return found


def test_all_four_stand_side_by_side(files, tmp_path, capsys):
    out = tmp_path / "all.html"
    assert cli.main(["compare", *map(str, files.values()), "--out", str(out)]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    rows = result["runs"]
    assert [row["made_by"] for row in rows] == ["prune", "finetune", "merge", "eval"]
    assert [row["params"]["block_after"] for row in rows] == [800] * 4
    assert [row["seconds"] for row in rows] == [75.0, 60.0, 6.0, 3.5]
    (measured,) = result["measurements"]
    assert measured["drawn"] == ["p", "f", "e"] and measured["pareto"] == ["e"]
    assert all(not row["settings"] for row in rows)  # nothing to compare between commands
    page, table = out.read_text(), capsys.readouterr().out
    assert "made by" in page and "4 runs" in page
    assert "23.0" in table


def test_settings_are_compared_within_a_command(files, tmp_path):
    other = tmp_path / "g.json"
    other.write_text(
        json.dumps(FINETUNE | {"settings": {"lr": 2e-4, "seed": 0}, "peak_memory_bytes": 1})
    )
    rows = compare([*files.values(), other])["runs"]
    assert [row["settings"] for row in rows] == [
        {"lr": value} for value in (None, 1e-4, None, None, 2e-4)
    ]


def test_a_run_without_a_count_of_its_blocks_is_in_the_table_alone(files):
    metrics = json.loads(files["f"].read_text())
    del metrics["params"]["block"]
    files["f"].write_text(json.dumps(metrics))
    result = compare(files.values())
    assert result["runs"][1]["params"]["block_after"] is None
    assert "f" not in result["measurements"][0]["drawn"]


@pytest.mark.parametrize(
    ("name", "word"), [("f", "a finetune"), ("m", "a merge"), ("e", "an eval")]
)
def test_what_is_damaged_is_named(files, name, word):
    metrics = json.loads(files[name].read_text())
    del metrics["model"]
    files[name].write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=f"not the metrics of {word} run: model is missing"):
        compare(files.values())


def test_what_eval_writes_is_taken(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    (tmp_path / "t.txt").write_text(TEXT * 4)
    call = ["eval", str(model), "--text", str(tmp_path / "t.txt"), "--seq-len", "32"]
    assert cli.main([*call, "--windows", "2", "--json", str(tmp_path / "e.json")]) == 0
    (run,) = compare([tmp_path / "e.json"])["runs"]
    assert run["model"] == str(model)
    assert 0 < run["params"]["block_after"] < run["params"]["after"]
