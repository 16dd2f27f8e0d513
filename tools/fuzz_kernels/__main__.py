"""Random calls of the compiled kernels, right and wrong, held against their definitions.

    python tools/fuzz_kernels [--examples 10000] [--seed 0] [--first N] [--large SHARE]
    tools/sanitize.sh fuzz --examples 100000        # under AddressSanitizer and UBSan

An example calls one binding of fastprune.kernels._C with tensors of random dtypes, shapes, strides
and offsets, on a random CPU level. In half of the examples something is then put in the place of
one or two arguments: None, another type, dtype, device, shape or layout, memory of another
argument, sizes beyond any memory. A call must either give what reference.py gives and change no
byte of memory beside its results, or raise a Python exception and change nothing at all; a call
in which nothing was replaced must succeed.

Examples run in child processes, a block at a time. Where a child dies, the example that it died of
is looked for and named; `--first N --examples 1` repeats example N. Exits 1 after a failure.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import traceback
from pathlib import Path

import torch

from fastprune.kernels import backend

sys.path.insert(0, str(Path(__file__).resolve().parent))

from examples import run_examples

BLOCK = 500
"""Examples of one child process."""


def run_apart(options: argparse.Namespace, first: int, count: int) -> int:
    """The wait status of a child process that checks these examples: 0 where all is well."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        if options.parallel_for:
            function = ctypes.CDLL(options.parallel_for).parallel_for
            address = ctypes.cast(function, ctypes.c_void_p).value
            backend.compiled(torch.device("cpu")).set_parallel_for(address)
        torch.set_num_threads(options.threads)
        found = run_examples(options.seed, first, count, options.large)
        print(f"examples {first} to {first + count - 1}:", found, flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def last_survived(options: argparse.Namespace, first: int, count: int) -> int:
    """The example at which a child dies that checks this block."""
    while count > 1:
        half = count // 2
        if run_apart(options, first, half):
            count = half
        else:
            first, count = first + half, count - half
    return first


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first example")
    parser.add_argument(
        "--large", type=float, default=0.01, help="share of examples split over threads"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument(
        "--parallel-for",
        metavar="LIBRARY",
        help="has a function parallel_for to be used in place of torch's threads",
    )
    options = parser.parse_args()
    if backend.compiled(torch.device("cpu")) is None:
        parser.error(backend.backends()[0].reason)
    for first in range(options.first, options.first + options.examples, BLOCK):
        count = min(BLOCK, options.first + options.examples - first)
        status = run_apart(options, first, count)
        if status and os.WIFSIGNALED(status):
            number = last_survived(options, first, count)
            print(f"example {number} of seed {options.seed} ends the process", file=sys.stderr)
        if status:
            return 1
    print(f"{options.examples} examples of seed {options.seed}: no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
