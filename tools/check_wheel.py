"""Whether a wheel holds what it should, and runs where its name says that it does.

    python tools/check_wheel.py WHEEL [ROOT]

ROOT is the source tree that the wheel was built from. Prints one line per breach and exits 1 if
there is any. Needs readelf (binutils).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "fastprune"
MEGABYTES = 4
LIBRARIES = re.compile(
    r"lib(c|m|dl|rt|pthread)\.so\.\d|libstdc\+\+\.so\.6|libgcc_s\.so\.1|ld-linux[-\w]*\.so\.\d"
)
"""What the module may need: the system's. It links no torch, so that it runs with every version of
it, and no OpenMP, of which torch brings its own."""
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
"""Of manylinux_2_28 (PEP 600): the newest versions of symbols that it grants."""

_NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")
_VERSION = re.compile(rf"Name: ({'|'.join(NEWEST)})_([\d.]+)")
_SYMBOL = re.compile(r"^ *\d+: \w+ +\w+ \w+ +(?:GLOBAL|WEAK|UNIQUE) +\w+ +(?!UND)\w+ (\S+)", re.M)


def breaches(wheel: Path, root: Path) -> Iterator[str]:
    """One line per breach of ``wheel``, which was built from the source tree ``root``."""
    if (size := wheel.stat().st_size) > MEGABYTES * 2**20:
        yield f"{size / 2**20:.1f} MB; at most {MEGABYTES}"
    yield from _tags(wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        yield from _contents(names, root)
        yield from _version(archive, root)
        modules = [name for name in names if name.endswith(".so")]
        if len(modules) != 1 or not modules[0].startswith(f"{PACKAGE}/kernels/_C."):
            yield f"holds the libraries {sorted(modules)}; one, {PACKAGE}/kernels/_C.*.so, is right"
        with tempfile.TemporaryDirectory() as folder:
            for name in modules:
                for breach in library_breaches(Path(archive.extract(name, folder))):
                    yield f"{name}: {breach}"


def library_breaches(library: Path) -> Iterator[str]:
    """What keeps a shared ``library`` from running on every manylinux_2_28 system."""
    dynamic, versions, symbols = (
        _readelf(flag, library) for flag in ("--dynamic", "--version-info", "--dyn-syms")
    )
    for needed in _NEEDED.findall(dynamic):
        if not LIBRARIES.fullmatch(needed):
            yield f"needs {needed}"
    for name, version in sorted(set(_VERSION.findall(versions))):
        if tuple(map(int, version.split("."))) > NEWEST[name]:
            newest = ".".join(map(str, NEWEST[name]))
            yield f"needs {name}_{version}; build it where {name} is at most {newest}"
    shown = sorted(name for name in _SYMBOL.findall(symbols) if not name.startswith("PyInit_"))
    if shown:
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        yield f"shows symbols that may clash with others: {', '.join(shown[:3])}{more}"


def _tags(name: str) -> Iterator[str]:
    """Platforms in the name of the wheel that are not manylinux_2_28 or an older one."""
    for tag in name.removesuffix(".whl").split("-")[-1].split("."):
        match = re.fullmatch(r"manylinux_2_(\d+)_\w+", tag)
        if not tag.startswith("manylinux2014") and (match is None or int(match[1]) > 28):
            yield f"is for {tag}; build it in a manylinux_2_28 image and repair it by auditwheel"


def _contents(names: set[str], root: Path) -> Iterator[str]:
    """Files of the package that are missing, and files that are no part of it."""
    source = (file for file in (root / PACKAGE).rglob("*") if file.is_file())
    expected = {
        file.relative_to(root).as_posix()
        for file in source
        if "__pycache__" not in file.parts and file.suffix != ".so"
    }
    yield from (f"{name} is missing" for name in sorted(expected - names))
    for name in sorted(names - expected):
        if name.endswith(".so") or re.match(rf"{PACKAGE}-[^/]+\.dist-info/", name):
            continue
        yield f"{name} is not in the source tree"


def _version(archive: zipfile.ZipFile, root: Path) -> Iterator[str]:
    """Whether the version in the metadata is the project's."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    files = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(files[0]).decode() if files else ""
    if f"\nVersion: {project['version']}\n" not in metadata:
        yield f"its metadata do not name the version {project['version']}"


def _readelf(flag: str, library: Path) -> str:
    done = subprocess.run(
        ["readelf", "--wide", flag, library],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode or not done.stdout:
        raise SystemExit(f"{library.name}: readelf cannot read it: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    """Check the wheel that the command line names; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).resolve().parents[1])
    args = parser.parse_args()
    if not zipfile.is_zipfile(args.wheel):
        parser.error(f"{args.wheel}: not a wheel")
    found = list(breaches(args.wheel, args.root))
    print("\n".join(f"{args.wheel.name}: {line}" for line in found or ["in order"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
