"""A configuration dataclass becomes flags and YAML keys; every usage error is one line."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from tyro.conf import Positional

from fastprune.config import CommonConfig
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
        (["m", "--ratio"], "Missing value for argument '--ratio'"),
        (["m", "--ratoi", "0.2"], "--ratoi, 0.2; did you mean --ratio?"),
        (["m", "n"], "Unrecognized options: n"),
        (["m", "--method", "third"], "invalid choice 'third' for argument '--method'"),
        (["m", "--parts", "mlp,nose"], "--parts: 'nose' is not one of attention, mlp"),
        (["m", "--dtype", "int8"], "invalid choice 'int8' for argument '--dtype'"),
        (["m", "--config"], "--config needs the name of a YAML file"),
        (["m", "--config", "missing.yaml"], "cannot be read: No such file"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_usage_error_is_one_line(args, words, encoding, monkeypatch):
    """Whatever stdout can show decides how the parser frames its message."""
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(InputError) as caught:
        read(*args)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search("[│─]|---", str(caught.value))


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
        ("method: third", "invalid choice 'third'"),
        ("overwrite: 3", "invalid choice '3'"),
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
