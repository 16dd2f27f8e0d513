"""How threads wait where other programs use the cores."""

import os

import pytest

from fastprune import cores


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Two cores of four are this process's; returns what sets how they are used from now on."""
    for name in cores.CHOICES:
        monkeypatch.setenv(name, "")  # so that it is put back whatever the test sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2})
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")

    def write(used: int, total: int) -> None:
        lines = ["cpu  1 1 1 1 1 1 1 1 0 0", "cpu0 900 0 0 0 0 0 0 0 0 0"]
        lines += [f"cpu{n} {used} 0 0 {total - used} 0 0 0 0 0 0" for n in (1, 2)]
        cores.STAT.write_text("\n".join([*lines, "cpu3 900 0 0 0 0 0 0 0 0 0", "intr 7"]))

    def use(used: int) -> None:
        write(50, 100)
        monkeypatch.setattr(cores.time, "sleep", lambda _: write(50 + used, 110))

    return use


@pytest.mark.parametrize(("used", "waits"), [(0, False), (2, False), (3, True), (10, True)])
def test_busy_cores_of_this_process_count(machine, caplog, used, waits):
    machine(used)
    cores.wait_without_spinning_where_busy()
    assert ("OMP_WAIT_POLICY" in os.environ) is waits
    assert (f"other programs use {used / 10 * 2:.1f} of 2 cores" in caplog.text) is waits


@pytest.mark.parametrize("name", cores.CHOICES)
def test_what_the_user_has_chosen_stays(machine, monkeypatch, name):
    machine(10)
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    cores.wait_without_spinning_where_busy()
    assert dict(os.environ) == before


@pytest.mark.parametrize("content", [None, "", "cpu1 5", "cpu1 a b c d e f g h"])
def test_a_system_that_does_not_tell(machine, content):
    if content is not None:
        cores.STAT.write_text(content)
    cores.wait_without_spinning_where_busy()
    assert "OMP_WAIT_POLICY" not in os.environ
