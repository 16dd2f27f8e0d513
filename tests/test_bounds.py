"""Every number of every command has a range, and what lies outside is named."""

import math
from dataclasses import dataclass
from typing import Annotated, get_args, get_type_hints

import pytest

from fastprune.bounds import SHARE, Range, check_ranges
from fastprune.cli import COMMANDS, _load, main
from fastprune.errors import InputError
from fastprune.pruning.config import PruneConfig
from fastprune.recover.recipes import Stage


@dataclass
class Settings:
    """Numbers of every kind."""

    plain: int = 1
    size: Annotated[int | None, Range(1, 64)] = None
    share: Annotated[float, SHARE] = 0.5
    open: Annotated[float, Range(0, 1, closed=(False, False))] = 0.5
    rates: Annotated[tuple[float, ...], Range(0, 10, closed=(False, True))] = ()
    name: str = "x"
    switch: bool = True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plain": 2**63}, "--plain must fit into 64 bits"),
        ({"plain": 10**400}, r"--plain must fit into 64 bits, which 1000000000… \(401 digits\)"),
        ({"size": 0}, "--size must be at least 1, not 0"),
        ({"size": 65}, "--size must be at most 64, not 65"),
        ({"share": math.nan}, "--share must be a finite number, not nan"),
        ({"share": -0.1}, "--share must lie between 0 and 1, not -0.1"),
        ({"open": 1.0}, "--open must lie between 0 and 1, both excluded, not 1.0"),
        ({"rates": (1.0, 0.0)}, "--rates must be positive, not 0.0"),
        ({"rates": (1.0, math.inf)}, "--rates must be a finite number, not inf"),
    ],
)
def test_what_lies_outside_is_named(change, words):
    with pytest.raises(InputError, match=words):
        check_ranges(Settings(**change))


def test_what_lies_inside_passes():
    check_ranges(Settings(plain=-5, size=64, share=1.0, rates=(10.0,)))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_setting_takes_what_is_no_number(command):
    kind = _load(COMMANDS[command].config)
    hints = {n: h for n, h in get_type_hints(kind).items() if {int, float} & {h, *get_args(h)}}
    assert {"seed", "threads"} <= hints.keys()
    for name, hint in hints.items():
        whole = float not in (hint, *get_args(hint))
        for value in [10**40] if whole else [math.nan, math.inf, 1e300]:
            config = object.__new__(kind)
            setattr(config, name, value)
            with pytest.raises(InputError, match=f"--{name.replace('_', '-')} must"):
                check_ranges(config)


def test_a_flag_out_of_range_is_one_line(capsys):
    assert main(["info", "--threads", "99999"]) == 2
    error = "fastprune: error: --threads must be at most 1024, not 99999\n"
    assert capsys.readouterr().err == error


def test_the_python_api_and_recipes_are_checked_alike():
    with pytest.raises(InputError, match="--calib-samples must be at most"):
        PruneConfig(model="m", ratio=0.2, calib_samples=10**12).check()
    with pytest.raises(InputError, match="--gate must be a finite number"):
        Stage(gate=math.nan).check()
    with pytest.raises(InputError, match="--epochs must be a finite number"):
        Stage(epochs=math.inf).check()
    with pytest.raises(InputError, match="--lora-r must be at most"):
        Stage(lora_r=10**9).check()
