"""Compiles the CUDA kernels and fails if one of them spills registers or needs a stack frame.

    python tools/check_ptxas.py [--arch 80 90 ...] [FILE.cu ...]

Register arrays that the compiler could not keep in registers live in device memory, which these
memory-bound kernels cannot afford. Needs nvcc, no GPU.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # as in CMakeLists.txt

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    spilled: int


def own_options(source: Path) -> list[str]:
    """The options CMakeLists.txt gives to this file alone."""
    path = re.escape(source.relative_to(ROOT).as_posix())
    found = re.search(
        rf"set_source_files_properties\({path} PROPERTIES COMPILE_OPTIONS ([^)]*)\)",
        (ROOT / "CMakeLists.txt").read_text(),
    )
    return found[1].split() if found else []


def kernels(source: Path, arch: str) -> list[Kernel]:
    """What ptxas says of every kernel in a file; RuntimeError if it does not compile."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            "nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--Werror=all-warnings",
            "-Xptxas=-v", f"-arch=sm_{arch}", "-cubin", "-I", str(ROOT / "csrc"),
            *own_options(source), "-o", f"{directory}/kernels.cubin", str(source),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{result.stderr}")
    return [
        Kernel(m["name"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in _ENTRY.finditer(result.stderr)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        print("nvcc is not on the PATH", file=sys.stderr)
        return 2
    files = [f.resolve() for f in options.files] or sorted((ROOT / "csrc/cuda").glob("*.cu"))
    failed = False
    print(f"{'file':12} {'arch':>7} {'kernels':>8} {'most registers':>15} {'spilling':>9}")
    for source in files:
        for arch in options.arch:
            found = kernels(source, arch)
            bad = [k for k in found if k.stack or k.spilled]
            failed |= bool(bad)
            most = max((k.registers for k in found), default=0)
            print(f"{source.name:12} {'sm_' + arch:>7} {len(found):8} {most:15} {len(bad):9}")
            for k in bad:
                print(f"  {k.name}: stack {k.stack} bytes, spills {k.spilled} bytes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
