"""A configuration dataclass becomes flags and YAML keys; every usage error is one line."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from fastprune.config import CommonConfig, Positional
from fastprune.errors import InputError
from fastprune.flags import parse


@dataclass(kw_only=True)
class Config(CommonConfig):
    """Do a thing to a model."""

    model: Positional[str]
    """the model to do it to"""
    out: Path | None = None
    """where the result goes"""
    ratio: float | None = None
    """how much of it"""
    max_steps: int = 10
    """when to stop"""
    method: Literal["first-order", "second-order"] = "first-order"
    """which way"""
    parts: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    """which parts"""
    overwrite: bool = False
    """replace what is there"""


@dataclass(kw_only=True)
class Needy(CommonConfig):
    """Has a flag that must be given."""

    prompt: str
    """text to continue"""


@dataclass(kw_only=True)
class Wordy(CommonConfig):
    """Has characters that not every terminal knows."""

    widths: tuple[float, ...] = ()
    """shares of the width – one a layer"""


@dataclass(kw_only=True)
class Several(CommonConfig):
    """Takes any number of folders."""

    runs: Positional[tuple[Path, ...]] = ()
    """folders"""


def test_a_positional_list_takes_every_loose_word():
    config = parse(Several, ["a,b", "--seed", "3", "c"], "fastprune several")
    assert (config.runs, config.seed) == ((Path("a,b"), Path("c")), 3)


def test_a_missing_flag_is_named():
    with pytest.raises(InputError, match=r"missing --prompt \(text to continue\)"):
        parse(Needy, [], "fastprune needy")


def read(*args: str) -> Config:
    return parse(Config, args, "fastprune thing")


def test_flags_fill_the_fields():
    config = read("m", "--out", "d", "--ratio", "0.25", "--max-steps=3", "--parts", "mlp")
    expected = Config(model="m", out=Path("d"), ratio=0.25, max_steps=3, parts=("mlp",))
    assert type(config) is Config
    assert config == expected


def test_the_positional_may_follow_the_flags():
    assert read("--overwrite", "--ratio", "-1e-3", "m") == Config(
        model="m", overwrite=True, ratio=-1e-3
    )


@pytest.mark.parametrize("flag", ["--max-steps", "--max_steps"])
def test_kebab_and_snake_case(flag):
    assert read("m", flag, "4").max_steps == 4


def test_the_last_flag_wins():
    assert read("m", "--seed", "1", "--seed", "2").seed == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "missing MODEL (the model to do it to)"),
        (["m", "--ratio", "much"], "--ratio: 'much' is not a number"),
        (["m", "--max-steps", "1.5"], "--max-steps: '1.5' is not a whole number"),
        (["m", "--ratio"], "--ratio needs a value"),
        (["m", "--ratio", "--overwrite"], "--ratio needs a value"),
        (["m", "--ratoi", "0.2"], "unknown option --ratoi; did you mean --ratio?"),
        (["m", "--overwrite=true"], "--overwrite takes no value"),
        (["m", "n"], "unexpected argument 'n'"),
        (["m", "--method", "third"], "--method: 'third' is not one of first-order, second-order"),
        (["m", "--parts", "mlp,nose"], "--parts: 'nose' is not one of attention, mlp"),
        (["m", "--dtype", "int8"], "--dtype: 'int8' is not one of auto, float32"),
        (["m", "--config"], "--config needs the name of a YAML file"),
        (["m", "--config", "missing.yaml"], "cannot be read: No such file"),
    ],
)
def test_a_usage_error_is_one_line(args, words):
    with pytest.raises(InputError) as caught:
        read(*args)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_gives_defaults_that_flags_override(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\nratio: 1e-1\nmax-steps: 7\noverwrite: true\nparts: [mlp]\nout: null\n"
    )
    assert read("--config", str(file)) == Config(
        model="m", ratio=0.1, max_steps=7, overwrite=True, parts=("mlp",)
    )
    config = read(f"--config={file}", "n", "--max_steps", "8", "--no-overwrite")
    assert config == Config(model="n", ratio=0.1, max_steps=8, parts=("mlp",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ratoi: 0.2", "unknown option 'ratoi'"),
        ("ratio: much", "--ratio: 'much' is not a number"),
        ("method: third", "--method: 'third' is not one of"),
        ("overwrite: 3", "--overwrite: '3' is not one of True, False"),
        ("ratio: {a: 1}", "ratio: must be one value or a list"),
        ("just words", "must hold `option: value` lines"),
        ("a: [1", "not YAML"),
        (b"\xff\xfe\x00", "cannot be read: it is not text"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        read("m", "--config", str(file))
    assert words in str(caught.value)
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_comes_from_the_docstrings(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("Do a thing to a model", "when to stop (default: 10)", "MODEL", "--config FILE"):
        assert words in text
    assert text.index("--max-steps") < text.index("--json"), "own options come before common ones"


def test_help_says_what_may_be_written(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("ratio: 0.25")
    with pytest.raises(SystemExit):
        read("--help", "--config", str(file))
    rows = [" ".join(row.strip("│| ").split()) for row in capsys.readouterr().out.splitlines()]
    for row in (
        "usage: fastprune thing [-h] [OPTIONS] MODEL",
        "MODEL the model to do it to (required)",
        "--out PATH where the result goes",
        "--ratio FLOAT how much of it (default: 0.25)",
        "--method {first-order,second-order}",
        "--parts attention,mlp which parts (default: attention,mlp)",
        "--overwrite, --no-overwrite",
    ):
        assert row in rows


def test_help_is_shown_where_stdout_knows_few_characters(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    with pytest.raises(SystemExit):
        parse(Wordy, ["--help"], "fastprune wordy")
    shown.flush()
    assert "--widths FLOAT" in shown.buffer.getvalue().decode()
