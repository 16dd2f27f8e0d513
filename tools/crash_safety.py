"""Commands killed, cut off and starved of disk space: is anything lost, mixed or left behind?

    python tools/crash_safety.py [--commands prune,export] [--kills 50] [--cuts 0] [--steps 2000]

Every command runs on a tiny model and replaces, with --overwrite, an earlier result of its own.

    kills    SIGKILL at so many random moments
    stops    Ctrl-C or SIGTERM at as many: status 130 within seconds
    cuts     ended before each change of the disk in turn (0), or before so many of them at random:
             what a power cut leaves on a file system that keeps the order of changes
    full     no space left from each change of the disk on, for as many of them; files limited in
             size; a disk of a few megabytes, where one may be mounted
    read     an output on a disk that is read only, where one may be mounted
    evals    20 `eval` at the same time, with one cold cache
    steps    the memory of a `finetune` of so many steps

After each the output must be the earlier result or the new one, whole. Then the same command runs
to its end: its result must have the bits of a run that was left in peace, and nothing may lie
beside it. Prints a line for each kind and what went wrong; exits 1 if anything did.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny import TEXT, tiny_checkpoint

import fastprune
from fastprune import cli

COMMANDS = ("prune", "finetune", "merge", "export", "compress")
CUT, BAD_INPUT, INTERRUPTED = 86, 2, 130
STOPS = (signal.SIGINT, signal.SIGTERM)
STOP_SECONDS = 10
"""In which a stopped command must end, also on a busy machine."""
SMALL = ("--seq-len", "32", "--batch-size", "2", "--grad-accum", "1", "--lr", "1e-3")
EVALUATED = ("--eval", "{eval}", "--eval-seq-len", "32", "--eval-windows", "2")
CALIBRATED = ("--calib", "{text}", "--calib-samples", "4", "--calib-seq-len", "32")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "prune": ("prune", "{model}", *CALIBRATED, *EVALUATED, "--effort", "fast", "--ratio"),
    "finetune": (
        *("finetune", "{model}", "--data", "{text}", *SMALL, *EVALUATED, "--keep-last", "1"),
        *("--eval-steps", "3", "--val-size", "4", "--save-steps", "2", "--max-steps"),
    ),
    "merge": ("merge", "{model}", "--adapter", "{adapter}", "--strength"),
    "export": ("export", "{model}", "--format", "gguf", "--quant"),
    "compress": (
        *("compress", "{model}", "--data", "{text}", *SMALL, *CALIBRATED, *EVALUATED),
        *("--eval-also", "none", "--no-speed", "--effort", "fast", "--max-steps", "3", "--ratio"),
    ),
}
"""All but the last argument, which differs between the earlier and the new result."""
LAST = {
    "prune": ("0.2", "0.3"),
    "finetune": ("3", "5"),
    "merge": ("0.5", "1"),
    "export": ("f32", "f16"),
    "compress": ("0.2", "0.3"),
}


@dataclass
class Command:
    """One command, its two results, and where it works."""

    name: str
    root: Path
    known: dict[str, str] = field(default_factory=dict)
    """which result a digest is of"""
    found: list[str] = field(default_factory=list)
    """what went wrong"""

    @property
    def saved(self) -> Path:
        """Where a copy of the earlier result lies."""
        return self.root / f"earlier-{self.name}"

    @property
    def out(self) -> Path:
        return self.root / "work" / ("out.gguf" if self.name == "export" else "out")

    def arguments(self, new: bool = True) -> list[str]:
        inputs = {
            "model": self.root / "model",
            "adapter": self.root / "adapter",
            "text": self.root / "text.txt",
            "eval": self.root / "eval.txt",
        }
        words = [word.format(**inputs) for word in ARGUMENTS[self.name]]
        return [*words, LAST[self.name][new], "--out", str(self.out), "--overwrite", "--quiet"]

    def prepare(self) -> None:
        """Make both results in peace, and note what they are."""
        for which, new in (("earlier", False), ("new", True)):
            self.reset()
            begin = time.monotonic()
            if status := run(self.arguments(new), self.root):
                sys.exit(f"{self.name} ends with {status} by itself: see {self.root / 'log'}")
            self.seconds = time.monotonic() - begin
            self.known[self.digest()] = which
            self.listing = self.lies_there()
            if not new:
                shutil.move(self.out, self.saved)

    def reset(self) -> None:
        """The earlier result where there is one, no cache, nothing else."""
        for folder in ("work", "cache"):
            shutil.rmtree(self.root / folder, ignore_errors=True)
        self.out.parent.mkdir()
        if self.saved.is_dir():
            shutil.copytree(self.saved, self.out)
        elif self.saved.exists():
            shutil.copy(self.saved, self.out)

    def digest(self) -> str:
        """Of all files of the model in the output, by name and content."""
        digest, folder = sha256(), self.out
        files = [folder] if folder.is_file() else sorted(folder.glob("*"))
        for file in files:
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()

    def lies_there(self) -> list[str]:
        """The paths in the output's folder and in the cache."""
        folders = [self.root / "work", self.root / "cache"]
        paths = [path for folder in folders for path in folder.rglob("*")]
        return sorted(str(path.relative_to(self.root)) for path in paths)

    def check(self, where: str) -> None:
        """The earlier or the new result lies there; then the command ends well, and is tidy."""
        if self.digest() not in self.known:
            self.found.append(f"{where}: neither the earlier nor the new result")
        if status := run(self.arguments(), self.root):
            self.found.append(f"{where}: the same command then ends with {status}")
        elif self.known.get(self.digest()) != "new":
            self.found.append(f"{where}: the same command then makes something else")
        elif more := set(self.lies_there()) ^ set(self.listing):
            self.found.append(f"{where}: other files than usual: {', '.join(sorted(more)[:5])}")


# ------------------------------------------------------------------------------- child processes


def start(arguments: list[str], root: Path, before: Callable[[], None] = lambda: None) -> int:
    """A child process that runs one command line after `before`; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        before()
        status = cli.main(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the command had begun, or when it had ended
        status = INTERRUPTED
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """The exit status of `child`, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: list[str], root: Path, before: Callable[[], None] = lambda: None) -> int:
    return wait(start(arguments, root, before))


class Changes:
    """Counts what a process changes on the disk below `root`; before number `at` it acts.

    An action that returns is called again for each later change.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")

    def __init__(self, root: Path, at: int, act: Callable[[str], None]) -> None:
        self.root, self.at, self.act, self.count = str(root), at, act, 0

    def __call__(self) -> None:
        real = os.fsync

        def fsync(handle: int) -> None:
            self.changes("fsync")
            real(handle)

        os.fsync = fsync
        sys.addaudithook(self.audit)

    def audit(self, event: str, values: tuple) -> None:
        if event not in self.EVENTS:
            return
        if event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = os.fsdecode(values[0]) if isinstance(values[0], (str, bytes, Path)) else ""
        inside = path.startswith(self.root) or not os.path.isabs(path)  # shutil's are relative
        if inside and not path.endswith("/log"):
            self.changes(event)

    def changes(self, event: str) -> None:
        self.count += 1
        if self.count >= self.at:
            self.act(event)


def cut(event: str) -> None:
    """End as a machine does that loses its power."""
    os._exit(CUT)


def refuse(event: str) -> None:
    """As a full disk does."""
    if event in ("open", "os.mkdir", "os.link", "os.truncate", "fsync"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def changes_of(command: Command) -> int:
    """How many changes of the disk the undisturbed command makes."""
    reader, writer = os.pipe()
    command.reset()
    count = Changes(command.root, 1, lambda event: os.write(writer, b"."))
    run(command.arguments(), command.root, count)
    os.close(writer)
    with open(reader, "rb") as said:
        return len(said.read())


# ----------------------------------------------------------------------------------- disturbances


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


def chosen(total: int, number: int, draw: random.Random) -> list[int]:
    moments = range(1, total + 1)
    return sorted(draw.sample(moments, number)) if 0 < number < total else list(moments)


def cuts(command: Command, number: int, draw: random.Random) -> str:
    total = changes_of(command)
    moments = chosen(total, number, draw)
    for moment in moments:
        command.reset()
        status = run(command.arguments(), command.root, Changes(command.root, moment, cut))
        if status not in (0, CUT):
            command.found.append(f"cut before change {moment}: ends with {status}")
        command.check(f"cut before change {moment}")
    return f"{len(moments)} of {total} changes of the disk cut off"


def full(command: Command, number: int, draw: random.Random) -> str:
    total = changes_of(command)
    moments = chosen(total, number, draw)
    for moment in moments:
        command.reset()
        status = run(command.arguments(), command.root, Changes(command.root, moment, refuse))
        if status not in (0, BAD_INPUT):
            command.found.append(f"full from change {moment} on: ends with {status}")
        command.check(f"full from change {moment} on")
    limits = [1 << shift for shift in range(10, 20)]
    for limit in limits:
        command.reset()
        status = run(command.arguments(), command.root, partial(limited, limit))
        if status not in (0, BAD_INPUT):
            command.found.append(f"files of at most {limit} bytes: ends with {status}")
        command.check(f"files of at most {limit} bytes")
    said = f"{len(moments)} of {total} changes, {len(limits)} limits of a file's size"
    return f"full disk at {said}" + small_disks(command)


def limited(limit: int) -> None:
    """No file of this process grows beyond `limit` bytes; what it says goes nowhere."""
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


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


# ------------------------------------------------------------------------------------------ main


def fixtures(root: Path) -> None:
    """What the commands read; and all that they import, so that children need not."""
    for module in pkgutil.walk_packages(fastprune.__path__, "fastprune."):
        if not module.name.endswith(("vllm_models", "vllm_plugin", "__main__", "_C")):
            importlib.import_module(module.name)
    tiny_checkpoint(root / "model", layers=2)
    (root / "text.txt").write_text(TEXT * 40)
    (root / "eval.txt").write_text(TEXT * 4)
    lora = ["finetune", str(root / "model"), "--data", str(root / "text.txt"), *SMALL]
    lora += ["--method", "lora", "--max-steps", "2", "--eval-windows", "0"]
    if run([*lora, "--out", str(root / "adapter"), "--quiet"], root):
        sys.exit(f"no adapter could be trained: see {root / 'log'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--kinds", default="kills,stops,cuts,full,read,evals,steps")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=0, help="0: each one")
    parser.add_argument("--full", type=int, default=0, help="0: each one")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, kinds = random.Random(options.seed), options.kinds.split(",")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        fixtures(root)
        for name in options.commands.split(","):
            command = Command(name, root)
            command.prepare()
            for kind, disturb in (
                ("kills", lambda c: kills(c, options.kills, draw)),
                ("stops", lambda c: stops(c, options.kills, draw)),
                ("cuts", lambda c: cuts(c, options.cuts, draw)),
                ("full", lambda c: full(c, options.full, draw)),
                ("read", read_only),
            ):
                if kind in kinds:
                    print(f"{name}: {disturb(command)}", flush=True)
            wrong += [f"{name}: {what}" for what in command.found]
        for kind, check in (("evals", evals), ("steps", lambda r: memory(r, options.steps))):
            if kind in kinds:
                said, found = check(root)
                print(said, flush=True)
                wrong += found
        print(*wrong, f"{len(wrong)} faults", sep="\n")
        if wrong:
            print((root / "log").read_text()[-3000:])
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
