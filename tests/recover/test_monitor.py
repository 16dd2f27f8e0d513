"""What the monitor says of loss curves made for it."""

import math
from dataclasses import asdict

import pytest

from fastprune.recover.monitor import WINDOW, Monitor


def findings(losses, monitor=None):
    monitor = monitor or Monitor()
    return [f for step, loss in enumerate(losses, 1) if (f := monitor.train(step, loss))]


def test_a_falling_loss_is_left_alone():
    assert findings([6 * 0.97**i + 0.05 * math.sin(i) for i in range(100)]) == []


def test_flat_and_high():
    assert findings([5.0 + 0.001 * (i % 3) for i in range(WINDOW)]) == ["flat"]
    assert findings([1.5 + 0.001 * (i % 3) for i in range(WINDOW)]) == []  # done, not stuck


def test_a_jump_is_said_once():
    assert findings([3.0] * 10 + [9.0, 3.0, 9.0]) == ["jump"]
    assert findings([0.1] * 10 + [0.3]) == []  # three times as high, and still next to nothing


def test_oscillation():
    # around a loss of 2.8, below what counts as high, by less than what counts as a jump
    assert findings([2.3, 3.3] * WINDOW) == ["oscillation"]


def test_losses_that_are_not_finite_change_nothing():
    monitor = Monitor()
    assert findings([3.0, None, math.nan, math.inf], monitor) == []
    assert monitor.smooth == 3.0


def test_overfitting_needs_falling_training_and_rising_validation():
    monitor = Monitor()
    said = []
    for step in range(1, 9):
        monitor.train(step, 4.0 - 0.3 * step)
        said.append(monitor.validation(step, 3.0 + abs(step - 3)))
    assert said[:4] == [None] * 4
    assert said[4] == "overfitting"
    assert said[5:] == [None] * 3
    assert (monitor.best_step, monitor.best, monitor.since_best) == (3, 3.0, 5)


@pytest.mark.parametrize(
    ("bleu", "losses", "said"),
    [
        ([0.0, 0.0, 0.0, 0.0], [7.44, 7.4, 7.3, 7.245], []),  # answers as bad, the loss falls
        ([0.1, 0.12, 0.13, 0.15], [3.0, 3.1, 3.2, 3.3], []),  # answers get better
        ([0.1, 0.09, 0.08, 0.07], [3.0, 3.1, 3.2, 3.3], ["overfitting"]),
    ],
)
def test_overfitting_is_what_both_figures_say(bleu, losses, said):
    monitor = Monitor()
    found = []
    for step, (figure, loss) in enumerate(zip(bleu, losses, strict=True), 1):
        monitor.train(step, 4.0 - 0.3 * step)
        found.append(monitor.validation(step, -figure, loss))
    assert [f for f in found if f] == said


def test_a_figure_that_is_not_finite_is_never_the_best():
    monitor = Monitor()
    for step, figure in enumerate((math.nan, math.inf, 3.0, math.nan), start=1):
        monitor.validation(step, figure)
    assert (monitor.best_step, monitor.best, monitor.since_best) == (3, 3.0, 1)


def test_validation_and_training_both_rising_is_not_overfitting():
    monitor = Monitor()
    for step in range(1, 9):
        monitor.train(step, 3.0 + 0.1 * step)
        assert monitor.validation(step, 3.0 + step) is None


@pytest.mark.parametrize(("peak", "sound"), [(3.5, True), (30.0, False)])
def test_an_exploding_run_is_no_state_to_come_back_to(peak, sound):
    monitor = Monitor()
    for step in range(1, 40):
        monitor.train(step, 3.0 if step < 20 else peak)
    assert monitor.sound() is sound


def test_state_survives_as_plain_data():
    monitor = Monitor()
    findings([3.0] * 10 + [9.0], monitor)
    monitor.validation(11, 2.0)
    copy = Monitor(**asdict(monitor))
    assert copy == monitor
    assert findings([9.0], copy) == []  # said already
