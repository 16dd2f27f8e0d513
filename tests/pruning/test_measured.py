"""Figures kept in the cache: of the same model and tokens they are not measured again."""

from __future__ import annotations

import pytest
import torch
from calibrated import calibrated
from tiny import TEXT, tiny_model, tiny_tokenizer, token_ids

from fastprune.models.families import decoder_layers
from fastprune.pruning import curves, measured, planning
from fastprune.pruning.budget import layer_size
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.curves import Search, measure_curves
from fastprune.pruning.importance import score
from fastprune.pruning.measured import fingerprint, remembered
from fastprune.pruning.pipeline import prune


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastprune"


def exchanged_rows(model: torch.nn.Module) -> None:
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight[:] = weight.flip(0).clone()


def exchanged_columns(model: torch.nn.Module) -> None:
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight[:] = weight.flip(1).clone()


def exchanged_norms(model: torch.nn.Module) -> None:
    weight = model.model.norm.weight.data
    weight[:] = weight.flip(0).clone()


@pytest.mark.parametrize(
    "change", [exchanged_rows, exchanged_columns, exchanged_norms, torch.nn.Module.bfloat16]
)
def test_a_fingerprint_tells_what_the_figures_depend_on(change) -> None:
    windows = token_ids(2, 16)
    before = fingerprint(calibrated(tiny_model("llama"), windows))
    assert fingerprint(calibrated(tiny_model("llama"), windows)) == before
    assert fingerprint(calibrated(tiny_model("llama"), token_ids(2, 15))) != before
    changed = tiny_model("llama")
    change(changed)
    assert fingerprint(calibrated(changed, windows)) != before


@pytest.mark.parametrize(
    ("module", "constant"), [(curves, "TOP"), (curves, "EVERY"), (curves, "KL_SHARE")]
)
def test_levels_measured_by_other_constants_are_not_used(module, constant, cache, monkeypatch):
    model, windows = tiny_model("llama", layers=1), token_ids(16, 16)
    scores = score(calibrated(model, windows), "magnitude-l2")
    sizes = [layer_size(layer, ("attention",)) for layer in decoder_layers(model)]
    for files in (1, 2):
        measure_curves(Search(calibrated(model, windows), scores, False, cache), sizes)
        assert len(list(cache.iterdir())) == files
        monkeypatch.setattr(curves, constant, 2)


def test_a_file_that_is_damaged_is_measured_anew(cache, caplog) -> None:
    text = calibrated(tiny_model("llama"), token_ids(2, 16))
    assert remembered("some", text, lambda _: [1.0]) == [1.0]
    assert remembered("some", text, lambda _: [2.0]) == [1.0]
    (file,) = (cache / "measured").iterdir()
    file.write_text("[1.0")
    assert remembered("some", text, lambda _: [3.0]) == [3.0]
    assert "does not hold measured figures" in caplog.text


@pytest.mark.parametrize("choice", [
    {"allocation": "inverse", "structures": ("attention", "mlp")},
    {"allocation": "inverse", "structures": ("mlp",), "layer_importance": "activation"},
    {"structures": ("sublayer",)},
])  # fmt: skip
def test_a_run_that_was_cut_off_goes_on_with_what_it_had_measured(choice, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    config = PruneConfig(
        ratio=0.3, compensate="none", calib=str(text), calib_samples=4, calib_seq_len=32,
        eval=str(text), eval_seq_len=32, eval_windows=2, **choice,
    )  # fmt: skip

    def cut_off(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(planning, "allocate_budget", cut_off)
        patch.setattr(planning, "removal", lambda *_: ([1.0, 2.0, 3.0, 4.0], 9.0))
        with pytest.raises(KeyboardInterrupt):
            prune(tiny_model("llama"), tiny_tokenizer(), config)
    for name in ("removal", "activation", "sublayer_losses"):
        monkeypatch.setattr(planning, name, lambda *_: pytest.fail("measured a second time"))
    read = []
    original = measured.read
    monkeypatch.setattr(measured, "read", lambda *a: read.append(original(*a)) or read[-1])
    prune(tiny_model("llama"), tiny_tokenizer(), config)
    assert len(read) == 1 and len(read[0]) == 4


def test_a_cache_that_cannot_be_written_costs_a_warning(cache, caplog) -> None:
    cache.write_text("a file in its place")
    text = calibrated(tiny_model("llama"), token_ids(2, 16))
    assert remembered("figures", text, lambda _: [1.0]) == [1.0]
    assert "another run measures its figures anew" in caplog.text
