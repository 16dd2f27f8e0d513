"""Messages in two languages: the catalogue is whole, and only the terminal shows Chinese."""

import ast
import copy
import io
import json
import logging
import re
import string
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

import fastprune
from fastprune import cli
from fastprune.inspect.verdict import judge, judged
from fastprune.messages import CATALOGUE, Message, reason, shown

PACKAGE = Path(fastprune.__file__).parent
FLAG = re.compile(r"--[a-z-]+|fastprune [a-z]+")
LOCALE = ("FASTPRUNE_LANG", "LC_ALL", "LC_MESSAGES", "LANG")


@pytest.fixture
def chinese(monkeypatch):
    monkeypatch.setenv("FASTPRUNE_LANG", "zh")


def templates():
    """The templates of all messages in the source, each with its place."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Message":
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", node.args[0]


def placeholders(template):
    """Names with their formats, in alphabetical order."""
    return sorted(
        (name, form, conversion)
        for _, name, form, conversion in string.Formatter().parse(template)
        if name is not None
    )


def test_every_template_has_a_chinese_entry_with_the_same_placeholders():
    catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    found = {}
    for place, node in templates():
        assert isinstance(node, ast.Constant), f"{place}: the template is not a literal"
        found[node.value] = place
    assert len(found) > 100
    missing = [f"{place}: {text}" for text, place in found.items() if text not in catalogue]
    assert not missing
    assert not catalogue.keys() - found.keys()  # nothing that no message uses
    for english, translated in catalogue.items():
        assert placeholders(translated) == placeholders(english), english
        assert FLAG.findall(translated) == FLAG.findall(english), english


def test_the_guards_warnings_are_messages():
    """Every warning of the training loop and its guard, so that none stays in English."""
    for name in ("guard.py", "loop.py", "outcome.py"):
        for node in ast.walk(ast.parse((PACKAGE / "recover" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "log.warning":
                assert ast.unparse(node.args[0]).startswith("Message("), (name, node.lineno)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "healthy"),
        ({"LANG": "C.UTF-8"}, "healthy"),
        ({"LANG": "zh_CN.UTF-8"}, "健康"),
        ({"LANG": "en_GB.UTF-8", "LC_MESSAGES": "zh_TW"}, "健康"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "healthy"),
        ({"LC_ALL": "zh_CN.UTF-8", "FASTPRUNE_LANG": "en"}, "healthy"),
        ({"FASTPRUNE_LANG": "zh"}, "健康"),
    ],
)
def test_the_first_variable_that_is_set_decides(monkeypatch, variables, expected):
    for name in LOCALE:
        monkeypatch.setenv(name, variables.get(name, ""))
    assert shown(Message("healthy")) == expected


def test_a_message_is_its_english_sentence(chinese):
    message = judged(30.0, judge(30.0, 20.0, 0.2))
    assert message.startswith("perplexity 30.00 is careful: ×1.5 of the dense one; with 20.0 %")
    assert json.loads(json.dumps({"what": message})) == {"what": str(message)}
    assert shown(message) == (
        "困惑度 30.00，需留意：是稠密模型的 1.5 倍；剪去 20.0 % 的层参数时，1.3 倍以内属正常，"
        "超过 4 倍说明模型已损坏"
    )


def test_copies_stay_messages(chinese):
    @dataclass
    class Holder:
        what: Message

    message = Message("zero throughout: {names}", names="{a}")  # braces in a value are only text
    for copied in (copy.deepcopy(message), asdict(Holder(message))["what"]):
        assert copied == "zero throughout: {a}"
        assert shown(copied) == "全为零：{a}"


def test_errors_are_english_in_python_and_chinese_on_the_terminal(chinese):
    error = fastprune.GateError(Message("nothing was written"))
    assert str(error) == "nothing was written"
    assert reason(error) == "没有写入任何文件"
    assert reason(OSError(2, "no such file")) == "[Errno 2] no such file"


def test_stderr_is_chinese_while_other_handlers_stay_english(chinese, caplog, capsys):
    log = logging.getLogger("fastprune")
    with cli._logging_to_stderr(fastprune.PruneConfig(model="m", out=Path("o"))):
        log.addHandler(caplog.handler)
        log.warning(Message("no improvement in {patience} evaluations", patience=3))
        log.warning("%s: %s", "100 %", Message("nothing was written"))
    assert capsys.readouterr().err == "连续 3 次评估没有改善\n100 %: 没有写入任何文件\n"
    assert caplog.messages == ["no improvement in 3 evaluations", "100 %: nothing was written"]


@pytest.mark.parametrize(
    ("encoding", "words"), [("utf-8", "健康"), ("gb2312", "健康"), ("ascii", "??")]
)
def test_a_stdout_that_knows_fewer_characters(tmp_path, monkeypatch, chinese, encoding, words):
    model = tiny_checkpoint(tmp_path / "model")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    assert cli.main(["diagnose", str(model), "--no-forward", "--threads", "1"]) == 0
    stdout.flush()
    assert f"\n{words}\n" in stdout.buffer.getvalue().decode(encoding)


def test_diagnose_speaks_chinese_and_writes_english(tmp_path, capsys, chinese):
    model, file = tiny_checkpoint(tmp_path / "model"), tmp_path / "found.json"
    assert cli.main(["diagnose", str(model), "--json", str(file), "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "\n健康\n" in text
    assert "→ 权重正常不代表质量没有问题：请测量困惑度\n" in text
    written = file.read_text(encoding="utf-8")
    assert json.loads(written)["verdict"] == "healthy"
    assert not any("\u4e00" <= character <= "\u9fff" for character in written)
