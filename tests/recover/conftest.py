"""A tiny model, a text to learn, and the command with settings that finish in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TEXT, tiny_checkpoint

from fastprune import cli, progress


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", layers=2)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 40)
    return file


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("held-out") / "eval.txt"
    file.write_text(TEXT * 4)
    return file


@pytest.fixture
def finetune(model, text, held_out, tmp_path, capsys, monkeypatch):
    """Run the command with small settings; returns (status, stdout, stderr)."""
    monkeypatch.setattr(progress, "DELAY", 3600)  # no progress lines on a slow machine
    monkeypatch.setattr(cli.console, "quiet", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def arguments(*flags: str, source: Path | str = model, data: Path | str = text, out="out"):
        args = ["finetune", str(source), "--data", str(data), "--out", str(tmp_path / out)]
        args += ["--eval", str(held_out), "--eval-seq-len", "32", "--eval-windows", "2"]
        args += ["--seq-len", "32", "--batch-size", "2", "--grad-accum", "2"]
        return [*args, *([] if "--recipe" in flags else ["--lr", "1e-3"]), *flags]

    def run(*flags: str, **options):
        capsys.readouterr()
        status = cli.main(arguments(*flags, **options))
        return (status, *capsys.readouterr())

    run.arguments = arguments
    return run
