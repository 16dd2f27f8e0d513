"""Tensors scanned piece by piece give what they give whole; units of foreign checkpoints."""

import math

import pytest
import torch
from safetensors.torch import save_file

from fastprune.inspect.anatomy import Heads, layer_health, wants_lines
from fastprune.inspect.health import scan_weights, stored_weights
from fastprune.models.shards import FILE, ShardReader


def scanned(folder, tensors, piece_bytes=2**20, lines=lambda name: True):
    save_file(tensors, folder / FILE)
    weights = stored_weights(ShardReader(folder), piece_bytes)
    return {health.name: health for health in scan_weights(weights, lines)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece_bytes", [1, 1000, 7000])
def test_pieces_give_what_the_whole_gives(tmp_path, dtype, piece_bytes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 70, generator=generator) + 3
    x[10], x[:, 20] = 0, 0
    x[4, 5], x[40, 41] = 60.0, -50.0  # beyond 6 sigma of the whole; sigma is about 1.2
    x[6, 7], x[8, 9] = math.nan, -math.inf
    x[30] = math.nan  # a piece without a finite value
    x = x.to(dtype)
    whole = scanned(tmp_path, {"x": x})["x"]
    pieces = scanned(tmp_path, {"x": x}, piece_bytes)["x"]
    # counts and extremes exactly; moments are sums in another order, fp32 within a piece
    for field in ("nan", "inf", "zeros", "outliers", "min", "max", "absmax", "numel"):
        assert getattr(pieces.scan, field) == getattr(whole.scan, field), field
    assert pieces.scan.mean == pytest.approx(whole.scan.mean, rel=1e-5)
    assert pieces.std == pytest.approx(whole.std, rel=1e-5)
    assert (whole.scan.nan, whole.scan.inf, whole.scan.outliers) == (71, 1, 2)
    for health in (whole, pieces):
        assert health.zero_rows.nonzero().flatten().tolist() == [10]
        # NaN in row 30 means that no column is zero throughout
        assert health.zero_columns.any() == False  # noqa: E712


def test_zero_columns_over_all_pieces(tmp_path):
    x = torch.ones(50, 6)
    x[:, 2], x[:40, 3] = 0, 0  # column 3 is zero in the first pieces only
    health = scanned(tmp_path, {"x": x}, 300)["x"]
    assert health.zero_columns.tolist() == [False, False, True, False, False, False]


def test_nothing_finite_in_any_piece(tmp_path):
    health = scanned(tmp_path, {"x": torch.full((4, 4), math.inf)}, 16)["x"]
    assert (health.scan.inf, health.scan.outliers) == (16, 0)
    assert math.isnan(health.scan.mean)


def test_other_dtypes(tmp_path):
    tensors = {"wide": torch.tensor([1.0, 1e300], dtype=torch.float64), "codes": torch.arange(9)}
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 4), torch.tensor(2.0)
    found = scanned(tmp_path, tensors)
    assert found["wide"].scan.inf == 1  # as it would be once loaded
    assert found["codes"].scan is None
    assert (found["codes"].numel, found["codes"].dtype) == (9, "i64")
    assert found["codes"].to_dict() == {"name": "codes", "shape": [9], "dtype": "i64"}
    assert found["empty"].scan.numel == 0
    assert found["scalar"].scan.max == 2


def test_layers_of_other_architectures(tmp_path):
    names = ["transformer.h.10.attn.c_attn.weight", "transformer.h.9.mlp.c_fc.weight", "wte.weight"]
    names += ["encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.x.weight"]
    found = scanned(tmp_path, {name: torch.ones(2, 3) for name in names}, lines=wants_lines)
    layers = layer_health(list(found.values()), Heads.of({"num_attention_heads": 2}))
    assert [layer.name for layer in layers] == [
        "decoder.block.0",
        "encoder.block.0",
        "transformer.h.9",
        "transformer.h.10",
    ]
    for layer in layers:
        assert (layer.params, layer.query_heads, layer.channels) == (6, None, None)
        assert layer.problem is None


def test_removed_sublayers_are_zero(tmp_path):
    tensors = {"model.layers.1.input_layernorm.weight": torch.ones(8)}
    for index, names in ((0, "gate up"), (1, "gate up"), (2, "")):
        for name in names.split():
            tensors[f"model.layers.{index}.mlp.{name}_proj.weight"] = torch.ones(5, 8)
        if names:
            tensors[f"model.layers.{index}.mlp.down_proj.weight"] = torch.ones(8, 5)
    for index in (0, 2):
        for name, shape in (("q", (8, 8)), ("k", (4, 8)), ("v", (4, 8)), ("o", (8, 8))):
            tensors[f"model.layers.{index}.self_attn.{name}_proj.weight"] = torch.ones(shape)
    found = scanned(tmp_path, tensors, lines=wants_lines)
    settings = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    layers = layer_health(list(found.values()), Heads.of(settings))
    sizes = [(x.query_heads, x.kv_heads, x.ratio, x.channels) for x in layers]
    assert sizes == [(2, 1, 2, 5), (0, 0, None, 5), (2, 1, 2, 0)]
    assert not any(x.problem for x in layers)
