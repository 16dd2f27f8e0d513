"""From figures to a band, and from a band to a command that exists."""

import math
import shlex

import pytest

from fastprune import cli
from fastprune.flags import parse
from fastprune.inspect.verdict import (
    Case,
    Finding,
    advise,
    band_finding,
    expected,
    judge,
    judge_absolute,
    judge_ratio,
    verdict,
    worse_than_guessing,
)


@pytest.mark.parametrize(
    ("removed", "normal", "broken"),
    [(0.15, 1.1, 3), (0.2, 1.3, 4), (0.25, 1.5, 5), (0.3, 1.8, 7), (0.225, 1.4, 4.5), (0.5, 3, 15)],
)
def test_bands_by_what_was_removed(removed, normal, broken):
    # decimal fractions in binary: a few units in the last place
    assert expected(removed) == pytest.approx((normal, broken), rel=1e-12)


@pytest.mark.parametrize(
    ("factor", "removed", "band"),
    [
        (1.0, 0.0, "good"),
        (1.02, 0.0, "good"),
        (1.3, 0.0, "careful"),
        (1.73, 0.2, "careful"),
        (2.5, 0.2, "too high"),
        (4.1, 0.2, "broken"),
        (4.1, 0.3, "too high"),
        (float("nan"), 0.2, "broken"),
        (float("inf"), 0.2, "broken"),
    ],
)
def test_judged_by_the_ratio(factor, removed, band):
    assert judge_ratio(factor, removed).band == band


@pytest.mark.parametrize(
    ("perplexity", "band"),
    [(14.9, "good"), (15, "careful"), (25, "too high"), (50, "broken"), (float("nan"), "broken")],
)
def test_without_a_dense_figure_nothing_is_judged(perplexity, band):
    judgement = judge_absolute(perplexity)
    assert judgement == judge(perplexity, None, 0.2)
    assert judgement.band == "unknown"
    assert judgement.by.startswith("cannot judge without the dense model: ")
    assert judgement.by.endswith(f"it would be {band})")


@pytest.mark.parametrize("perplexity", [52.1, 3.6e6])
def test_what_cannot_be_judged_is_not_broken(perplexity):
    assert band_finding(perplexity, judge(perplexity, None, 0.0)).severity == "note"
    assert band_finding(math.inf, judge(math.inf, None, 0.0)).severity == "broken"


def test_no_better_than_guessing():
    assert worse_than_guessing(49151.9, 49152) is None
    assert "49,152 tokens" in worse_than_guessing(49152, 49152)


def test_as_bad_as_the_worst_finding():
    assert verdict([]) == verdict([Finding("note", "x")]) == "healthy"
    assert verdict([Finding("note", "x"), Finding("warning", "y")]) == "careful"
    assert verdict([Finding("broken", "x"), Finding("warning", "y")]) == "unhealthy"


def case(**changes):
    usual = {
        "model": "runs/my model",
        "finite": True,
        "whole": True,
        "band": "good",
        "measured": True,
        "dense": "smollm2-135m",
        "made_by": "fastprune prune smollm2-135m --out x --ratio 0.2",
        "removed": 0.2,
        "masked": False,
    }
    return Case(**usual | changes)


@pytest.mark.parametrize("dense", [None, "smollm2-135m"])
@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "generate"),
        ({"band": "careful"}, "finetune"),
        ({"band": "too high"}, "finetune"),
        ({"band": "broken"}, "prune"),
        ({"band": "unknown", "known": ("a.txt", 1024, 16)}, "diagnose"),
        ({"band": None, "measured": False}, "diagnose"),
        ({"finite": False}, "prune"),
        ({"whole": False}, "prune"),
    ],
)
def test_advice_names_a_command_that_can_be_run(changes, command, dense):
    advice = advise(case(**changes, dense=dense))[0]
    program, name, *args = shlex.split(advice.command)
    assert (program, name) == ("fastprune", command)
    if name in cli.COMMANDS:
        parse(cli._load(cli.COMMANDS[name].config), args, "fastprune")


def test_what_cannot_be_judged_is_measured_beside_the_dense_model():
    (advice,) = advise(case(band="unknown"))
    assert advice.command == "fastprune diagnose 'runs/my model' --dense smollm2-135m"
    (advice,) = advise(case(band="unknown", known=("a b.txt", 1024, 16)))
    assert advice.command.endswith("--text 'a b.txt' --seq-len 1024 --windows 16")
    assert advise(case(band="unknown", dense=None))[0].command is None


def test_where_search_and_compensation_were_not_enough_less_is_removed():
    made_by = "fastprune prune x --allocation search --compensate least-squares --ratio 0.2"
    (again,), (less,) = (advise(case(band="broken", made_by=by)) for by in ("prune x", made_by))
    assert "--ratio 0.2 --allocation search --compensate least-squares" in again.command
    assert "--ratio 0.1 --allocation search" in less.command


@pytest.mark.parametrize("band", ["good", "careful", "too high", "broken", None])
def test_advice_carries_what_loading_needed(band):
    flags = ("--tokenizer", "gpt2", "--dtype", "float16", "--allow-pickle", "--trust-remote-code")
    found = case(band=band, measured=band is not None, flags=flags)
    _, name, *args = shlex.split(advise(found)[0].command)
    config = parse(cli._load(cli.COMMANDS[name].config), args, "fastprune")
    assert (config.tokenizer, config.dtype, config.allow_pickle) == ("gpt2", "float16", True)
    assert getattr(config, "trust_remote_code", True)


def test_another_dtype_is_not_said_twice():
    found = case(whole=False, overflows="float16", flags=("--dtype", "float16", "--allow-pickle"))
    (advice,) = advise(found)
    assert shlex.split(advice.command)[2:] == [found.model, "--dtype", "bfloat16", "--allow-pickle"]


def test_advice_without_any_record():
    assert advise(case(finite=False, dense=None, made_by=None))[0].command is None
    known = advise(case(finite=False, made_by=None))[0]
    assert known.command == "fastprune diagnose smollm2-135m"
