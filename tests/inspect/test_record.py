"""Where a checkpoint comes from, read from its records, those of earlier versions too."""

import json

import pytest

from fastprune.inspect.record import Figures, Origin, Params

WINDOWS = ("a.txt", 1024, 16)


def pruning(model="dense", before=22.5, after=31.1, **changes):
    """What `prune` has always written, as far as it matters here."""
    params = {"before": 134, "after": 113, "block_before": 100, "block_after": 80}
    p = {"text": "a.txt", "seq_len": 1024, "windows": 16, "before": before, "after": after}
    metrics = {"model": str(model), "command": "fastprune prune", "params": params,
               "ratio": {"requested": 0.2, "achieved": 0.2}, "perplexity": [p]}  # fmt: skip
    return metrics | changes


def folder(place, metrics):
    (place / "fastprune").mkdir(parents=True)
    (place / "fastprune" / "metrics.json").write_text(json.dumps(metrics))
    return place


PRUNED = Origin("dense", Params(134, 113, 100, 80), {WINDOWS: Figures(22.5, 31.1)})


def test_of_a_pruned_model(tmp_path):
    assert Origin.of(folder(tmp_path / "pruned", pruning())) == PRUNED
    assert PRUNED.removed == pytest.approx(0.2)
    assert PRUNED.figures(WINDOWS) == Figures(22.5, 31.1)
    assert PRUNED.figures(("a.txt", 128, 16)) == Figures(None, None)  # other windows
    assert PRUNED.known() == WINDOWS


def test_it_is_read_as_it_was_written(tmp_path):
    stored = json.loads(json.dumps(PRUNED.to_dict()))
    assert stored["removed"] == pytest.approx(0.2)
    assert Origin.of(folder(tmp_path / "later", {"model": "x", "origin": stored})) == PRUNED


def test_earlier_versions_lead_back_by_the_model_they_began_with(tmp_path):
    pruned = folder(tmp_path / "pruned", pruning())
    tuned = folder(tmp_path / "tuned", {"model": str(pruned), "stages": []})
    merged = folder(tmp_path / "merged", {"model": str(tuned), "agreement": []})
    assert Origin.of(merged) == PRUNED


def test_a_model_pruned_twice_goes_back_to_the_first(tmp_path):
    first = folder(tmp_path / "first", pruning())
    params = {"before": 113, "after": 93, "block_before": 80, "block_after": 60}
    again = folder(tmp_path / "again", pruning(first, 31.1, 40.0, params=params))
    assert Origin.of(again) == Origin(
        "dense", Params(134, 93, 100, 60), {WINDOWS: Figures(22.5, 40.0)}
    )
    assert Origin.of(again).removed == pytest.approx(0.4)


def test_what_the_dense_model_was_not_measured_on_stays_unknown(tmp_path):
    first = folder(tmp_path / "first", pruning())
    other = [{"text": "b.txt", "seq_len": 128, "windows": 4, "before": 50.0, "after": 60.0}]
    again = Origin.of(folder(tmp_path / "again", pruning(first, perplexity=other)))
    assert again.figures(("b.txt", 128, 4)) == Figures(None, 60.0)
    assert again.figures(WINDOWS) == Figures(22.5, None)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        [],
        {"model": "dense"},
        {"model": "dense", "ratio": {}},
        {"model": "dense", "origin": None},
        {"model": "dense", "origin": {"dense": "dense"}},
        pruning(params={"before": 1, "after": 1, "block_before": 0, "block_after": 0}),
        pruning(perplexity=[{"text": "a.txt"}]),
    ],
)
def test_records_that_say_nothing(tmp_path, metrics):
    assert Origin.of(folder(tmp_path / "model", metrics)) is None


def test_no_record(tmp_path):
    folder(tmp_path / "loop", {"model": str(tmp_path / "loop")})
    for source in ("", "smollm2-135m", tmp_path, tmp_path / "gone", tmp_path / "loop"):
        assert Origin.of(source) is None
