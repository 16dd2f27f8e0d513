"""What the numbers of a scan, a forward pass and a comparison mean, one finding per subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastprune.inspect.against import Comparison
from fastprune.inspect.anatomy import Heads, LayerHealth
from fastprune.inspect.forward import ForwardTest
from fastprune.inspect.health import TensorHealth, describe_broken, named
from fastprune.inspect.verdict import Finding
from fastprune.report import format

LARGE = 1000.0
"""Weights beyond this are unusual: trained ones stay below 100 but for a few biases of Qwen2."""
MOSTLY = 0.5
"""Share of zeros from which a matrix counts as masked."""
FAR, ENOUGH = 0.01, 4096
"""Share of values beyond 6 sigma that is unusual (of a bell curve: 2e-9; of any distribution at
most 1/36), in a tensor of at least so many values."""


def of_weights(tensors: Sequence[TensorHealth]) -> Iterator[Finding]:
    """NaN, Inf, zeros, large values and outliers."""
    if bad := [t for t in tensors if not t.finite]:
        yield Finding("broken", describe_broken(bad))
    if skipped := [t for t in tensors if t.scan is None]:
        dtypes = ", ".join(sorted({t.dtype for t in skipped}))
        yield Finding("note", f"not scanned: {len(skipped)} tensors of dtype {dtypes}")
    scans = [(t, t.scan) for t in tensors if t.scan is not None and t.numel]
    empty = [t.name for t, s in scans if s.zeros == t.numel and not t.name.endswith("bias")]
    if empty:
        yield Finding("warning", f"zero throughout: {named(empty)}")
    masked = [t.name for t, s in scans if MOSTLY * t.numel <= s.zeros < t.numel]
    if masked:
        yield Finding("warning", f"more than half zeros: {named(masked)}")
    if large := [(s.absmax, t.name) for t, s in scans if s.absmax >= LARGE]:
        largest, _ = max(large)
        where = named([name for _, name in large])
        yield Finding("warning", f"unusually large values, up to {largest:.3g}: {where}")
    far = [t.name for t, s in scans if t.numel >= ENOUGH and s.outliers > FAR * t.numel]
    if far:
        yield Finding("warning", f"over {format.percent(FAR)} beyond 6 sigma: {named(far)}")


def of_layers(layers: Sequence[LayerHealth], heads: Heads) -> Iterator[Finding]:
    """Sizes that do not fit, the query:KV ratio, dead heads and channels."""
    if wrong := [layer for layer in layers if layer.problem]:
        more = f" (and {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
        yield Finding("broken", f"{wrong[0].name}: {wrong[0].problem}{more}")
    ratios = sorted({layer.ratio for layer in layers if layer.ratio})
    if len(ratios) > 1 and heads.ratio is None:
        words = " and ".join(f"{ratio}:1" for ratio in ratios)
        yield Finding("broken", f"layers differ in their query:KV ratio: {words}")
    for what, dead, alive in (
        ("heads", "dead_heads", "query_heads"),
        ("channels", "dead_channels", "channels"),
    ):
        count = {layer.name: _count(getattr(layer, dead)) for layer in layers}
        size = {layer.name: getattr(layer, alive) for layer in layers}
        if some := [name for name, n in count.items() if n]:
            total = sum(count.values())
            yield Finding("note", f"{total:,} dead {what}, which add nothing, in {named(some)}")
        if all_dead := [name for name, n in count.items() if n and n == size[name]]:
            yield Finding("warning", f"all {what} are dead in {named(all_dead)}")


def of_forward(test: ForwardTest, sound_weights: bool = False) -> Iterator[Finding]:
    """Where the forward pass broke, or what its output looks like.

    With ``sound_weights`` every weight is known to be finite.
    """
    shape = " × ".join(map(str, test.shape))
    broken = test.broken_at is not None or test.nan or test.inf
    if broken and sound_weights:
        remedy = "; use --dtype bfloat16 or float32" if test.dtype == "float16" else ""
        where = test.broken_at or "the logits"
        yield Finding("broken", f"it overflows in {test.dtype}{remedy} (in {where})")
    elif test.broken_at is not None:
        yield Finding("broken", f"the output is not finite from {test.broken_at} on")
    elif test.nan or test.inf:
        yield Finding("broken", f"logits {shape}: {test.nan:,} NaN, {test.inf:,} Inf")
    elif test.constant:
        yield Finding("broken", f"logits {shape}: all the same, {test.min:.3g}")
    else:
        yield Finding("note", f"logits {shape} from {test.min:.3g} to {test.max:.3g}, all finite")


def of_comparison(found: Comparison, heads: Heads) -> Iterator[Finding]:
    """The layers that lost most against the dense model, and its query:KV ratio."""
    if heads.ratio is not None and heads.ratio != found.queries_per_kv:
        yield Finding(
            "broken",
            f"{heads.ratio} query heads to a KV head; the dense model has {found.queries_per_kv}",
        )
    text = f"divergence from {found.dense}: {found.kl:.3g} nats a token"
    if worst := found.worst():
        layers = ", ".join(f"{loss.layer} ({loss.kl:.2g})" for loss in worst)
        text += f"; the layers that cost most: {layers}"
    elif not found.layers:
        text += "; which layers correspond is not known, so none is compared"
    yield Finding("note", text)


def _count(dead: int | tuple[int, ...]) -> int:
    return dead if isinstance(dead, int) else len(dead)
