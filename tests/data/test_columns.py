"""Fields of every name: those that are known, and those that the user names."""

import json

import pytest
from read_data import training_data
from tiny import tiny_tokenizer

from fastprune.data.checks import Unusable
from fastprune.data.columns import Columns
from fastprune.data.examples import detect_kind, example_of, kind_of
from fastprune.data.records import Record
from fastprune.errors import InputError

ASKED, ANSWERED = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "No one."}
EARLIER = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"Instruction": "Who?", "Input": "", "Output": "No one."}, [ASKED, ANSWERED]),
        ({"query": "Who?", "response": "No one.", "history": []}, [ASKED, ANSWERED]),
        ({"problem": "Who?", "solution": "No one."}, [ASKED, ANSWERED]),
        ({"instruction": "Who?", "input": float("nan"), "output": "No one."}, [ASKED, ANSWERED]),
        ({"prompt": "Who?", "answer": 5}, [ASKED, {"role": "assistant", "content": "5"}]),
        (
            {"instruction": "Who?", "output": "No one.", "history": [["Hello.", "Hi."]]},
            [*EARLIER, ASKED, ANSWERED],
        ),
        (
            {"query": "Who?", "response": "No one.", "history": json.dumps([["Hello.", "Hi."]])},
            [*EARLIER, ASKED, ANSWERED],
        ),
        (
            {"instruction": "Who?", "input": "here", "output": "No one.", "history": EARLIER},
            [*EARLIER, {"role": "user", "content": "Who?\n\nhere"}, ANSWERED],
        ),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, [ASKED, ANSWERED]),
        ({"prompt": [ASKED], "completion": "No one."}, [ASKED, ANSWERED]),
        ({"prompt": "Who?", "completion": [ANSWERED]}, [ASKED, ANSWERED]),
        ({"messages": json.dumps([ASKED, ANSWERED])}, [ASKED, ANSWERED]),
        ([ASKED, ANSWERED], [ASKED, ANSWERED]),
        (
            {"conversations": [{"from": "gpt", "value": "Hi."}, ASKED, ANSWERED]},
            [ASKED, ANSWERED],
        ),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, ASKED, ANSWERED]},
            [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED],
        ),
        (
            {"system": "Be brief.", "conversations": [ASKED, ANSWERED]},
            [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED],
        ),
    ],
)
def test_records_of_every_form(record, messages):
    kind = kind_of(record)
    assert kind in ("instructions", "chat")
    assert example_of(record, kind).messages == messages


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": [ASKED, {**ANSWERED, "tool_calls": [{}]}, ANSWERED]}, "tool call"),
        ({"conversations": [ASKED, {"from": "function_call", "value": "{}"}]}, "tool call"),
        ({"query": "Who?", "response": "x", "history": [["Hello."]]}, "wrong fields"),
        ({"query": "Who?", "response": "x", "history": "Hello."}, "wrong fields"),
        ({"prompt": "Who?", "answer": True}, "wrong fields"),
        ({"prompt": "Who?", "answer": float("nan")}, "null"),
    ],
)
def test_what_is_not_an_answer_is_not_taught(record, problem):
    kind = kind_of(record)
    assert kind is not None
    with pytest.raises(Unusable, match=problem):
        example_of(record, kind)


def test_preferences_are_not_instructions():
    record = Record({"prompt": "Who?", "chosen": "No one.", "rejected": "I."}, "a.jsonl", "line", 1)
    with pytest.raises(InputError, match=r"it has prompt, chosen, rejected; name the fields with"):
        detect_kind([record], "a.jsonl")


@pytest.mark.parametrize(
    ("columns", "record"),
    [
        (["prompt=q", "answer=a"], {"q": "Who?", "a": "No one.", "text": "not this"}),
        (["prompt=q", "answer=text"], {"q": "Who?", "text": "No one.", "response": "not this"}),
        (["messages=chosen"], {"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}),
    ],
)
def test_fields_that_the_user_names(tmp_path, monkeypatch, columns, record):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps({"q": "Why?"}))
    named = Columns.parse(columns)
    data = training_data(path, tiny_tokenizer(), seq_len=256, kind=named)
    assert data.kind == named.kind
    assert [(f.problem, f.count) for f in data.findings] == [("wrong fields", 1)]
    item = data.train[0]
    read = tiny_tokenizer().decode(item["input_ids"])
    assert read.endswith("### Instruction:\nWho?\n\n### Response:\nNo one.<|end|>")
    path.write_text(json.dumps({"Q": "Who?"}))
    with pytest.raises(InputError, match=r"line 1: no field .* \(--columns\); it has Q"):
        training_data(path, tiny_tokenizer(), seq_len=256, kind=named)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt"], "write it as prompt=FIELD"),
        (["question=q"], "one of prompt, answer"),
        (["prompt=q"], "name prompt and answer"),
        (["text=a", "prompt=q"], "name prompt and answer"),
        (["prompt=q", "prompt=r"], "two fields for prompt"),
    ],
)
def test_columns_that_make_up_nothing_are_refused(columns, message):
    with pytest.raises(InputError, match=message):
        Columns.parse(columns)
