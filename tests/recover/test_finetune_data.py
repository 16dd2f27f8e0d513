"""What a run says about the data it learns from."""

import json

import pytest

from fastprune.inspect import bleu
from fastprune.recover import pipeline


def test_instructions_are_checked_and_reported(finetune, tmp_path):
    records = [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(8)]
    records += [records[0], {"instruction": "Say it.", "output": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    status, _, _ = finetune("--max-steps", "2", "--val-size", "2", "--keep-worse", data=path)
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


@pytest.fixture
def asked(monkeypatch):
    """What the model is given to continue and to answer, as text; `continued`, `answered`."""
    seen = {"continued": [], "answered": []}
    generate, answer = pipeline.generate, bleu.answer

    def continued(model, tokenizer, prompt, *args, **options):
        result = generate(model, tokenizer, prompt, *args, **options)
        seen["continued"].append(result.prompt)
        return result

    def answered(model, tokenizer, prompts, **options):
        seen["answered"] += [tokenizer.decode(prompt) for prompt in prompts]
        return answer(model, tokenizer, prompts, **options)

    monkeypatch.setattr(pipeline, "generate", continued)
    monkeypatch.setattr(bleu, "answer", answered)
    return seen


def test_prompts_are_asked_as_the_data_asks(finetune, asked, tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    flags = ["--max-steps", "2", "--prompt", "Say it.", "--seq-len", "256", "--keep-worse"]
    flags += ["--val-size", "2", "--eval-steps", "2", "--bleu-samples", "2"]
    status, _, stderr = finetune(*flags, "--generate-steps", "1", data=path)
    assert status == 0, stderr
    assert len(asked["continued"]) == 3 and len(asked["answered"]) == 2
    for text in asked["continued"] + asked["answered"]:
        assert text.startswith("Below is an instruction")
        assert text.endswith(".\n\n### Response:\n")
    assert "### Instruction:\nSay it.\n" in asked["continued"][0]
    samples = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())["samples"]
    assert {sample["prompt"] for sample in samples} == {"Say it."}


def test_a_prompt_after_plain_text_stays_as_it_is(finetune, asked):
    status, _, stderr = finetune("--max-steps", "1", "--prompt", "The river")
    assert status == 0, stderr
    assert asked["continued"] == ["The river"]


def test_a_file_without_prompts_is_told_before_the_start(finetune, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    status, _, stderr = finetune("--max-steps", "1", "--prompt", str(tmp_path / "empty.txt"))
    assert status == 2
    assert "no prompts in it" in stderr
    assert not (tmp_path / "out").exists()
