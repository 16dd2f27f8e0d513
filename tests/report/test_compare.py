"""`fastprune compare`: what the page and the JSON hold, and how it refuses."""

import copy
import json
import re
from pathlib import Path

import pytest

from fastprune import cli
from fastprune.errors import InputError
from fastprune.report.compare import CompareConfig, compare, render_comparison, run_compare
from fastprune.report.pareto import LETTER, Point, figure, front

METRICS = {
    "model": "org/tiny",
    "params": {"before": 2000, "after": 1800, "block_before": 1000, "block_after": 800},
    "ratio": {"requested": 0.2, "achieved": 0.2},
    "perplexity": [{"text": "a.txt", "seq_len": 128, "windows": 16, "before": 20.0, "after": 30.0}],
    "layers": [],
    "seconds": {"load": 1.0, "total": 75.0},
    "peak_memory_bytes": 3 * 1024**3,
    "settings": {"importance": "taylor-first", "seed": 0, "out": "x"},
}


def changed(path, value):
    """METRICS with one value replaced; `path` is dotted."""
    metrics = copy.deepcopy(METRICS)
    place = metrics
    *parts, last = path.split(".")
    for part in parts:
        place = place[int(part) if part.isdigit() else part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return metrics


@pytest.fixture
def run(tmp_path):
    """Write the record of one run; returns its folder."""

    def write(name, after=30.0, kept=800, metrics=None, **measured):
        metrics = copy.deepcopy(metrics or METRICS)
        if metrics["perplexity"] and "after" in metrics["perplexity"][0]:
            metrics["perplexity"][0].update(after=after, **measured)
        metrics["params"]["block_after"] = kept
        folder = tmp_path / name / "fastprune"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        return folder.parent

    return write


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command and check that it refused: one line on stderr, nothing written."""

    def call(*args):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert cli.main(["compare", *map(str, args)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("fastprune: error: ")
        assert captured.err.count("\n") == 1
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        return captured.err

    return call


def test_the_command_writes_a_page_and_the_same_as_json(run, tmp_path, capsys):
    runs = [run("small", 40.0, 700), run("large", 25.0, 900), run("worse", 50.0, 800)]
    out, data = tmp_path / "all.html", tmp_path / "data.json"
    assert cli.main(["compare", *map(str, runs), "--out", str(out), "--json", str(data)]) == 0
    result = json.loads((tmp_path / "all.json").read_text())
    assert result == json.loads(data.read_text())
    assert [r["name"] for r in result["runs"]] == ["small", "large", "worse"]
    assert result["measurements"][0]["pareto"] == ["small", "large"]
    assert result["runs"][0]["perplexity"][0]["factor"] == 2.0
    page = out.read_text(encoding="utf-8")
    for words in ("org/tiny", "small", "20.0 %", "40.00", "×2", "1 min 15 s", "3 GiB", "128"):
        assert words in page
    printed = capsys.readouterr().out
    assert "worse" in printed
    assert str(out) in printed
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        *("all.html", "all.json", "data.json")
    ]


def test_a_comparison_may_be_made_again(run, tmp_path):
    config = CompareConfig(runs=(run("one"),), out=tmp_path / "all.html")
    run_compare(config)
    config.runs += (run("two"),)
    assert len(run_compare(config)["runs"]) == 2
    assert "two" in (tmp_path / "all.html").read_text()


def test_a_run_is_a_folder_its_records_or_its_metrics(run):
    folder = run("one")
    for path in (folder, folder / "fastprune", folder / "fastprune" / "metrics.json"):
        assert compare([path])["runs"][0]["name"] == "one"


def test_runs_of_one_name_go_by_their_paths(run, tmp_path):
    result = compare([run("a/out"), run("b/out"), run("c")])
    assert [r["name"] for r in result["runs"]] == [f"{tmp_path}/a/out", f"{tmp_path}/b/out", "c"]


def test_only_settings_that_differ_are_shown(run):
    other = changed("settings", {"importance": "random", "seed": 0, "out": "y", "align": 8})
    result = compare([run("a"), run("b", metrics=other)])
    assert [r["settings"] for r in result["runs"]] == [
        {"importance": "taylor-first", "align": None},
        {"importance": "random", "align": 8},
    ]
    assert "random" in render_comparison({"out": "", **result})


@pytest.mark.parametrize("other", [{"text": "b.txt"}, {"seq_len": 64}, {"windows": 15}])
def test_other_texts_and_windows_are_never_ranked_together(run, other):
    """The second run is larger and worse, so one ranking would drop it."""
    result = compare([run("a"), run("b", 99.0, 900, **other)])
    assert [m["pareto"] for m in result["measurements"]] == [["a"], ["b"]]
    page = render_comparison(result)
    assert "ranked only within one" in page
    assert page.count("<svg") == 2
    assert "ranked only within one" not in render_comparison(compare([run("c"), run("d")]))


def test_budgets_have_a_column_of_their_own(run):
    by_size, by_time = copy.deepcopy(METRICS), copy.deepcopy(METRICS)
    by_size["budget"] = {"unit": "bytes", "requested": 4 * 1024**2, "achieved": 3 * 1024**2}
    by_time["budget"] = {"unit": "ms/token", "requested": 20.0, "achieved": 19.5}
    by_size["settings"]["target_bytes"] = "4MiB"
    result = compare([run("a"), run("b", metrics=by_size), run("c", metrics=by_time)])
    assert [r["budget"] for r in result["runs"]] == [None, by_size["budget"], by_time["budget"]]
    assert "target_bytes" not in result["runs"][0]["settings"]
    page = render_comparison(result)
    assert "3 MiB of 4 MiB" in page and "19.5 ms a token of 20 ms a token" in page
    assert "budget" not in render_comparison(compare([run("d"), run("e")]))


def test_a_text_that_changed_behind_its_name_is_not_ranked(run):
    result = compare([run("a", before=20.0), run("b", before=23.0)])
    assert result["measurements"][0]["pareto"] == []
    assert result["measurements"][0]["disagreeing"] == ["org/tiny"]
    assert "compare the factors" in render_comparison(result)
    near = compare([run("c", before=20.0), run("d", before=20.1)])  # as far as bf16 is from fp32
    assert near["measurements"][0]["disagreeing"] == []


def test_different_models_are_said_to_need_one_tokenizer(run):
    page = render_comparison(compare([run("a"), run("b", metrics=changed("model", "org/big"))]))
    assert "different models" in page


def test_what_has_no_figure_is_in_the_table_but_not_drawn(run):
    dry = run("dry", metrics=changed("perplexity", []))
    huge = run("huge", float("inf"))
    result = compare([run("a"), dry, huge])
    (measurement,) = result["measurements"]
    assert (measurement["drawn"], measurement["not_drawn"]) == (["a"], ["huge"])
    assert "want of a finite perplexity: huge" in render_comparison(result)
    assert "nothing to plot" in render_comparison(compare([dry]))
    assert "<svg" not in render_comparison(compare([huge]))


def test_the_page_is_one_safe_file(run, tmp_path):
    nasty = "<script>alert('x')</script>"
    metrics = changed("model", nasty)
    metrics["settings"]["calib"] = nasty
    page = render_comparison(compare([run("a", text=nasty), run("<b>", metrics=metrics)]))
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;" in page
    assert not re.search(r"https?://|<script|<b>|<link|url\(|@import", page)


def test_no_run_or_no_page(refused, run, tmp_path):
    assert "no run given" in refused("--out", tmp_path / "all.html")
    assert "missing --out" in refused(run("a"))


def test_a_run_that_is_not_there(refused, run, tmp_path):
    out = ("--out", tmp_path / "all.html")
    assert "no such file or folder" in refused(run("a"), tmp_path / "gone", *out)
    (tmp_path / "empty").mkdir()
    assert "no metrics.json" in refused(tmp_path / "empty", *out)


def test_a_run_named_twice(refused, run, tmp_path):
    folder = run("a")
    for again in (folder, folder / "fastprune", tmp_path / "." / "a" / ".." / "a"):
        assert "the same run as" in refused(folder, again, "--out", tmp_path / "all.html")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not text"),
        (b'{"model": "\\ud800"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "model is missing"),
        (b"{}", "model is missing"),
        (b"null", "model is missing"),
    ],
)
def test_broken_metrics(refused, tmp_path, content, words):
    (tmp_path / "metrics.json").write_bytes(content)
    assert words in refused(tmp_path, "--out", tmp_path / "all.html")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", ..., "model is missing"),
        ("model", 3, "model is of another type"),
        ("params", [], "params.before is missing"),
        ("params.block_after", ..., "params.block_after is missing"),
        ("params.after", "many", "params.after is of another type"),
        ("params.after", 1.5, "params.after is of another type"),
        ("params.after", -1, "params.after is out of range"),
        ("params.after", 10**39, "params.after is out of range"),
        ("ratio.achieved", None, "ratio.achieved is of another type"),
        ("ratio.achieved", float("nan"), "ratio.achieved is out of range"),
        ("perplexity", {}, "perplexity is of another type"),
        ("perplexity", [3], "before is missing"),
        ("perplexity.0.windows", ..., "windows is missing"),
        ("perplexity.0.after", True, "after is of another type"),
        ("perplexity.0.after", 0, "a perplexity is 0"),
        ("seconds.total", ..., "seconds.total is missing"),
        ("peak_memory_bytes", "3 GB", "peak_memory_bytes is of another type"),
        ("settings", [], "settings is of another type"),
        ("budget", {"unit": "hours", "requested": 1, "achieved": 1}, "budget.unit is not one of"),
        ("budget", [1], "unit is missing"),
    ],
)
def test_metrics_without_what_is_needed(refused, tmp_path, path, value, words):
    (tmp_path / "metrics.json").write_text(json.dumps(changed(path, value)))
    line = refused(tmp_path, "--out", tmp_path / "all.html")
    assert f"metrics.json: not the metrics of a prune run: {words}" in line


class TestOut:
    def test_a_name_that_is_no_page(self, refused, run, tmp_path):
        assert "ends in .html" in refused(run("a"), "--out", tmp_path / "all.json")

    def test_no_folder(self, refused, run, tmp_path):
        assert "does not exist" in refused(run("a"), "--out", tmp_path / "no" / "all.html")

    def test_a_folder(self, refused, run, tmp_path):
        (tmp_path / "all.html").mkdir()
        assert "is no plain file" in refused(run("a"), "--out", tmp_path / "all.html")

    @pytest.mark.parametrize("content", ["years of work", "<!DOCTYPE html>\n<title>Home</title>"])
    def test_other_content_stays(self, refused, run, tmp_path, content):
        (tmp_path / "all.html").write_text(content)
        assert "is not a page" in refused(run("a"), "--out", tmp_path / "all.html")

    def test_a_link_is_not_followed(self, refused, run, tmp_path):
        (tmp_path / "all.html").symlink_to(tmp_path / "elsewhere.html")
        assert "is no plain file" in refused(run("a"), "--out", tmp_path / "all.html")

    @pytest.mark.parametrize("content", ['{"name": "package"}', "not json", "[]"])
    def test_the_json_beside_it_is_not_ours(self, refused, run, tmp_path, content):
        (tmp_path / "all.json").write_text(content)
        assert "all.json: exists and is not a comparison" in refused(
            run("a"), "--out", tmp_path / "all.html"
        )

    def test_the_metrics_of_a_run_stay(self, refused, run):
        folder = run("a")
        refused(folder, "--out", folder / "fastprune" / "metrics.html")

    def test_json_names_the_page(self, refused, run, tmp_path):
        out = tmp_path / "all.html"
        assert "is the file --out names" in refused(run("a"), "--out", out, "--json", out)

    def test_a_failure_while_writing_leaves_nothing(self, run, tmp_path, monkeypatch):
        folder = run("a")
        real = Path.write_text

        def full(path, *args, **kwargs):
            if path.suffix == ".html":
                raise OSError(28, "No space left on device")
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(InputError, match="No space left"):
            run_compare(CompareConfig(runs=(folder,), out=tmp_path / "all.html"))
        assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 5.0)], [0]),
        ([(2, 3.0), (1, 5.0), (3, 1.0)], [1, 0, 2]),
        ([(1, 5.0), (2, 5.0), (1, 6.0)], [0]),
        ([(1, 5.0), (1, 5.0)], [0, 1]),
    ],
)
def test_front(points, expected):
    assert front(points) == expected


def points_of(*places, name="run"):
    return [Point(f"{name} {i}", s, v, "other", "") for i, (s, v) in enumerate(places)]


@pytest.mark.parametrize(
    "places",
    [
        [(800, 30.0)],
        [(0, 30.0), (0, 30.0)],
        [(800, 30.0), (801, 30.001)],
        [(1, 1.0), (10**12, 1e300)],
        [(800, 20.0), (700, 199.0)],
        [(800, 20.0), (700, 201.0)],
    ],
)
def test_axes_hold_every_point_and_have_ticks(places):
    f = figure(points_of(*places))
    assert len(f["marks"]) == len(places)
    assert all(f["left"] <= m["x"] <= f["right"] for m in f["marks"])
    assert all(f["top"] <= m["y"] <= f["bottom"] for m in f["marks"])
    for ticks, low, high in (
        (f["x_ticks"], f["left"], f["right"]),
        (f["y_ticks"], f["top"], f["bottom"]),
    ):
        assert 2 <= len(ticks) <= 12
        assert all(low <= tick["at"] <= high for tick in ticks)
        assert len({tick["label"] for tick in ticks}) == len(ticks)
    values = [value for _, value in places]
    assert f["log"] == (max(values) > 10 * min(values))


def test_labels_keep_apart():
    f = figure(points_of(*[(800 + i % 3, 30.0 + i // 3) for i in range(12)], name="a long name"))
    boxes = []
    for label in f["labels"]:
        width = LETTER * len(label["text"])
        left = label["x"] - {"start": 0, "middle": width / 2, "end": width}[label["anchor"]]
        boxes.append((left, label["y"], left + width))
    assert len(boxes) >= 6
    for i, (left, y, right) in enumerate(boxes):
        for other_left, other_y, other_right in boxes[:i]:
            assert right <= other_left or other_right <= left or abs(y - other_y) >= 12


def test_a_crowd_still_makes_a_figure():
    f = figure(points_of(*[(800, 30.0)] * 100))
    assert 1 <= len(f["labels"]) < 100
