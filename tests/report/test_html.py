"""The report is one safe, self-contained file that shows what the run measured."""

import re
from html.parser import HTMLParser

import pytest

from fastprune.report.html import render_prune_report, write_prune_report


class WellFormed(HTMLParser):
    """Fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":  # the only one here without an end
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def plan_of(*layers, kv_heads=2, channels=8):
    """A plan from (kept KV groups, kept channels) of each layer."""
    size = {"query_heads": 2 * kv_heads, "kv_heads": kv_heads, "channels": channels, "head_dim": 4}
    return {
        "model": {"layers": [size] * len(layers)},
        "layers": [
            {"index": i, "kv_groups": list(groups), "channels": list(range(n))}
            for i, (groups, n) in enumerate(layers)
        ],
    }


def metrics_of(plan, **changes):
    return {
        "model": "tiny",
        "params": {
            "before": 134_515_008,
            "after": 113_000_000,
            "block_before": 106_200_000,
            "block_after": 84_684_992,
        },
        "ratio": {"requested": 0.2, "achieved": 0.2026},
        "perplexity": [
            {"text": "a.txt", "seq_len": 1024, "windows": 16, "before": 22.55, "after": 33.83}
        ],
        "layers": [
            {
                "index": layer["index"],
                "query_heads": 2 * len(layer["kv_groups"]),
                "kv_heads": len(layer["kv_groups"]),
                "channels": len(layer["channels"]),
            }
            for layer in plan["layers"]
        ],
        "seconds": {"load": 14.2, "score": 20.5, "total": 36.0},
        "peak_memory_bytes": 2_400_000_000,
        "versions": {"torch": "2.13.0"},
        "command": "fastprune prune tiny --ratio 0.2",
        **changes,
    }


PLAN = plan_of(((0, 1), 8), ((1,), 4), ((), 0))


def test_it_shows_the_figures(tmp_path):
    file = tmp_path / "report.html"
    write_prune_report(file, metrics_of(PLAN), PLAN)
    text = file.read_text(encoding="utf-8")
    for words in ("113 M", "134.5 M before", "20.3 %", "33.83", "22.55 before", "×1.5", "2.24 GiB"):
        assert words in text
    for words in ("layer 1, KV group 0: removed", "layer 1, KV group 1: kept"):
        assert words in text
    assert "layer 2: 0 of 8 channels" in text


def test_it_is_one_file_and_well_formed():
    text = render_prune_report(metrics_of(PLAN), PLAN)
    parser = WellFormed()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"https?://|<script|<link|url\(|@import", text)


def test_text_from_users_is_escaped():
    nasty = "<script>alert('x')</script>"
    metrics = metrics_of(
        PLAN, model=nasty, command=nasty, versions={nasty: nasty}, settings={"out": nasty}
    )
    metrics["perplexity"][0]["text"] = nasty
    text = render_prune_report(metrics, PLAN)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_budget_in_its_own_unit():
    latency = {"before": 20.0, "predicted": 15.5, "after": 15.0}
    budget = {"unit": "ms/token", "requested": 16.0, "achieved": 15.0}
    text = render_prune_report(metrics_of(PLAN, latency=latency, budget=budget), PLAN)
    assert "budget: 15 ms a token (requested 16 ms a token), 15.5 ms predicted" in text
    assert "a token decoding, 20 ms before" in text
    text = render_prune_report(metrics_of(PLAN, latency=latency | {"after": None}), PLAN)
    assert "a token decoding, predicted, 20 ms before" in text


def test_a_dry_run_has_no_perplexity():
    text = render_prune_report(metrics_of(PLAN, perplexity=[]), PLAN)
    assert "planned to lose" in text
    assert "Not measured." in text


def test_a_given_plan_has_no_requested_ratio():
    metrics = metrics_of(PLAN, ratio={"requested": None, "achieved": 0.2}, peak_memory_bytes=None)
    text = render_prune_report(metrics, PLAN)
    assert "20.0 %" in text
    assert "requested" not in text


@pytest.mark.parametrize(("layers", "kv_heads"), [(1, 1), (32, 8), (80, 8), (32, 32)])
def test_the_figure_holds_every_layer(layers, kv_heads):
    plan = plan_of(*[((0,), 5)] * layers, kv_heads=kv_heads)
    text = render_prune_report(metrics_of(plan), plan)
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', text).groups())
    boxes = [
        tuple(map(float, found))
        for found in re.findall(r'x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', text)
    ]
    assert len(boxes) == layers * kv_heads + 2 * layers
    assert all(x + w <= width and y + h <= height for x, y, w, h in boxes)
