"""Run part of the tests with several versions of Python, torch and transformers.

    python tools/version_matrix.py --python python3.11 python3.13 --torch 2.10.0 2.13.0 \
        --transformers 5.15.0 5.24.0
    python tools/version_matrix.py --transformers 5.15.0 folders/transformers-5.20 --package WHEEL

Each combination gets a virtual environment of its own below --work, with the package and what the
tests need. Where torch is "installed" (the default), the environment sees the packages of the one
that runs this program, and only the package and transformers are its own: that takes seconds. Else
everything is installed. In place of a version, transformers may be a folder that
`pip install --target` made. Prints a table; the exit status is 1 if the tests failed anywhere.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = "installed"
TESTS = ("tests/models", "tests/kernels/test_backend.py", "tests/pruning/test_python_api.py")
NEEDED = ("pytest>=9.0", "pytest-timeout>=2.3", "hypothesis>=6.100", "pytest-benchmark>=5.1")
VERSIONS = (
    "from platform import python_version; from importlib.metadata import version; "
    "print(python_version(), version('torch'), version('transformers'))"
)


@dataclass(frozen=True)
class Cell:
    """One combination. ``transformers`` is a version, a folder, or "installed", as is ``torch``
    but for the folder."""

    python: str
    torch: str
    transformers: str

    @property
    def name(self) -> str:
        """A name for its folder."""
        parts = (self.python, self.torch, self.transformers)
        return "_".join(Path(part).name for part in parts)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: the versions that were really there, and the last line of the tests,
    or of the installation that failed."""

    cell: Cell
    status: str
    versions: str
    line: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cells; the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--torch", nargs="+", default=[INSTALLED], help="versions")
    parser.add_argument("--transformers", nargs="+", default=[INSTALLED], help="versions, folders")
    parser.add_argument("--package", default=str(ROOT), help="a wheel, or a source tree")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="what pytest is given")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix", help="folder")
    args = parser.parse_args(argv)
    outcomes = []
    for cell in (Cell(*parts) for parts in product(args.python, args.torch, args.transformers)):
        outcomes.append(run(cell, args.package, args.tests, args.work.resolve() / cell.name))
        print(f"{outcomes[-1].status}: {cell.name}", file=sys.stderr)
    print("\n".join(table(outcomes)))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def run(cell: Cell, package: str, tests: Sequence[str], folder: Path) -> Outcome:
    """Install ``cell`` into ``folder`` and run ``tests`` there; a log beside it has all output."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    with Path(f"{folder}.log").open("w", encoding="utf-8") as log:

        def call(*words: str) -> bool:
            done = subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            return done.returncode == 0

        def last_line() -> str:
            lines = Path(log.name).read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip("= ") for line in reversed(lines) if line.strip()), "")

        steps = installation(cell, package, folder)
        if not all(call(*step) for step in steps):
            return Outcome(cell, "not installed", "", last_line())
        if (reused := cell.torch == INSTALLED) or Path(cell.transformers).is_dir():
            borrow(cell, folder, reused)
        found = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, cwd=folder)
        # -P: the package that was installed is tested, not the one in the current folder
        passed = call(str(python), "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        return Outcome(cell, "passed" if passed else "failed", found.stdout.strip(), last_line())


def installation(cell: Cell, package: str, folder: Path) -> Iterator[list[str]]:
    """The commands that make the environment of ``cell`` in ``folder``."""
    yield [cell.python, "-m", "venv", "--clear", "--without-pip", str(folder)]
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    pip += ["--disable-pip-version-check", "install", "--quiet"]
    version = [] if Path(cell.transformers).is_dir() or cell.transformers == INSTALLED else [
        f"transformers=={cell.transformers}"
    ]  # fmt: skip
    if cell.torch == INSTALLED:
        yield [*pip, "--no-deps", "--no-build-isolation", package, *version]
    else:
        yield [*pip, package, f"torch=={cell.torch}", *version, *NEEDED]


def borrow(cell: Cell, folder: Path, reused: bool) -> None:
    """Let the environment in ``folder`` see a folder of transformers and, where it is ``reused``,
    the packages of this one, behind its own."""
    paths = [os.path.abspath(cell.transformers)] if Path(cell.transformers).is_dir() else []
    if reused:  # with what this environment itself borrows
        own = Path(sysconfig.get_path("purelib"))
        paths += [str(own), *(p for p in sys.path if p.endswith("site-packages") and p != str(own))]
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "matrix.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Rows in Markdown."""
    yield "| Python, torch, transformers | outcome | |"
    yield "|---|---|---|"
    for outcome in outcomes:
        yield f"| {outcome.versions or outcome.cell.name} | {outcome.status} | {outcome.line} |"


if __name__ == "__main__":
    sys.exit(main())
