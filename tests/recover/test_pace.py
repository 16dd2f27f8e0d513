"""How many steps fit into the minutes of a stage."""

from __future__ import annotations

import pytest

from fastprune.recover.pace import BESIDE, Timetable


def timetable(seconds: float, minutes: float = 10.0) -> tuple[Timetable, list[int]]:
    """One that measured `seconds` a step before the first, and where it was saved."""
    saved: list[int] = []
    decided: list[list[float]] = []
    found = Timetable(minutes, decided, lambda: saved.append(len(decided)))
    found.begin(lambda: seconds / BESIDE)
    return found, saved


def run(found: Timetable, seconds_at, first: int = 0) -> tuple[int, list[int]]:
    """Steps taken from `first` on where the step `n` takes `seconds_at(n)`, and each new total."""
    step, total, changes = first, found.steps(first), []
    elapsed = sum(seconds_at(n) for n in range(first))
    while step < total:
        elapsed += seconds_at(step)
        step += 1
        if (now := found.look(step, elapsed)) is not None:
            total = now
            changes.append(now)
    return step, changes


def test_the_passes_before_the_first_step_decide():
    found, saved = timetable(seconds=6.0)
    assert found.steps(0) == 100
    assert saved == [1]
    assert run(found, lambda n: 6.0) == (100, [])


@pytest.mark.parametrize("truth", [3.0, 12.0])
def test_steps_that_take_another_time_correct_it(truth):
    found, _ = timetable(seconds=6.0)
    steps, changes = run(found, lambda n: truth)
    assert changes
    assert steps * truth == pytest.approx(600, rel=0.03)


def test_a_machine_that_is_busy_halfway_is_noticed():
    found, _ = timetable(seconds=6.0)
    steps, changes = run(found, lambda n: 6.0 if n < 30 else 12.0)
    assert len(changes) == 1
    assert steps * 6.0 + (steps - 30) * 6.0 == pytest.approx(600, rel=0.1)


def test_small_differences_change_nothing():
    found, _ = timetable(seconds=6.0)
    assert run(found, lambda n: 6.1) == (100, [])


def test_few_steps_are_never_corrected():
    found, _ = timetable(seconds=300.0)
    assert run(found, lambda n: 100.0) == (2, [])


def test_a_resumed_run_decides_as_the_first_did():
    found, _ = timetable(seconds=6.0)
    run(found, lambda n: 3.0)
    record = [list(line) for line in found.decided]
    again = Timetable(10.0, record, lambda: None)
    again.begin(lambda: pytest.fail("it is decided already"))
    assert [again.steps(n) for n in range(200)] == [found.steps(n) for n in range(200)]
    # Even where its own steps take another time.
    assert run(again, lambda n: 9.0)[0] == run(found, lambda n: 3.0)[0]
    assert again.decided == found.decided
