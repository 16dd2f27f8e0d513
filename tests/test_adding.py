"""What is added from outside, in a few lines each: a score, a recipe, a form of export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from calibrated import calibrated
from tiny import tiny_checkpoint, tiny_model, tiny_tokenizer, token_ids

from fastprune.errors import InputError
from fastprune.exporting.config import ExportConfig
from fastprune.exporting.formats import FORMATS, Format, register_format
from fastprune.exporting.pipeline import run_export
from fastprune.models.families import sublayers
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.importance import REGISTERED, register_score, score
from fastprune.pruning.pipeline import prune
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


class TestScore:
    @pytest.fixture(autouse=True)
    def largest_weight(self) -> Iterator[None]:
        register_score("largest-weight", of_layer)
        yield
        del REGISTERED["largest-weight"]

    def test_it_ranks_the_units(self):
        model = tiny_model("llama")
        ratio = {"ratio": 0.2, "structures": ("mlp",), "allocation": "uniform", "align": 1}
        text = {"calib_samples": 2, "calib_seq_len": 16, "eval_windows": 1, "eval_seq_len": 16}
        down = model.model.layers[0].mlp.down_proj.weight.abs().amax(0)
        config = PruneConfig(importance="largest-weight", compensate="none", **ratio, **text)
        plan = prune(model, tiny_tokenizer(), config).plan
        kept = plan.layers[0].kept["mlp"]
        assert set(kept) == set(down.topk(len(kept)).indices.tolist())

    @pytest.mark.parametrize(
        ("attention", "got"), [({}, "none"), ({"attention": torch.ones(7)}, r"one of \(7,\)")]
    )
    def test_every_unit_needs_one(self, attention, got):
        def some(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
            return {"mlp": of_layer(layer)["mlp"]} | attention

        wanted = f"'largest-weight' gives {got} for 'attention'"
        with (
            patch.dict(REGISTERED, {"largest-weight": some}),
            pytest.raises(InputError, match=wanted),
        ):
            score(calibrated(tiny_model("llama", layers=1), token_ids(1, 8)), "largest-weight")

    def test_no_name_is_taken_twice(self):
        with pytest.raises(ValueError, match="'obs' is registered already"):
            register_score("obs", of_layer)


def of_layer(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The largest weight of each unit's columns of the output matrix."""
    return {
        s.kind: s.linear(layer).weight.abs().amax(0).view(s.units, -1).amax(1)
        for s in sublayers(layer)
    }
