"""Messages name flags: every command that can come to a message has the flags it names."""

import ast
import re
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import fastprune
from fastprune.cli import COMMANDS

ROOT = Path(fastprune.__file__).parent
FLAG = re.compile(r"(?<![\w-])--(?:no-)?([a-z][a-z0-9-]*)")
COMMAND = re.compile(r"fastprune ([a-z]+) ")
ELSEWHERE = {"nproc-per-node", "version"}
"""Flags of other programs, and of fastprune without a command."""
EVERY = set(COMMANDS)
MODEL = EVERY - {"compare", "info", "completion"}
WRITING = {"compress", "prune", "finetune", "merge", "export"}
TRAINING = {"compress", "finetune"}
REACHED_BY = {
    "": EVERY,
    "output.py": WRITING,
    "workplace.py": WRITING,
    "sharding.py": {"finetune"},
    "distributed.py": {"prune", "finetune"},
    "compression": {"compress"},
    "compression/forms.py": {"prune", "compress"},
    "pruning": {"prune", "compress"},
    "exporting": {"export", "prune", "compress"},
    "recover": {"finetune", "compress"},
    "recover/merge.py": {"merge"},
    "report/compare.py": {"compare"},
    "inspect": MODEL,
    "inspect/diagnose.py": {"diagnose"},
    "inspect/against.py": {"diagnose"},
    "inspect/findings.py": {"diagnose"},
    "inspect/verdict.py": {"diagnose"},
    "models": MODEL,
    "models/adopted.py": {"prune", "compress"},
    "models/adapter.py": {"eval", "generate", "chat", "merge", "export"},
    "models/quantised.py": {"eval", "generate", "chat"},
    "models/checkpoint.py": {"prune", "finetune", "merge"},
    "models/streamed.py": {"prune"},
    "models/trimming.py": {"prune", "compress"},
    "data": MODEL,
    "data/columns.py": TRAINING,
    "data/examples.py": TRAINING,
    "data/records.py": {"prune", "compress"},
    "data/written.py": {"prune", "compress"},
    "inspect/tasks.py": {"eval", "compress"},
}
"""Commands that run the code of a folder or file; the longest entry counts."""
ONE_CALLER = {
    ("models/checks.py", "--trust-remote-code"): MODEL - {"prune"},  # it says so
    ("models/checkpoint.py", "--layout"): {"prune"},
    ("models/vocabulary.py", "--resize-embeddings"): TRAINING,
    ("models/load.py", "--adapter"): {"eval", "generate", "chat", "merge", "export"},
    ("inspect/perplexity.py", "--seq-len"): {"eval"},
    ("inspect/perplexity.py", "--dense"): {"eval"},
    ("inspect/perplexity.py", "--speed"): {"eval"},
    ("inspect/health.py", "--precision"): {"finetune"},  # under autocast, which it alone has
    ("report/costs.py", "--stream"): {"prune"},
    ("inspect/generate.py", "--chat"): {"generate"},
    ("exporting/gguf_architectures.py", "--structures"): {"prune"},
    ("exporting/gguf_layout.py", "--align"): {"prune"},
    ("exporting/gguf_layout.py", "--layout"): {"prune"},
    ("exporting/gguf_layout.py", "--structures"): {"prune"},
    ("exporting/pipeline.py", "--adapter"): {"export"},
    ("exporting/nemotron.py", "--align"): {"prune"},
    ("exporting/nemotron.py", "--layout"): {"prune"},
    ("exporting/uniform.py", "--layout"): {"prune"},
}
"""Flags in shared files that are named for some commands only."""

COMPOSED = {"inspect/verdict.py", "inspect/conclude.py"}
"""Files that put commands together."""


@cache
def flags_of(command: str) -> set[str]:
    module, _, name = COMMANDS[command].config.partition(":")
    config = getattr(import_module(module), name)
    return {field.name.replace("_", "-") for field in fields(config)} | {"help", "config"}


def texts(tree: ast.Module):
    """Every string of a module that is no docstring, with its line; f-strings in one piece."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values),
            )
        elif id(node) in bare | inside or not isinstance(node, ast.Constant):
            continue
        elif isinstance(node.value, str):
            yield node.lineno, node.value


def reached_by(path: str) -> set[str]:
    return REACHED_BY[max((p for p in REACHED_BY if path.startswith(p)), key=len)]


def advice():
    """(place, text, flag, the commands that must have it) of every flag in every message."""
    for file in sorted(ROOT.rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        for line, text in texts(ast.parse(file.read_text(encoding="utf-8"))):
            if path in COMPOSED and FLAG.fullmatch(text):
                continue  # a word of a command that is put together; tests of both parse those
            for match in FLAG.finditer(text):
                if match[1] not in ELSEWHERE:
                    named = [c[1] for c in COMMAND.finditer(text[: match.start()])]
                    commands = ONE_CALLER.get((path, match[0]), reached_by(path))
                    yield f"{path}:{line}", text, match[1], set(named[-1:]) or commands


ADVICE = list(advice())


def test_messages_are_found():
    assert len(ADVICE) > 100
    assert any(text.startswith("use --dtype") for _, text, _, _ in ADVICE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_flags_that_its_messages_name(command):
    missing = [
        f"{place}: --{flag} in {text!r}"
        for place, text, flag, commands in ADVICE
        if command in commands and flag not in flags_of(command)
    ]
    assert not missing
