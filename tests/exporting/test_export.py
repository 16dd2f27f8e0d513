"""`fastprune export`: what is checked before the work, what is written, what travels with it."""

import json
from types import SimpleNamespace

import pytest
import torch
from adapters import logits, per_layer_model, saved
from tiny import saved as save
from tiny import tiny_checkpoint, tiny_gpt2, tiny_model, tiny_tokenizer

import fastprune
from fastprune import cli
from fastprune.errors import InputError
from fastprune.exporting.config import ExportConfig
from fastprune.exporting.formats import FORMATS
from fastprune.exporting.pipeline import run_export
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.load import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def config(model, out, *formats, **options):
    return ExportConfig(model=str(model), format=formats or ("hf",), out=out, **options)


def test_a_folder_with_its_records(tmp_path):
    model = per_layer_model()
    source = tmp_path / "pruned"
    source.mkdir()
    save_checkpoint(model, tiny_tokenizer(), source)
    records = source / "fastprune"
    records.mkdir()
    params = {"dense": 9, "now": 5, "block_dense": 8, "block_now": 4}
    origin = {"dense": "tiny", "params": params, "removed": 0.5, "perplexity": []}
    (records / "metrics.json").write_text(json.dumps({"origin": origin}))
    (records / "plan.json").write_text("{}")
    result = run_export(config(source, tmp_path / "out"))
    read, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(read), logits(model))
    metrics = json.loads((tmp_path / "out" / "fastprune" / "metrics.json").read_text())
    assert metrics["origin"]["dense"] == "tiny"
    assert metrics["origin"]["params"]["now"] == metrics["params"]["model"]
    assert (tmp_path / "out" / "fastprune" / "plan.json").read_text() == "{}"
    assert result["written"]["hf"]["bytes"] > 4 * metrics["params"]["model"]


def test_only_what_is_ours_is_replaced(model, tmp_path):
    out = tmp_path / "out"
    run_export(config(model, out))
    with pytest.raises(InputError, match="exists already"):
        run_export(config(model, out))
    run_export(config(model, out, overwrite=True))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="not a checkpoint that fastprune wrote"):
        run_export(config(model, foreign, overwrite=True))
    assert (foreign / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize("named", [True, False], ids=["--adapter", "its folder"])
def test_an_adapter_is_merged_first(tmp_path, named):
    base, adapter, expected = saved(tmp_path)
    made = config(base, tmp_path / "out", adapter=adapter) if named else None
    run_export(made or config(adapter, tmp_path / "out"))
    read, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(read), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_beside_its_base_is_merged_first(tmp_path, caplog):
    base, adapter, expected = saved(tmp_path)
    for file in adapter.iterdir():
        if not (base / file.name).exists():
            file.rename(base / file.name)
    run_export(config(base, tmp_path / "out"))
    read, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(read), expected, rtol=1e-4, atol=1e-4)
    plain, _ = load_model(base)  # left out elsewhere, and said so
    assert (logits(plain) - expected).norm() > 0.1 * expected.norm()
    assert f"give --adapter {base}" in caplog.text


def test_an_adapter_that_names_no_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="does not say which model"):
        run_export(config(tmp_path, tmp_path / "out"))


def test_a_model_in_memory(tmp_path):
    model = tiny_model("qwen2")
    result = fastprune.export(model, tiny_tokenizer(), config("mine", tmp_path / "out"))
    assert result["model"] == "mine"
    read, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(read), logits(model))


def test_several_formats_stand_side_by_side(model, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "copy", FORMATS["hf"])
    result = run_export(config(model, tmp_path / "out", "hf", "copy"))
    for name in ("hf", "copy"):
        assert load_model(tmp_path / "out" / result["written"][name]["file"])[0].dtype
        assert (tmp_path / "out" / name / "fastprune" / "metrics.json").is_file()
    assert (tmp_path / "out" / "fastprune" / "metrics.json").is_file()


def test_nothing_is_written_unless_every_format_can_be(model, tmp_path, monkeypatch):
    def refuse(*_):
        raise InputError("no")

    never = SimpleNamespace(suffix="", entry=str, writer=SimpleNamespace(check=refuse))
    monkeypatch.setitem(FORMATS, "never", never)
    with pytest.raises(InputError, match="no"):
        run_export(config(model, tmp_path / "out", "hf", "never"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "onnxx"], "--format onnxx: not one of hf"),
        (["--format", ""], "name at least one of hf"),
        (["--format", "hf", "--adapter", "nowhere"], "not an adapter folder"),
    ],
)
def test_bad_usage_is_one_line(model, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    capsys.readouterr()
    assert cli.main(["export", str(model), "--out", str(out), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_family_is_a_folder_too(tmp_path):
    model = tiny_gpt2()
    run_export(config(save(tmp_path / "gpt2", model), tmp_path / "out"))
    read, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(read), logits(model))


def test_the_command_tells_what_it_wrote(model, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "result.json"
    assert cli.main(["export", str(model), "--format", "hf", "--out", str(out)]) == 0
    assert f"hf  {out}  " in capsys.readouterr().out
    flags = ["--format", "hf", "--out", str(out), "--overwrite", "--quiet", "--json", str(file)]
    assert cli.main(["export", str(model), *flags]) == 0
    assert json.loads(file.read_text())["written"]["hf"]["notes"] == []
