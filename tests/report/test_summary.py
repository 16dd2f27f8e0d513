"""The lines of a run's log that people search for."""

import pytest

from fastprune.report.summary import gqa_line, recovery_lines, verdict_lines


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


def finetuned(before, after, dense=22.5, pruned=31.0, windows=16):
    window = {"text": "a.txt", "seq_len": 1024}
    known = {**window, "windows": 16, "dense": dense, "pruned": pruned}
    p = {**window, "windows": windows, "before": before, "after": after}
    return {"origin": {"perplexity": [known]}, "perplexity": [p]}


@pytest.mark.parametrize(
    ("figures", "lines"),
    [
        (
            (31.0, 24.2),
            [
                "dense 22.50, pruned 31.00, recovered 24.20: 80.0 % of what pruning cost is made "
                "good",
                "perplexity is 21.9 % lower than before",
            ],
        ),
        ((31.0, 40.0), ["recovered 40.00: nothing of what pruning cost"]),
        ((26.0, 24.2), ["80.0 %", "there was no room for more, the dense model was only 13.5 %"]),
        ((31.0, 28.0), ["35.3 %", "less than the 20.0 % that a recovery should bring: train on"]),
        ((31.0, 24.2, None), ["21.9 % lower"]),
        ((31.0, 24.2, 22.5, 31.0, 8), ["21.9 % lower"]),  # other windows do not compare
    ],
)
def test_how_much_was_recovered(figures, lines):
    found = recovery_lines(finetuned(*figures))
    assert len(found) == len(lines)
    assert all(words in line for words, line in zip(lines, found, strict=True))


def test_a_run_without_a_verdict():
    assert verdict_lines({"perplexity": []}) == []
