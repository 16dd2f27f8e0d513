"""Ctrl-C and SIGTERM at every step of every command: status 130, one line, nothing half-written."""

import io
import json
import os
import signal
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import pytest
from tiny import TEXT, tiny_checkpoint
from transformers import LlamaForCausalLM

from fastprune import cli, progress
from fastprune.compression import measure
from fastprune.inspect import perplexity, speed, tasks
from fastprune.recover import pipeline

TRAINED = ("--seq-len", "32", "--batch-size", "2", "--grad-accum", "1", "--lr", "1e-3")
EVALUATED = ("--eval", "{text}", "--eval-seq-len", "32", "--eval-windows", "2")
CALIBRATED = ("--calib", "{text}", "--calib-samples", "2", "--calib-seq-len", "32")
WHOLE_WAY = ("--effort", "fast", "--ratio", "0.3", "--eval-also", "none", "--no-speed")
REFIT = ("--ratio", "0.3", "--compensate", "least-squares")
COMMANDS = {
    "prune": ("{model}", *CALIBRATED, *EVALUATED, *REFIT),
    "prune --stream": ("{model}", *CALIBRATED, *EVALUATED, *REFIT),
    "finetune": (
        *("{model}", "--data", "{text}", *TRAINED, *EVALUATED, "--max-steps", "2"),
        *("--val-size", "2", "--eval-steps", "1", "--prompt", "The river"),
    ),
    "merge": ("{model}", "--adapter", "{adapter}"),
    "export --format gguf,hf": ("{model}", "--quant", "f16"),
    "export --format gguf": ("{model}", "--quant", "f16"),
    "compress": (
        *("{model}", "--data", "{text}", *TRAINED, *CALIBRATED, *EVALUATED, *WHOLE_WAY),
        *("--max-steps", "2"),
    ),
    "eval": ("{model}", "--text", "{text}", "--seq-len", "32", "--windows", "2", "--speed"),
    "eval --tasks arc_easy": ("{model}", "--tasks-data", "{tasks}", "--windows", "1"),
    "diagnose": ("{model}", "--dense", "{model}", "--text", "{text}", "--seq-len", "32"),
    "generate": ("{model}", "--prompt", "The river", "--max-new-tokens", "2"),
}
"""What each command is given besides --out, or --json where it has no --out."""
ALONE = {
    "prune --stream": {"load", "save", "sync"},
    "compress": {"continuing prompts", "recover", "sync"},
    "eval --tasks arc_easy": {"evaluating arc_easy", "forward"},
}
"""Steps of commands whose others are those of another command."""
LEFT = {
    "prune": {"run.log"},
    "finetune": {"run.log", "train_log.jsonl", "state"},
    "compress": {"state"},
}
"""What an interrupted command may leave in OUT/fastprune."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model = tiny_checkpoint(folder / "model", layers=2)
    text = folder / "text.txt"
    text.write_text(TEXT * 10)
    (folder / "tasks").mkdir()
    item = {"query": "Question: What freezes?", "choices": ["the river", "it"], "gold": 0, "id": 0}
    (folder / "tasks" / "arc_easy.jsonl").write_text(json.dumps(item))
    found = {"model": model, "text": text, "tasks": folder / "tasks"}
    adapter = folder / "adapter"
    lora = ["finetune", str(model), "--data", str(text), "--method", "lora", "--max-steps", "1"]
    lora += [*TRAINED, "--eval-windows", "0", "--keep-worse", "--out", str(adapter), "--quiet"]
    assert cli.main(lora) == 0
    return {**found, "adapter": adapter}


class Steps:
    """The steps that a command begins, and a signal to this process at one of them."""

    def __init__(self, monkeypatch):
        self.names, self.at, self.number = [], None, signal.SIGINT
        lines, forward, fsync = progress._lines, LlamaForCausalLM.forward, os.fsync

        @contextmanager
        def begin(say):
            self.begin(say().partition(" …")[0].partition(":")[0])
            with lines(say):
                yield

        @wraps(forward)
        def run_forward(*args, **options):
            self.begin("forward")
            return forward(*args, **options)

        def sync(handle):
            self.begin("sync")
            fsync(handle)

        monkeypatch.setattr(progress, "_lines", begin)
        monkeypatch.setattr(LlamaForCausalLM, "forward", run_forward)
        monkeypatch.setattr(os, "fsync", sync)

    def begin(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            os.kill(os.getpid(), self.number)

    def restart(self, at=None, number=signal.SIGINT):
        self.names, self.at, self.number = [], at, number


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_TOKENS", 2)
    monkeypatch.setattr(pipeline, "SAMPLE_TOKENS", 2)
    monkeypatch.setattr(tasks, "BOOTSTRAPS", 2)
    monkeypatch.setattr(perplexity, "FULL", speed.Selection((8,), (1,), 1))
    return Steps(monkeypatch)


def arguments(command, files, folder):
    name, *flags = command.split()
    words = [word.format(**files) for word in COMMANDS[command]]
    ends = name in ("eval", "diagnose", "generate")
    return [name, *words, *flags, *(["--json"] if ends else ["--out"]), str(folder / "out")]


def listed(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def model_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("out/*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_at_every_step(command, files, steps, tmp_path, capsys, monkeypatch):
    if "--tasks" in command:
        pytest.importorskip("lm_eval", reason="needs the extra eval")

    def run(name):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        capsys.readouterr()
        return folder, cli.main(arguments(command, files, folder)), capsys.readouterr().err

    folder, status, said = run("whole")
    assert status == 0, said
    names, whole = steps.names, model_files(folder)
    chosen = ALONE.get(command, {*names})
    first = [names.index(name) for name in chosen]
    last = [len(names) - 1 - names[::-1].index(name) for name in chosen & {"forward", "sync"}]
    for count, at in enumerate(sorted({*first, *last})):
        steps.restart(at, (signal.SIGINT, signal.SIGTERM)[count % 2])
        folder, status, said = run(str(at))
        where = f"step {at}, {names[at]}"
        assert steps.names[at] == names[at]
        assert status == 130, f"{where}: {said}"
        assert said.endswith("fastprune: interrupted\n") and "Traceback" not in said, where
        assert not list(folder.rglob(".*")), where
        if model_files(folder) != whole:
            kept = LEFT.get(command.split()[0], set())
            left = [Path(name).parts for name in listed(folder) if not name.startswith("cache/")]
            assert all(p[:2] == ("out", "fastprune") and p[2] in kept for p in left), (where, left)


class Interrupted(io.StringIO):
    """A terminal at which the user presses Ctrl-C."""

    def readline(self, *size):
        os.kill(os.getpid(), signal.SIGINT)
        return ""


def test_while_chat_waits_for_a_line(files, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Interrupted())
    assert cli.main(["chat", str(files["model"])]) == 130
    assert capsys.readouterr().err == "fastprune: interrupted\n"
