"""What the numbers of a scan, a forward pass and a comparison mean, one finding per subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastprune.inspect.against import Comparison
from fastprune.inspect.anatomy import Heads, LayerHealth
from fastprune.inspect.forward import ForwardTest
from fastprune.inspect.health import TensorHealth, describe_broken, named
from fastprune.inspect.verdict import Finding
from fastprune.messages import Message
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
        what = Message(
            "not scanned: {count} tensors of dtype {dtypes}", count=len(skipped), dtypes=dtypes
        )
        yield Finding("note", what)
    scans = [(t, t.scan) for t in tensors if t.scan is not None and t.numel]
    empty = [t.name for t, s in scans if s.zeros == t.numel and not t.name.endswith("bias")]
    if empty:
        yield Finding("warning", Message("zero throughout: {names}", names=named(empty)))
    masked = [t.name for t, s in scans if MOSTLY * t.numel <= s.zeros < t.numel]
    if masked:
        yield Finding("warning", Message("more than half zeros: {names}", names=named(masked)))
    if large := [(s.absmax, t.name) for t, s in scans if s.absmax >= LARGE]:
        largest, _ = max(large)
        where = named([name for _, name in large])
        what = Message(
            "unusually large values, up to {largest:.3g}: {names}", largest=largest, names=where
        )
        yield Finding("warning", what)
    far = [t.name for t, s in scans if t.numel >= ENOUGH and s.outliers > FAR * t.numel]
    if far:
        share = format.percent(FAR)
        what = Message("over {share} beyond 6 sigma: {names}", share=share, names=named(far))
        yield Finding("warning", what)


def of_layers(layers: Sequence[LayerHealth], heads: Heads) -> Iterator[Finding]:
    """Sizes that do not fit, the query:KV ratio, dead heads and channels."""
    if wrong := [layer for layer in layers if layer.problem]:
        what = Message("{layer}: {problem}", layer=wrong[0].name, problem=wrong[0].problem)
        if len(wrong) > 1:
            what = Message("{what} (and {more} more layers)", what=what, more=len(wrong) - 1)
        yield Finding("broken", what)
    ratios = sorted({layer.ratio for layer in layers if layer.ratio})
    if len(ratios) > 1 and heads.ratio is None:
        words = ", ".join(f"{ratio}:1" for ratio in ratios)
        what = Message("layers differ in their query:KV ratio: {ratios}", ratios=words)
        yield Finding("broken", what)
    for units, dead, alive in (
        (Message("heads"), "dead_heads", "query_heads"),
        (Message("channels"), "dead_channels", "channels"),
    ):
        count = {layer.name: _count(getattr(layer, dead)) for layer in layers}
        size = {layer.name: getattr(layer, alive) for layer in layers}
        if some := [name for name, n in count.items() if n]:
            total = sum(count.values())
            what = Message(
                "{total:,} dead {units}, which add nothing, in {names}",
                total=total,
                units=units,
                names=named(some),
            )
            yield Finding("note", what)
        if all_dead := [name for name, n in count.items() if n and n == size[name]]:
            what = Message("all {units} are dead in {names}", units=units, names=named(all_dead))
            yield Finding("warning", what)


def of_forward(test: ForwardTest, sound_weights: bool = False) -> Iterator[Finding]:
    """Where the forward pass broke, or what its output looks like.

    With ``sound_weights`` every weight is known to be finite.
    """
    shape = " × ".join(map(str, test.shape))
    broken = bool(test.broken_at is not None or test.nan or test.inf)
    if broken and sound_weights:
        dtype, where = test.dtype, test.broken_at or Message("the logits")
        what = Message("it overflows in {dtype} (in {where})", dtype=dtype, where=where)
        if dtype == "float16":
            what = Message(
                "it overflows in float16; use --dtype bfloat16 or float32 (in {where})", where=where
            )
    elif test.broken_at is not None:
        what = Message("the output is not finite from {module} on", module=test.broken_at)
    elif test.nan or test.inf:
        what = Message(
            "logits {shape}: {nan:,} NaN, {inf:,} Inf", shape=shape, nan=test.nan, inf=test.inf
        )
    elif test.constant:
        broken = True
        what = Message("logits {shape}: all the same, {value:.3g}", shape=shape, value=test.min)
    else:
        what = Message(
            "logits {shape} from {min:.3g} to {max:.3g}, all finite",
            shape=shape,
            min=test.min,
            max=test.max,
        )
    yield Finding("broken" if broken else "note", what)


def of_comparison(found: Comparison, heads: Heads) -> Iterator[Finding]:
    """The layers that lost most against the dense model, and its query:KV ratio."""
    if heads.ratio is not None and heads.ratio != found.queries_per_kv:
        yield Finding(
            "broken",
            Message(
                "{here} query heads to a KV head; the dense model has {dense}",
                here=heads.ratio,
                dense=found.queries_per_kv,
            ),
        )
    what = Message("divergence from {dense}: {kl:.3g} nats a token", dense=found.dense, kl=found.kl)
    if worst := found.worst():
        layers = ", ".join(f"{loss.layer} ({loss.kl:.2g})" for loss in worst)
        what = Message("{what}; the layers that cost most: {layers}", what=what, layers=layers)
    elif not found.layers:
        what = Message(
            "{what}; which layers correspond is not known, so none is compared", what=what
        )
    yield Finding("note", what)


def _count(dead: int | tuple[int, ...]) -> int:
    return dead if isinstance(dead, int) else len(dead)
