"""What a run says about the data it learns from."""

import json


def test_instructions_are_checked_and_reported(finetune, tmp_path):
    records = [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(8)]
    records += [records[0], {"instruction": "Say it.", "output": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    status, _, _ = finetune("--max-steps", "2", "--val-size", "2", data=path)
    assert status == 0
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text(encoding="utf-8"))
    data = metrics["data"]
    assert (data["kind"], data["train"], data["validation"]) == ("instructions", 6, 2)
    found = {finding["problem"]: finding for finding in data["findings"]}
    assert found["null"]["first"] == f"{path}: line 10"
    assert found["duplicate"]["count"] == 1
    assert found["over-long"]["count"] == 8  # 32 tokens are fewer than the wording alone takes
    assert data["lengths"]["response"]["max"] < 32 < data["lengths"]["prompt"]["min"]
    report = (tmp_path / "out/fastprune/report.html").read_text(encoding="utf-8")
    assert "1 left out, first" in report
    assert "tokens in a response" in report
    assert "duplicate (left out)" in (tmp_path / "out/fastprune/run.log").read_text("utf-8")
