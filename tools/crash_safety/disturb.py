"""What is done to a command; what it must then leave is compared by `Command.check`."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from children import (
    BAD_INPUT,
    CUT,
    INTERRUPTED,
    Changes,
    Stop,
    cut,
    limited,
    refuse,
    run,
    start,
    wait,
)
from commands import Command

STOPS = (signal.SIGINT, signal.SIGTERM)
STOP_SECONDS = 10
"""In which a stopped command must end, also on a busy machine."""


def kills(command: Command, number: int, draw: random.Random) -> str:
    late = sum(stopped(command, signal.SIGKILL, draw)[0] == 0 for _ in range(number))
    return f"{number} kills, {late} of them too late"


def stops(command: Command, number: int, draw: random.Random) -> str:
    ends = [stopped(command, draw.choice(STOPS), draw) for _ in range(number)]
    for status, seconds in ends:
        if status not in (0, INTERRUPTED):
            command.found.append(f"stopped: ends with {status}")
        if seconds > STOP_SECONDS:
            command.found.append(f"stopped: ends {seconds:.1f} s later")
    late = sum(status == 0 for status, _ in ends)
    longest = max(seconds for _, seconds in ends)
    return f"{number} stops, {late} of them too late, all heeded within {longest:.1f} s"


def stopped(command: Command, number: int, draw: random.Random) -> tuple[int, float]:
    """Send the signal `number` at a random moment; the exit status, and the seconds until it."""
    command.reset()
    moment = draw.uniform(0, command.seconds)
    child = start(command.arguments(), command.root)
    time.sleep(moment)
    sent = time.monotonic()
    os.kill(child, number)
    status, seconds = wait(child), time.monotonic() - sent
    command.check(f"signal {number} after {moment:.3f} s")
    return status, seconds


def at_changes(
    command: Command,
    number: int,
    draw: random.Random,
    act: Callable[[int], Callable[[str], None]],
    ends: tuple[int, ...],
    what: str,
) -> str:
    """Do `act` before each change of the disk in turn, or before so many at random (0: each).

    `act` is given the number of the change; the command must end with one of `ends`, or with 0
    where the disturbance made no difference.
    """
    total = command.changes()
    moments = list(range(1, total + 1))
    if 0 < number < total:
        moments = sorted(draw.sample(moments, number))
    for moment in moments:
        command.reset()
        before = Changes(command.root, moment, act(moment))
        if (status := run(command.arguments(), command.root, before)) not in (0, *ends):
            command.found.append(f"{what} before change {moment}: ends with {status}")
        command.check(f"{what} before change {moment}")
    return f"{what} before {len(moments)} of {total} changes of the disk"


def cuts(command: Command, number: int, draw: random.Random) -> str:
    return at_changes(command, number, draw, lambda _: cut, (CUT,), "cut off")


def signals(command: Command, number: int, draw: random.Random) -> str:
    act = lambda moment: Stop(STOPS[moment % 2])  # noqa: E731
    return at_changes(command, number, draw, act, (INTERRUPTED,), "a signal")


def full(command: Command, number: int, draw: random.Random) -> str:
    said = at_changes(command, number, draw, lambda _: refuse, (BAD_INPUT,), "full from")
    limits = [1 << shift for shift in range(10, 20)]
    for limit in limits:
        command.reset()
        status = run(command.arguments(), command.root, partial(limited, limit))
        if status not in (0, BAD_INPUT):
            command.found.append(f"files of at most {limit} bytes: ends with {status}")
        command.check(f"files of at most {limit} bytes")
    return f"{said}, {len(limits)} limits of a file's size" + small_disks(command)


def small_disks(command: Command) -> str:
    """Disks of a few sizes, all but the last too small; what is to be said of them."""
    sizes = [256 << shift for shift in range(8)]
    for size in sizes:
        command.reset()
        with mounted(command.out.parent, size) as there:
            if not there:
                return ", no small disk may be mounted"
            status = run(command.arguments(), command.root)
            left = [path.name for path in command.out.parent.iterdir()]
            if status not in (0, BAD_INPUT):
                command.found.append(f"a disk of {size} KiB: ends with {status}")
            if status and any(name.startswith(".") for name in left):
                command.found.append(f"a disk of {size} KiB: leaves {', '.join(left)}")
    return f", {len(sizes)} small disks"


@contextmanager
def mounted(folder: Path, kib: int) -> Iterator[bool]:
    """A disk of so many KiB at `folder`, where that is allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)


def read_only(command: Command) -> str:
    """An output on a disk that is read only."""
    command.reset()
    with mounted(command.out.parent, 4096) as there:
        if not there:
            return "no read-only disk may be mounted"
        remount = ["mount", "-o", "remount,ro", str(command.out.parent)]
        subprocess.run(remount, check=True)
        if (status := run(command.arguments(), command.root)) != BAD_INPUT:
            command.found.append(f"a read-only disk: ends with {status}")
    return "1 read-only disk"


def evals(root: Path, number: int = 20) -> tuple[str, list[str]]:
    """So many `eval` of one `.gguf` file at once, which one of them converts."""
    shutil.rmtree(root / "cache", ignore_errors=True)
    results = [root / f"eval-{i}.json" for i in range(number)]
    common = ["--text", str(root / "eval.txt"), "--seq-len", "32", "--quiet"]
    model = root / "model.gguf"
    run(["export", str(root / "model"), "--format", "gguf", "--out", str(model), "--quiet"], root)
    children = [start(["eval", str(model), *common, "--json", str(f)], root) for f in results]
    ends = [wait(child) for child in children]
    found = [f"{number} evals at once: ends with {end}" for end in ends if end]
    kept = [path.name for path in (root / "cache" / "fastprune").iterdir()]
    if len(kept) != 1:
        found.append(f"{number} evals at once: the cache holds {', '.join(kept)}")
    return f"{number} evals at once, one conversion", found


def memory(root: Path, steps: int) -> tuple[str, list[str]]:
    """The resident memory of a long `finetune`, early and at its end."""
    command = Command("finetune", root)
    arguments = [*command.arguments(), "--max-steps", str(steps), "--save-steps", str(steps)]
    log = root / "work" / "out" / "fastprune" / "train_log.jsonl"
    command.reset()
    child = start([*arguments, "--log-steps", "10", "--eval-steps", str(steps)], root)
    seen: list[tuple[int, int]] = []
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.2)
        status = Path(f"/proc/{child}/status").read_text()
        used = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        seen += [(10 * lines, use) for use in used]
    early = max(use for step, use in seen if step <= steps // 4)
    late = max(use for step, use in seen if step >= 3 * steps // 4)
    said = f"{steps} steps: {early >> 10} MiB early, {late >> 10} MiB late"
    return said, [said] if late > 1.02 * early else []
