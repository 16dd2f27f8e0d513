"""Numbers for people: one spelling for tables on the terminal and in reports."""

import math
from collections.abc import Mapping


def count(n: float) -> str:
    """134515008 → 134.5 M"""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(n) >= limit:
            return f"{n / limit:.4g} {unit}"
    return f"{n:,.0f}"


def size(n_bytes: float) -> str:
    """536870912 → 512 MiB"""
    for exponent, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(n_bytes) >= 999.5 * 1024 ** (exponent - 1):  # three digits would say 1e+03
            return f"{n_bytes / 1024**exponent:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """0.034 → 34 ms; 75.2 → 1 min 15 s"""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def percent(fraction: float) -> str:
    """0.2 → 20.0 %"""
    return f"{100 * fraction:.1f} %"


def perplexity(value: float | None) -> str:
    """22.5534 → 22.55; — where it was not measured"""
    if value is None:
        return "—"
    return f"{value:.2f}" if value < 1e5 or not math.isfinite(value) else f"{value:.2e}"


BLEU = 0.15
"""BLEU-4 from which answers share enough of the references' wording."""


def bleu(value: float | None) -> str:
    """0.1421 → 0.142 (target 0.15); — where it was not measured"""
    return "—" if value is None else f"{value:.3f} (target {BLEU:g})"


def factor(before: float | None, after: float | None) -> str:
    """How many times `after` is `before`: ×1.42; — where either is missing."""
    if not before or after is None:
        return "—"
    return f"×{after / before:.3g}"


def milliseconds(value: float | None) -> str:
    """19.4273 → 19.4 ms; — where it was not measured"""
    return "—" if value is None else f"{value:.3g} ms"


def budget(unit: str, value: float | None) -> str:
    """A figure in the unit of a budget of `prune`; — where it was not measured."""
    if value is None:
        return "—"
    return {
        "ratio": lambda: f"{percent(value)} of the block parameters",
        "parameters": lambda: f"{count(value)} parameters",
        "bytes": lambda: size(value),
        "ms/token": lambda: f"{milliseconds(value)} a token",
    }[unit]()


def mlp(size: Mapping[str, int], suffix: str = "") -> str:
    """The channels of a layer of ``size``, as in 1536, or with experts as in 8 × 768.

    ``suffix`` is that of the names of the sizes.
    """
    experts, channels = size.get(f"experts{suffix}", 0), size[f"channels{suffix}"]
    return f"{experts} × {channels}" if f"experts{suffix}" in size and channels else str(channels)
