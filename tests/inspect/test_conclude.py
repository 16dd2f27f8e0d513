"""What a run came to: bad or not, and a next command that can be run."""

import math
import shlex

import pytest

from fastprune import cli
from fastprune.flags import parse
from fastprune.inspect.conclude import (
    Trained,
    Training,
    before_training,
    hopeless,
    of_pruning,
    of_training,
)
from fastprune.inspect.record import Figures
from fastprune.inspect.verdict import Case

TRAINING = Training("runs/p 20", "builtin:c4", "runs/r 20", adapter=False, taught=False)


def trained(before=31.1, after=25.8, dense=22.5, name="smollm2-135m"):
    return Trained(before, after, Figures(dense, 31.1), 0.2, name)


def case(made_by="fastprune prune"):
    return Case("runs/p", True, True, None, True, "smollm2-135m", made_by, 0.5, False)


@pytest.mark.parametrize(
    ("after", "band", "bad", "name"),
    [
        (3 * 22.5, "good", False, "generate"),
        (14 * 22.5, "too high", False, "finetune"),
        (16 * 22.5, "broken", True, "prune"),
    ],
)
def test_of_pruning_half_of_the_blocks(after, band, bad, name):
    found = of_pruning(case(), after, 22.5)
    assert (found.band, found.bad) == (band, bad)
    assert found.what.startswith(f"perplexity {after:.2f} is {band}: ×")
    assert parsed(found.advice[0].command) == name


def parsed(line):
    """The command that `line` calls; its flags are ones that it has."""
    program, name, *args = shlex.split(line)
    assert program == "fastprune"
    parse(cli._load(cli.COMMANDS[name].config), args, "fastprune")
    return name


@pytest.mark.parametrize(
    ("figures", "training", "bad", "words"),
    [
        ({}, {}, False, "generate 'runs/r 20' --prompt"),
        ({"after": 40.0}, {}, True, "finetune 'runs/p 20' --data builtin:c4"),
        ({"after": math.nan}, {}, True, "--find-lr"),
        ({"before": 82.0, "after": 4.5e8}, {}, True, "--find-lr"),
        ({"before": 80.0, "after": 45.0}, {}, False, "--recipe distill --teacher smollm2-135m"),
        ({"before": 80.0, "after": 45.0}, {"taught": True}, False, "--out 'runs/r 20-again'"),
        ({"before": 800.0, "after": 400.0}, {}, True, "--teacher smollm2-135m"),
        ({"dense": None}, {}, False, "diagnose 'runs/r 20' --dense smollm2-135m"),
        ({}, {"adapter": True}, False, "merge 'runs/p 20' --adapter 'runs/r 20' --out"),
    ],
)
def test_of_training(figures, training, bad, words):
    found = of_training(trained(**figures), Training(**vars(TRAINING) | training))
    assert found.bad is bad
    (advice,) = found.advice
    assert words in advice.command
    parsed(advice.command)


def test_a_recovered_model_is_judged_by_the_dense_one():
    assert of_training(trained(55.9, 55.8, 50.0), TRAINING).band == "good"
    unknown = of_training(trained(55.9, 55.8, None, None), TRAINING)
    assert (unknown.band, unknown.bad) == ("unknown", False)
    assert unknown.advice[0].command is None
    assert "cannot judge without the dense model" in unknown.what


def test_worse_is_more_than_rounding():
    assert not trained(22.5, 22.5).worse
    assert not trained(22.5, 22.51).worse
    assert trained(22.5, 22.6).worse
    assert trained(22.5, math.inf).worse


def test_a_broken_model_is_named_before_it_is_trained():
    assert before_training(trained(31.1), 49152) is None
    assert "broken before any training" in before_training(trained(500.0), 49152)
    assert before_training(trained(500.0, dense=None), 49152) is None
    assert "guessing among all 300" in before_training(trained(500.0, dense=None), 300)


def test_beyond_any_use():
    assert not hopeless(2250, 22.5)
    assert hopeless(2251, 22.5)
    assert hopeless(math.nan, 22.5)
