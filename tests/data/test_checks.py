"""What the checks find, and what they leave alone."""

import json

import numpy as np
import pytest
from read_data import training_data
from tiny import tiny_tokenizer

from fastprune.data.checks import (
    Finding,
    Findings,
    LengthStatistics,
    Unusable,
    encoding_problems,
    is_mojibake,
)
from fastprune.data.instruct import prompt_text

SOUND = [
    "plain",
    "It’s “quoted” – and 10 € dear…",
    "Ça, c’est «\u00a0voilà\u00a0» : à\u00a0» « où »",
    "Die Straße „Ä“ führt über Öl.",
    "São João, AÇÃO, Ã£ once",
    "识别并解释给定列表中的两个科学理论。",
    "Η ταχύτητα · скорость · 속도 · ðŸ",
]


@pytest.mark.parametrize("text", SOUND)
def test_sound_text_is_left_alone(text):
    assert encoding_problems(text) == []


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize(
    "text", ["It’s", "a – b", "细胞理论", "Größe für alle", "скорость света", "👍", "속도 한"]
)
def test_misread_text_is_found(text, encoding):
    misread = text.encode().decode(encoding, errors="replace")
    if "\ufffd" in misread:  # cp1252 has five holes
        assert "replacement characters" in encoding_problems(misread)
    else:
        assert encoding_problems(misread) == ["mojibake"]


def test_other_damage_is_found():
    assert is_mojibake("锟斤拷锟斤拷")
    assert encoding_problems("caf\ufffd") == ["replacement characters"]
    with pytest.raises(Unusable, match="surrogates"):
        encoding_problems("half \ud83d a face")


def test_findings_keep_the_first_place_and_the_order():
    findings = Findings([Finding("over-long", 2, "a: line 1")])
    findings.add("null", "b: line 7")
    findings.add("null", "b: line 9")
    found = list(findings)
    assert [str(f) for f in found] == [
        "2 × null (left out), first at b: line 7",
        "2 × over-long (used), first at a: line 1",
    ]
    assert found[0].to_dict() == {
        "problem": "null",
        "count": 2,
        "first": "b: line 7",
        "used": False,
        "meaning": "a field that is needed is null",
    }


def test_length_statistics():
    lengths = np.arange(1, 101)
    statistics = LengthStatistics.of(lengths, 90)
    assert (statistics.min, statistics.median, statistics.max) == (1, 50.5, 100)
    # between the 90th and the 91st value: interpolated, so equal to a rounding of fp64
    assert (statistics.p90, statistics.p99) == pytest.approx((90.1, 99.01), rel=1e-12)
    assert (statistics.count, statistics.total, statistics.over) == (100, 5050, 0.1)
    json.dumps(statistics.to_dict())


def test_chinese_is_told_by_its_letters():
    def is_chinese(text):
        asked = [{"role": "user", "content": text}]
        return prompt_text(tiny_tokenizer(), asked).endswith("### 回答：\n")

    assert is_chinese("把 English sentence here 译成中文，并解释语法。")
    assert is_chinese("你好")
    assert not is_chinese("What does 你好 mean in English?")
    assert not is_chinese("1 + 1")


def test_every_problem_of_a_file_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    good = {"prompt": "Who built the dam?", "response": "Nobody."}
    lines = [
        json.dumps(good),
        '{"prompt": ',
        json.dumps({"prompt": "Who?"}),
        json.dumps({"prompt": 1, "response": "x"}),
        json.dumps([good]),
        json.dumps({"prompt": None, "response": "x"}),
        json.dumps({"prompt": " ", "response": "x"}),
        json.dumps({"prompt": "Who?", "response": "\n"}),
        json.dumps({"prompt": "half \ud83d a face", "response": "x"}),
        json.dumps({"prompt": "caf\ufffd", "response": "x"}),
        json.dumps({"prompt": "It’s".encode().decode("latin-1"), "response": "x"}),
        json.dumps(good | {"id": 7}),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    data = training_data(path, tiny_tokenizer(), seq_len=512)
    assert [(f.problem, f.count, f.first.rpartition(" ")[2]) for f in data.findings] == [
        ("not json", 1, "2"),
        ("wrong fields", 3, "3"),
        ("null", 1, "6"),
        ("empty prompt", 1, "7"),
        ("empty response", 1, "8"),
        ("surrogates", 1, "9"),
        ("duplicate", 1, "12"),
        ("replacement characters", 1, "10"),
        ("mojibake", 1, "11"),
    ]
    assert len(data.train) == 3


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "empty response"),
        ([("user", "x")], "empty response"),
        ([("assistant", "x"), ("user", "y")], "empty prompt"),
        ([("system", "x"), ("assistant", "y")], "empty prompt"),
        ([("user", " "), ("assistant", "x")], "empty prompt"),
        ([("user", "x"), ("assistant", "")], "empty response"),
        ([("user", None), ("assistant", "x")], "null"),
        ([("narrator", "x"), ("assistant", "x")], "wrong fields"),
        ([("user", [{"type": "image"}]), ("assistant", "x")], "wrong fields"),
    ],
)
def test_every_problem_of_a_chat_is_told(tmp_path, monkeypatch, messages, problem):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    good = [("user", "Who?"), ("assistant", "Nobody.")]
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})
        for turns in (good, messages)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    data = training_data(path, tiny_tokenizer(), seq_len=512)
    assert [(f.problem, f.first) for f in data.findings] == [(problem, f"{path}: line 2")]
