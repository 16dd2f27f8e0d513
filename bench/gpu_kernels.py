"""Time every kernel on a CUDA device against what torch offers for the same result.

    python bench/gpu_kernels.py [--gib 1.0] [--only taylor,gather,...] [--no-peers] [--json FILE]

Kernel time is taken with CUDA events over rotating buffers far larger than the L2 cache, while the
host runs ahead. "of copy" is the bandwidth (each input byte read once, each output byte written
once, over the median time) relative to a device-to-device copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastprune.kernels import AdamW, ops
from fastprune.kernels.backend import compiled

Call = Callable[[], object]
DEVICE = "cuda"
HEAD_START = 4_000_000  # clock cycles, about 2 ms: longer than the host needs to enqueue a call
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Row:
    """One kernel or contender on one case; milliseconds at the 20th, 50th and 80th percentile."""

    case: str
    provider: str
    bytes: int
    ms: tuple[float, float, float]
    of_copy: float = 0.0
    slower: float = 1.0
    """median time over that of fastprune on the same case"""


@dataclass
class Case:
    """Providers of one result, each with one call per set of buffers."""

    name: str
    bytes: int
    providers: dict[str, list[Call]]


def quantiles(calls: list[Call], repeats: int) -> tuple[float, float, float]:
    """Milliseconds of a call, at the 20th, 50th and 80th percentile."""
    for call in calls:
        call()
    times = []
    for i in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)  # the device waits, so that no launch is late
        begin.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    cuts = statistics.quantiles(times, n=10)
    return cuts[1], statistics.median(times), cuts[7]


def matrix(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE, dtype=dtype).mul_(scale)


def copy_case(size: int) -> Case:
    sets = [[torch.randn(size // 4, device=DEVICE) for _ in range(2)] for _ in range(2)]
    return Case("copy", 2 * size, {"torch": [lambda s=s: s[1].copy_(s[0]) for s in sets]})


# ---------------------------------------------------------------------------- taylor
def eager_taylor(w: Tensor, g: Tensor | None, h: Tensor | None, kind: str) -> tuple:
    w32 = w.float()
    if kind == "first":
        term = (w32 * g.float()).abs()
    elif kind == "mix":
        term = (w32 * g.float() - 0.5 * w32 * w32 * h.float()).abs()
    else:
        term = w32.abs()
    return term.sum(1), term.sum(0)


def taylor_cases(size: int) -> Iterator[Case]:
    compiled_taylor = torch.compile(eager_taylor, dynamic=False)
    columns = 14336
    for dtype, kind, extra in (
        ("bf16", "first", 0), ("bf16", "mix", 0), ("bf16", "l1", 0), ("fp32", "first", 0),
        ("bf16", "first", 1),
    ):  # fmt: skip
        rows = size // (columns * DTYPES[dtype].itemsize)
        sets = []
        for _ in range(2):
            w, g = (matrix(rows, columns + extra, DTYPES[dtype]) for _ in range(2))
            h = matrix(rows, columns + extra, torch.float32).square_() if kind == "mix" else None
            sets.append((w, None if kind == "l1" else g, h))
        read = sum(t.nbytes for t in sets[0] if t is not None)
        shape = f"{rows}x{columns + extra}"
        yield Case(
            f"taylor {kind} {dtype} {shape}",
            read,
            {
                "fastprune": [
                    lambda s=s, k=kind: ops.taylor(s[0], s[1], s[2], kind=k) for s in sets
                ],
                "eager": [lambda s=s, k=kind: eager_taylor(*s, k) for s in sets],
                "torch.compile": [lambda s=s, k=kind: compiled_taylor(*s, k) for s in sets],
            },
        )


# ---------------------------------------------------------------------------- gather
def kept(length: int, run: int, share: float) -> Tensor:
    """About `share` of 0..length-1 in whole runs, ascending."""
    order = torch.randperm(length // run)[: int(length // run * share)].sort().values
    return (order[:, None] * run + torch.arange(run)).flatten()


def gather_cases(size: int) -> Iterator[Case]:
    columns = 14336
    rows = size // (columns * 2)
    select = torch.compile(torch.index_select, dynamic=False)
    for what, dim, index in (
        ("rows", 0, kept(rows, 1, 0.8)),
        ("columns by heads of 128", 1, kept(columns, 128, 0.8)),
        ("single columns", 1, kept(columns, 1, 0.8)),
    ):
        sets = [matrix(rows, columns, torch.bfloat16) for _ in range(2)]
        shape = [len(index), columns] if dim == 0 else [rows, len(index)]
        outs = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for _ in sets]
        on_device = index.to(DEVICE)
        yield Case(
            f"gather {what} bf16 {rows}x{columns}",
            2 * outs[0].nbytes,
            {
                "fastprune": [
                    lambda t=t, o=o, i=index, d=dim: ops.gather([t], [i], [d], [o])
                    for t, o in zip(sets, outs)
                ],
                "eager": [
                    lambda t=t, o=o, i=on_device, d=dim: torch.index_select(t, d, i, out=o)
                    for t, o in zip(sets, outs)
                ],
                "torch.compile": [lambda t=t, i=on_device, d=dim: select(t, d, i) for t in sets],
            },
        )


# ---------------------------------------------------------------------------- scan
def eager_scan(x: Tensor) -> list[Tensor]:
    x = x.float()
    mean, second = x.mean(), x.square().mean()
    sigma = (second - mean * mean).sqrt()
    return [
        x.isnan().sum(), x.isinf().sum(), (x == 0).sum(), x.min(), x.max(), mean, second,
        ((x - mean).abs() > 6 * sigma).sum(),
    ]  # fmt: skip


def scan_cases(size: int) -> Iterator[Case]:
    compiled_scan = torch.compile(eager_scan, dynamic=False)
    for dtype in ("bf16", "fp32"):
        sets = [matrix(size // (4096 * DTYPES[dtype].itemsize), 4096, DTYPES[dtype]) for _ in "ab"]
        yield Case(
            f"scan {dtype} {sets[0].shape[0]}x4096",
            sets[0].nbytes,
            {
                "fastprune": [lambda t=t: ops.scan_table([t]) for t in sets],
                "eager": [lambda t=t: eager_scan(t) for t in sets],
                "torch.compile": [lambda t=t: compiled_scan(t) for t in sets],
            },
        )


# ---------------------------------------------------------------------------- adamw
def parameters(count: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    made = [matrix(4096, columns, dtype, 0.02).requires_grad_() for _ in range(count)]
    for p in made:
        p.grad = matrix(4096, columns, dtype)
    return made


def torch_step(params: list[Tensor], **kind: bool) -> Call:
    optimizer = torch.optim.AdamW(params, lr=1e-6, **kind)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()

    return step


def adamw_cases(size: int) -> Iterator[Case]:
    """Clipping and update. torch keeps half-precision moments for half-precision weights, so it
    moves fewer bytes there: what it lacks in return is fastprune's reason to exist."""
    count = 8
    for dtype, master in (("fp32", "none"), ("bf16", "fp32"), ("bf16", "stochastic")):
        item = DTYPES[dtype].itemsize
        columns = size // (count * 4096 * item)
        elements = count * 4096 * columns
        # norms read g; the update reads g, m, v and the weight kept in fp32, and writes the rest
        per_element = item + item + 16 + (8 + item if master == "fp32" else 2 * item)
        ours, eager, fused = (parameters(count, columns, DTYPES[dtype]) for _ in range(3))
        optimizer = AdamW(ours, lr=1e-6, max_grad_norm=1.0, master=master)
        yield Case(
            f"adamw {dtype} master={master} {elements / 1e6:.0f}M",
            elements * per_element,
            {
                "fastprune": [optimizer.step],
                "eager foreach + clip": [torch_step(eager, foreach=True)],
                "fused + clip": [torch_step(fused, fused=True)],
            },
        )


# ---------------------------------------------------------------------------- cross_entropy
def eager_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def eager_loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.float()
    normaliser = x.logsumexp(-1, keepdim=True)
    losses = normaliser - x.gather(1, targets[:, None])
    onehot = torch.arange(x.shape[1], device=DEVICE) == targets[:, None]
    return losses, ((x - normaliser).exp() - onehot.float()).div(len(x)).to(logits.dtype)


def cross_entropy_cases(size: int) -> Iterator[Case]:
    vocabulary = 128256
    for dtype in ("bf16", "fp32"):
        rows = size // (vocabulary * DTYPES[dtype].itemsize)
        targets = torch.randint(vocabulary, (rows,), device=DEVICE)
        sets = [matrix(rows, vocabulary, DTYPES[dtype], 3.0) for _ in "ab"]
        for what, eager, scale in (
            ("loss", eager_loss, None),
            ("loss and gradient", eager_loss_and_gradient, 1 / rows),
        ):
            fused = torch.compile(eager, dynamic=False)
            yield Case(
                f"cross_entropy {what} {dtype} {rows}x{vocabulary}",
                sets[0].nbytes * (1 if scale is None else 2),
                {
                    "fastprune": [
                        lambda t=t, s=scale, y=targets: ops.cross_entropy(t, y, scale=s)
                        for t in sets
                    ],
                    "eager": [lambda t=t, f=eager, y=targets: f(t, y) for t in sets],
                    "torch.compile": [lambda t=t, f=fused, y=targets: f(t, y) for t in sets],
                },
            )


CASES = {
    "taylor": taylor_cases,
    "gather": gather_cases,
    "scan": scan_cases,
    "adamw": adamw_cases,
    "cross_entropy": cross_entropy_cases,
}


def measure(case: Case, repeats: int, copy_rate: float | None) -> list[Row]:
    rows = []
    for provider, calls in case.providers.items():
        row = Row(case.name, provider, case.bytes, quantiles(calls, repeats))
        rate = case.bytes / row.ms[1]
        row.of_copy = rate / (copy_rate or rate)
        row.slower = row.ms[1] / rows[0].ms[1] if rows else 1.0
        rows.append(row)
        print(
            f"{row.case:48} {provider:22} {row.ms[0]:9.3f} {row.ms[1]:9.3f} {row.ms[2]:9.3f} "
            f"{rate / 1e9:7.3f} {row.of_copy:8.1%} {row.slower:7.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="bytes of one weight, in GiB")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--no-peers", action="store_true", help="time fastprune and the copy only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if compiled(torch.device("cuda", 0)) is None:
        raise SystemExit("no CUDA kernels here; `fastprune info` says why")
    torch.manual_seed(0)
    size = int(options.gib * 2**30)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        f"{'case':48} {'provider':22} {'ms 20%':>9} {'50%':>9} {'80%':>9} "
        f"{'TB/s':>7} {'of copy':>8} {'slower':>7}"
    )
    rows = measure(copy_case(2 * size), options.repeats, None)
    copy_rate = rows[0].bytes / rows[0].ms[1]
    for name in options.only.split(","):
        for case in CASES[name](size):
            if options.no_peers:
                case.providers = {"fastprune": case.providers["fastprune"]}
            rows += measure(case, options.repeats, copy_rate)
            del case
            torch.cuda.empty_cache()
    if options.json:
        record = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "copy_bytes_per_second": copy_rate * 1e3,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
