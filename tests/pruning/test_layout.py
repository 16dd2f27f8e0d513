"""`--layout uniform` ends as a standard model, whatever biases and head counts say."""

import json

import pytest
from tiny import TEXT, tiny_checkpoint

from fastprune.errors import InputError
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.pipeline import run_prune


@pytest.mark.parametrize(
    ("bias", "model_type", "heads"),
    [
        # 6 heads do not divide a hidden size of 64: Mistral's config allows that, Llama's does not
        (False, "mistral", 6),
        # Mistral has no biases, so the nearest count that Llama's config allows
        (True, "llama", 8),
    ],
)
def test_heads_that_do_not_divide_the_hidden_size(tmp_path, bias, model_type, heads):
    folder = tiny_checkpoint(tmp_path / "model", "llama", attention_bias=bias)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    settings = {"structures": ("attention", "mlp"), "importance": "magnitude-l2", "quiet": True}
    small = {"calib_samples": 4, "calib_seq_len": 32, "eval_windows": 1, "eval_seq_len": 32}
    texts = {"calib": str(text), "eval": str(text)}
    out = tmp_path / "out"
    run_prune(
        PruneConfig(
            model=str(folder), out=out, ratio=0.25, layout="uniform", **settings, **small, **texts
        )
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"]) == (model_type, heads)
    assert "auto_map" not in config
    assert json.loads((out / "fastprune/metrics.json").read_text())["ratio"]["achieved"] == (
        pytest.approx(0.25, abs=0.02)
    )


def test_heads_that_must_stay_are_no_budget(tmp_path):
    """StableLM's heads fill the hidden size, so no standard model has fewer of them."""
    folder = tiny_checkpoint(tmp_path / "model", "stablelm")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    small = {"calib_samples": 4, "calib_seq_len": 32, "eval_windows": 1, "eval_seq_len": 32}
    settings = {"importance": "magnitude-l2", "quiet": True, "calib": str(text), "eval": str(text)}
    config = PruneConfig(
        model=str(folder),
        out=tmp_path / "out",
        ratio=0.1,
        layout="uniform",
        structures=("attention",),
        **small,
        **settings,
    )
    with pytest.raises(InputError, match="no standard model of this family has layers with fewer"):
        run_prune(config)
    assert not (tmp_path / "out").exists()
