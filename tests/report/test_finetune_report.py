"""The report of a finetuning run, from data made for it."""

from fastprune.report.finetune import figure, render_finetune_report


def line(stage, step, loss, lr=1e-4):
    return {"stage": stage, "step": step, "loss": loss, "lr": lr}


LINES = [
    line(0, 1, 4.0),
    line(0, 2, None),
    line(0, 3, 3.0),
    {"stage": 0, "step": 3, "eval_loss": 3.5},
    line(1, 1, 2.5, 2e-4),
    line(1, 2, 2.0, 0.0),
]

STAGE = {
    "name": "gentle <b>",
    "lr": 1e-4,
    "steps": 3,
    "planned_steps": 4,
    "tokens": 1000,
    "loss": 3.0,
    "perplexity": {"before": 30.0, "after": 25.0},
    "skipped_steps": 1,
    "kept": True,
    "stopped": "no improvement in 2 evaluations",
    "rollbacks": 1,
    "range_test": {"chosen": 1e-4, "reason": "it fell"},
    "findings": {"jump": 2},
    "best": {"step": 3, "figure": 3.5, "by": "loss"},
    "bleu": None,
}
METRICS = {
    "model": "<script>",
    "data": {"spec": "a.txt", "kind": "text", "train": 10, "lengths": {}, "findings": []},
    "recipe": {"name": "mine", "about": "two stages"},
    "params": {"total": 1000, "learning": 500},
    "perplexity": [{"text": "b.txt", "seq_len": 32, "windows": 2, "before": 30.0, "after": 20.0}],
    "stages": [STAGE, {**STAGE, "name": "firm", "kept": False, "best": None, "findings": {}}],
    "samples": [{"step": None, "prompt": "The & river", "text": "runs"}],
    "seconds": {"train": 5.0, "total": 6.0},
    "peak_memory_bytes": 1 << 20,
    "versions": {"torch": "2"},
    "command": "fastprune finetune",
    "settings": {"lr": 1e-4},
}


def points(text):
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_curves():
    f = figure(LINES, ["one", "two"])
    raw = points(f["raw"])
    assert len(raw) == 4  # the step that was not finite is a mark, not a point
    assert [b["step"] for b in f["bad"]] == [2]
    assert raw[0][1] == f["top"] and raw[-1][1] == f["bottom"]  # the highest loss, and the lowest
    assert [x for x, _ in raw] == sorted(x for x, _ in raw)
    assert raw[-1][0] == f["right"]
    assert f["steps"] == 5
    assert [s["name"] for s in f["stages"]] == ["one", "two"]
    rate = points(f["rate"])
    assert min(y for _, y in rate) == f["rate_top"] and rate[-1][1] == f["rate_bottom"]


def test_nothing_logged():
    assert figure([], []) is None
    assert "Nothing was logged" in render_finetune_report(METRICS, [])


def test_what_users_wrote_is_escaped_and_everything_is_said():
    html = render_finetune_report(METRICS, LINES)
    assert "<script>" not in html and "gentle <b>" not in html
    for words in ("30.00 before", "rolled back", "no improvement", "it fell", "a jump at step 2",
                  "The &amp; river", "3 of 4", "best evaluation 3.5000"):  # fmt: skip
        assert words in html, words
