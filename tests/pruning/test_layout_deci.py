"""`--layout deci` makes plans that a DeciLM carries as they are."""

import json

import pytest
import torch
from tiny import TEXT, tiny_checkpoint, tiny_model

from fastprune.errors import InputError
from fastprune.models.load import load_model
from fastprune.pruning.budget import layer_sizes
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.effort import decided
from fastprune.pruning.pipeline import run_prune

# 4 query heads of 16 fill the hidden size of 64
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1024}


def prune(tmp_path, **settings):
    folder = tiny_checkpoint(tmp_path / "model", "llama", layers=6, **SIZES)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    small = {"calib_samples": 4, "calib_seq_len": 32, "eval_windows": 1, "eval_seq_len": 32}
    texts = {"calib": str(text), "eval": str(text)}
    out = tmp_path / "out"
    usual = {"importance": "magnitude-l2", "quiet": True, "keep_worse": True, "effort": "fast"}
    run_prune(
        PruneConfig(model=str(folder), out=out, layout="deci", **(usual | small | texts | settings))
    )
    metrics = json.loads((out / "fastprune/metrics.json").read_text())
    return metrics["layers"], metrics["settings"]


def test_channels_go_in_multiples_of_256_and_heads_stay(tmp_path):
    layers, settings = prune(tmp_path, ratio=0.3)
    assert (settings["structures"], settings["align"]) == (["mlp"], 256)
    assert {(x["query_heads"], x["kv_heads"]) for x in layers} == {(4, 2)}
    widths = {x["channels"] for x in layers}
    assert max(widths) <= 1024 and min(widths) < 1024
    assert all(width % 256 == 0 for width in widths)


def test_sublayers_go_whole_but_the_first_attention_stays(tmp_path):
    layers, _ = prune(tmp_path, ratio=0.5, structures=("sublayer",))
    assert {(x["query_heads"], x["kv_heads"]) for x in layers} <= {(4, 2), (0, 0)}
    assert {x["channels"] for x in layers} == {1024, 0}
    assert layers[0]["query_heads"] == 4


def test_the_first_attention_is_no_candidate():
    model = tiny_model("llama", **SIZES)
    common = {"ratio": 0.5, "structures": ("mlp", "sublayer"), "layers": "all"}
    sizes = {
        layout: layer_sizes(model, PruneConfig(layout=layout, **common))
        for layout in ("per-layer", "deci")
    }
    whole, none = (sizes[layout][0].sublayers for layout in ("per-layer", "deci"))
    assert whole["attention"].whole > 0 == none["attention"].whole
    assert whole["mlp"] == none["mlp"]
    assert sizes["per-layer"][1:] == sizes["deci"][1:]


def test_sublayers_stand_in_where_channels_are_too_few():
    model = tiny_model("llama", layers=10, **SIZES)
    deci = decided(PruneConfig(ratio=0.6, layout="deci"), model, 0.6)
    assert deci.structures == ("mlp", "sublayer")


@pytest.mark.parametrize(("width", "layers"), [(1024, "1:9"), (1000, "all")])
def test_the_ends_are_spared_only_where_they_are_aligned(width, layers):
    model = tiny_model("llama", layers=10, **(SIZES | {"intermediate_size": width}))
    found = decided(PruneConfig(ratio=0.2, layout="deci", effort="fast"), model, 0.2)
    assert found.layers == layers


def test_an_explicit_alignment_wins(tmp_path):
    layers, settings = prune(tmp_path, ratio=0.3, align=64)
    assert settings["align"] == 64
    assert all(x["channels"] % 64 == 0 for x in layers)
    assert any(x["channels"] % 256 for x in layers)


def test_kv_groups_are_refused():
    config = PruneConfig(model="x", ratio=0.2, layout="deci", structures=("attention", "mlp"))
    with pytest.raises(InputError, match="query head"):
        config.check()


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("qwen2", {}, "biases"),
        ("qwen3", {}, "norms of q and k"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"mlp_bias": True}, "biases"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("mistral", {"sliding_window": 16}, "sliding window"),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}, None),
    ],
)
def test_models_without_such_a_form_are_refused_before_the_work(tmp_path, family, settings, words):
    if words is None:  # 3 query heads to a KV head: 64 is no multiple of 48
        family, words = "mistral", "no multiple of 48"
    folder = tiny_checkpoint(tmp_path / "model", family, **(SIZES | settings))
    with pytest.raises(InputError, match=f"--layout deci: .*{words}"):
        run_prune(PruneConfig(model=str(folder), out=tmp_path / "out", ratio=0.2, layout="deci"))
    assert not (tmp_path / "out").exists()


def test_what_is_written_loads(tmp_path):
    prune(tmp_path, ratio=0.3)
    model, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
