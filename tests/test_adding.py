"""What is added from outside the package, in a few lines each: a recipe, a form of export."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from tiny import tiny_checkpoint

from fastprune.exporting.config import ExportConfig
from fastprune.exporting.formats import FORMATS, Format, register_format
from fastprune.exporting.pipeline import run_export
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.recipes import load_recipe

RECIPE = """
about: attention first, gently
stages:
  - {name: attention, freeze: mlp, lr: 1e-6, max_steps: 10, gate: 1.0}
  - {name: all, lr: 1e-5, max_steps: 20}
"""
FORMAT = """
from fastprune.errors import InputError


def check(model, config):
    if config.pad:
        raise InputError("--format sizes has nothing to pad; leave --pad out")


def write(model, tokenizer, path, config):
    lines = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()]
    path.write_text("\\n".join(lines))
    return {"bytes": path.stat().st_size, "notes": [f"{len(lines)} tensors"]}
"""


def test_a_recipe(tmp_path):
    file = tmp_path / "gentle.yaml"
    file.write_text(RECIPE)
    recipe = load_recipe(FinetuneConfig(recipe=str(file)))
    assert (recipe.name, recipe.about) == ("gentle", "attention first, gently")
    assert [(s.name, s.freeze, s.lr, s.gate) for s in recipe.stages] == [
        ("attention", "mlp", 1e-6, 1.0),
        ("all", "none", 1e-5, None),
    ]


class TestFormat:
    @pytest.fixture(autouse=True)
    def sizes(self, tmp_path, monkeypatch) -> Iterator[None]:
        (tmp_path / "format_of_sizes.py").write_text(FORMAT)
        monkeypatch.syspath_prepend(tmp_path)
        register_format("sizes", Format("format_of_sizes", suffix=".txt"))
        yield
        del FORMATS["sizes"]
        sys.modules.pop("format_of_sizes", None)

    def test_it_is_written(self, tmp_path):
        model, out = tiny_checkpoint(tmp_path / "model", layers=1), tmp_path / "sizes.txt"
        result = run_export(ExportConfig(model=str(model), format=("sizes",), out=out))
        assert "model.embed_tokens.weight (300, 64)" in out.read_text()
        assert result["written"]["sizes"]["bytes"] == out.stat().st_size

    def test_beside_another(self, tmp_path):
        model, out = tiny_checkpoint(tmp_path / "model", layers=1), tmp_path / "forms"
        run_export(ExportConfig(model=str(model), format=("hf", "sizes"), out=out))
        assert (out / "hf" / "config.json").is_file() and (out / "model.txt").is_file()

    def test_no_name_is_taken_twice(self):
        with pytest.raises(ValueError, match="'hf' is registered already"):
            register_format("hf", Format("format_of_sizes"))
