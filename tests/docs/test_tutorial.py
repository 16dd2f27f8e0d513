"""The commands of the tutorial, in their order, on a tiny model with small settings."""

import re
import shlex
from pathlib import Path

from tiny import TEXT, tiny_checkpoint

from fastprune import cli, progress

PAGE = Path(__file__).parents[2] / "docs" / "start" / "tutorial.md"
SMALLER = {
    "info": [],
    "compress": [
        *("--effort", "fast", "--calib-samples", "4", "--calib-seq-len", "32"),
        *("--eval-windows", "2", "--eval-seq-len", "32", "--eval-also", "none", "--no-speed"),
        *("--max-steps", "4", "--seq-len", "32", "--lr", "1e-3", "--lora-r", "2"),
        *("--calib", "text.txt", "--data", "text.txt", "--eval", "text.txt"),
    ],
    "eval": ["--text", "text.txt", "--seq-len", "32", "--windows", "2"],
    "generate": ["--max-new-tokens", "4"],
    "export": ["--quant", "f16"],  # blocks of 32 weights do not fit the tiny widths
}


def blocks(language: str) -> list[str]:
    """The code blocks of the page that are marked with `language`."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return [block for marked, block in found if marked == language]


def smaller(line: str) -> list[str]:
    """The arguments of the command `line` with small sizes; a later flag wins over an earlier."""
    program, command, *args = shlex.split(line)
    assert program == "fastprune"
    while "--minutes" in args:
        del args[args.index("--minutes") : args.index("--minutes") + 2]
    for flag in SMALLER[command]:
        if flag in args and flag.startswith("--"):
            del args[args.index(flag) : args.index(flag) + 2]
    return [command, *args, *SMALLER[command]]


def test_every_command_of_the_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "DELAY", 3600)  # no progress lines on a slow machine
    tiny_checkpoint(tmp_path / "smollm2-135m")
    Path("text.txt").write_text(TEXT * 20)

    lines = [line for block in blocks("") for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == [
        *("info", "compress", "eval", "generate", "export"),
    ]
    for line in lines:
        assert cli.main(smaller(line)) == 0, f"{line}\n{capsys.readouterr().err}"
    assert Path("small/fastprune/report.html").is_file()
    assert Path("small.gguf").is_file()

    [code] = blocks("python")
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("The capital of France is")
