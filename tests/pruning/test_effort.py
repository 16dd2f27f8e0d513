"""What `--effort` chooses where nothing is said."""

import pytest
from tiny import tiny_model

from fastprune.pruning.config import PruneConfig
from fastprune.pruning.effort import decided


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=10, intermediate_size=1024)


@pytest.mark.parametrize(
    ("effort", "share", "expected"),
    [
        ("fast", 0.2, {"structures": ("mlp",), "allocation": "uniform", "layers": "1:9"}),
        ("fast", 0.2, {"calib_samples": 128, "compensate": "least-squares", "align": 32}),
        ("balanced", 0.1, {"structures": ("mlp",), "allocation": "search", "layers": "all"}),
        ("balanced", 0.1, {"max_layer_ratio": 0.9, "exchange_rounds": 0, "calib_samples": 512}),
        ("balanced", 0.3, {"max_layer_ratio": 0.6}),
        ("thorough", 0.2, {"allocation": "search", "exchange_rounds": 1}),
        ("fast", 0.5, {"structures": ("attention", "mlp"), "allocation": "global", "alpha": 0.3}),
        ("balanced", 0.5, {"structures": ("attention", "mlp"), "allocation": "search"}),
    ],
)
def test_by_ratio_and_effort(model, effort, share, expected):
    found = decided(PruneConfig(ratio=share, effort=effort), model, share)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    "given",
    [
        {"structures": ("attention",)},
        {"allocation": "inverse", "alpha": 1.2},
        {"layers": "2:5"},
        {"max_layer_ratio": 0.5},
        {"align": 1},
        {"calib_samples": 7},
        {"exchange_rounds": 3},
        {"compensate": "none"},
    ],
)
def test_what_is_given_stays(model, given):
    found = decided(PruneConfig(ratio=0.1, **given), model, 0.1)
    assert {name: getattr(found, name) for name in given} == given


def test_uniform_layers_streams_and_single_windows_are_not_searched(model):
    for given in ({"layout": "uniform"}, {"stream": True}, {"calib_samples": 1}):
        assert decided(PruneConfig(ratio=0.2, **given), model, 0.2).allocation == "uniform"


def test_narrow_layers_are_not_aligned():
    config = PruneConfig(ratio=0.2)
    assert decided(config, tiny_model("llama", intermediate_size=96), 0.2).align == 1
    assert decided(config, tiny_model("llama", intermediate_size=1000), 0.2).align == 1
