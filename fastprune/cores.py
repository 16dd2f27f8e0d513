"""Cores that other programs keep busy: threads then wait for each other without spinning.

A thread that is done with its part of a loop spins until the others are done, which is quickest
where each has a core of its own. On cores that are shared it spins while those it waits for have
none, and loops take several times as long. How to wait is read from the environment when the
libraries are loaded; it changes no result.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from fastprune.progress import log as progress_log

STAT = Path("/proc/stat")
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which the user says how threads wait."""
PROBE_SECONDS = 0.1
BUSY = 0.25
"""Share of the cores that others use, from which threads are to wait without spinning."""


def wait_without_spinning_where_busy() -> None:
    """Look how busy the cores of this process are, and choose how threads wait. Before torch is
    imported; nothing is done where the user has chosen or the system does not tell."""
    if any(name in os.environ for name in CHOICES):
        return
    try:
        busy, cores = _busy_share(), len(os.sched_getaffinity(0))
    except (OSError, ValueError, AttributeError, ZeroDivisionError):  # another system than Linux
        return
    if busy < BUSY:
        return
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    progress_log.info(
        "other programs use %.1f of %d cores: threads wait without spinning (to choose otherwise, "
        "set OMP_WAIT_POLICY)",
        busy * cores,
        cores,
    )


def _busy_share() -> float:
    """The share of its cores' time that is used, by others, while this process sleeps."""
    used, total = _ticks()
    time.sleep(PROBE_SECONDS)
    used_then, total_then = _ticks()
    return (used_then - used) / (total_then - total)


def _ticks() -> tuple[int, int]:
    """Clock ticks of the cores that this process may use: those that were used, and all."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    used = total = 0
    for line in STAT.read_text().splitlines():
        name, *values = line.split()
        if name in names:
            user, nice, system, idle, waiting, interrupts, soft, stolen, *_ = map(int, values)
            here = user + nice + system + interrupts + soft + stolen
            used, total = used + here, total + here + idle + waiting
    return used, total
