"""The commands that are disturbed, their two results, and what is compared afterwards."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from children import Changes, run
from tiny import TEXT, tiny_checkpoint

import fastprune
from fastprune import cli
from fastprune.compression import measure

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
SAMPLE_TOKENS = 2
"""Of each answer that `compress` notes: few, for they take most of its time here."""
PASSING = re.compile(
    rb"\d+\.\d+(e[-+]?\d+)?|\d\d:\d\d:\d\d,\d+|(?<=_bytes\": )\d+|(?<=process )\d+"
)
"""What differs in text files between two runs of the same command: seconds, times, memory."""
RANDOM = re.compile(r"(?<=\.fastprune-)\w{8}\b")
"""The end of the name of a file or folder that is being written."""


@dataclass
class Command:
    """One command, its two results, and where it works."""

    name: str
    root: Path
    known: dict[str, str] = field(default_factory=dict)
    """which result a digest is of"""
    found: list[str] = field(default_factory=list)
    """what went wrong"""
    went_on: set[str] = field(default_factory=set)
    """digests of all that lay there, of the states from which the command went on well"""

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
        """Make both results in peace, and note what they are.

        The first run is this process's own: what it imports and compiles, its children have.
        """
        self.reset()
        cli.main(self.arguments())
        for which, new in (("earlier", False), ("new", True)):
            self.reset()
            begin = time.monotonic()
            if status := run(self.arguments(new), self.root):
                sys.exit(f"{self.name} ends with {status} by itself: see {self.root / 'log'}")
            self.seconds = time.monotonic() - begin
            self.known[self.digest()] = which
            self.listing = [name for name, _ in self.lies_there()]
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

    def changes(self) -> int:
        """How many changes of the disk the undisturbed command makes."""
        reader, writer = os.pipe()
        self.reset()
        count = Changes(self.root, 1, lambda event: os.write(writer, b"."))
        run(self.arguments(), self.root, count)
        os.close(writer)
        with open(reader, "rb") as said:
            return len(said.read())

    def digest(self) -> str:
        """Of all files of the model in the output, by name and content."""
        digest, folder = sha256(), self.out
        files = [folder] if folder.is_file() else sorted(folder.glob("*"))
        for file in files:
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()

    def lies_there(self) -> Iterator[tuple[str, Path]]:
        """The paths in the output's folder and in the cache, from `root` and whole."""
        for folder in ("work", "cache"):
            for path in sorted((self.root / folder).rglob("*")):
                yield str(path.relative_to(self.root)), path

    def state(self) -> str:
        """A digest of all that lies there, without what passes: times, figures of the memory,
        random parts of names."""
        digest = sha256()
        for name, path in self.lies_there():
            digest.update(RANDOM.sub("", name).encode() + b"\0")
            if path.is_file() and path.name != "lock":
                content = path.read_bytes()
                text = b"\0" not in content
                digest.update(PASSING.sub(b"", content) if text else content)
        return digest.hexdigest()

    def check(self, where: str) -> None:
        """The earlier or the new result lies there; then the command ends well, and is tidy.

        The second is tried once for each state of the disk.
        """
        if self.digest() not in self.known:
            self.found.append(f"{where}: neither the earlier nor the new result")
        state = self.state()
        if state in self.went_on:
            return
        before = len(self.found)
        if status := run(self.arguments(), self.root):
            self.found.append(f"{where}: the same command then ends with {status}")
        elif self.known.get(self.digest()) != "new":
            self.found.append(f"{where}: the same command then makes something else")
        elif more := {name for name, _ in self.lies_there()} ^ set(self.listing):
            self.found.append(f"{where}: other files than usual: {', '.join(sorted(more)[:5])}")
        if len(self.found) == before:
            self.went_on.add(state)


def fixtures(root: Path) -> None:
    """What the commands read; and all that they import, so that children need not."""
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    measure.SAMPLE_TOKENS = SAMPLE_TOKENS
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
