"""The lines of a run's log that people search for."""

from fastprune.report.summary import gqa_line


def layer(before, after):
    names = ("query_heads", "kv_heads")
    sizes = dict(zip(names, after, strict=True))
    return sizes | {f"{name}_before": size for name, size in zip(names, before, strict=True)}


def test_one_ratio():
    layers = [layer((32, 8), (24, 6)), layer((32, 8), (4, 1)), layer((32, 8), (0, 0))]
    assert gqa_line(layers) == "GQA ratio: all layers kept 4:1"


def test_a_model_of_several_ratios():
    layers = [layer((8, 4), (4, 2)), layer((8, 8), (3, 3))]
    assert gqa_line(layers) == "GQA ratio: all layers kept 1:1, 2:1"


def test_a_broken_ratio():
    layers = [layer((32, 8), (24, 6)), layer((32, 8), (24, 8))]
    assert gqa_line(layers) == "GQA ratio: changed in some layers (4:1 -> 3:1)"


def test_no_attention():
    assert "no attention is left" in gqa_line([layer((8, 4), (0, 0))])
