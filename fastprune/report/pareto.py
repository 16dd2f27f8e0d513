"""The Pareto plot of runs: which are worth having, and where everything stands in the figure."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastprune.report import format

WIDTH, HEIGHT = 720, 380  # figure units
LEFT, RIGHT, TOP, BOTTOM = 60, 24, 20, 48  # margins around the axes
LOG_SPREAD = 10  # largest over smallest perplexity from which the axis is logarithmic
LEAST_SPAN = 0.02  # of the largest value, so that nearly equal values keep readable ticks
LETTER, LINE, DOT = 6.0, 13.0, 5.0  # label: width of a letter, height; radius of a point
LONGEST = 30  # letters of a label


@dataclass(frozen=True)
class Point:
    """One mark of the plot: `size` block parameters at perplexity `value`."""

    name: str
    size: int
    value: float
    kind: str
    """front, other, or dense (the model before pruning)"""
    about: str
    """what the mark says when pointed at"""


@dataclass(frozen=True)
class Axis:
    """Maps values low..high to figure units start..end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        """Round values inside the axis, at most about eight."""
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step)
            return [step * i for i in range(first, math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        stride = math.ceil(len(decades) / 8)
        digits = (1, 2, 5) if len(decades) <= 3 else (1,)
        values = [digit * 10.0**d for d in decades[::stride] for digit in digits]
        return [value for value in values if self.low <= value <= self.high]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (size, perplexity) pairs that none beats in both, from small to large."""
    best = [
        i
        for i, p in enumerate(points)
        if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
    ]
    return sorted(best, key=lambda i: points[i])


def figure(points: Sequence[Point]) -> dict[str, Any]:
    """Coordinates of the plot of `points` (at least one): axes, marks, labels, the front's line."""
    values = [point.value for point in points]
    log = max(values) > LOG_SPREAD * min(values)
    x = _axis([point.size for point in points], LEFT, WIDTH - RIGHT)
    y = _axis(values, HEIGHT - BOTTOM, TOP, log)
    places = [(x(point.size), y(point.value)) for point in points]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "radius": DOT,
        "log": log,
        "x_ticks": [{"at": x(tick), "label": format.count(tick)} for tick in x.ticks()],
        "y_ticks": [{"at": y(tick), "label": f"{tick:g}"} for tick in y.ticks()],
        "line": [
            {"x": place[0], "y": place[1]}
            for place, point in sorted(zip(places, points, strict=True), key=lambda pair: pair[0])
            if point.kind == "front"
        ],
        "marks": [
            {"x": place[0], "y": place[1], "kind": point.kind, "about": point.about}
            for place, point in zip(places, points, strict=True)
        ],
        "labels": _labels(points, places),
    }


def _axis(values: Sequence[float], start: float, end: float, log: bool = False) -> Axis:
    """An axis over `values` with some air at both ends."""
    low, high = min(values), max(values)
    if log:
        air = 0.06 * (math.log(high) - math.log(low))
        top = min(math.log(high) + air, math.log(sys.float_info.max))
        return Axis(math.exp(math.log(low) - air), math.exp(top), start, end, log)
    air = max(0.06 * (high - low), LEAST_SPAN * high) or 5.0
    return Axis(max(0.0, low - air), high + air, start, end)


def _round_step(step: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above `step`, but at least half."""
    power = 10.0 ** math.floor(math.log10(step))
    return max(digit * power for digit in (1, 2, 5) if digit * power <= step)


def _labels(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Names beside their marks, the front's first; one that finds no free room is left out."""
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in places]
    order = sorted(range(len(points)), key=lambda i: points[i].kind != "front")
    labels = []
    for i in order:
        name = points[i].name
        text = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        x, y = places[i]
        for label, box in _candidates(x, y, LETTER * len(text)):
            inside = (
                LEFT < box[0] and box[2] < WIDTH and TOP / 2 < box[1] and box[3] < HEIGHT - BOTTOM
            )
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                labels.append({"text": text, **label})
                break
    return labels


def _candidates(
    x: float, y: float, width: float
) -> list[tuple[dict[str, Any], tuple[float, float, float, float]]]:
    """Places for a label of `width` near (x, y), best first, with the box (x0, y0, x1, y1) of each.

    Around the mark; then away from it, at the end of a thin line.
    """
    near = [(DOT + 3, -DOT - 3, "start")]  # above the front, which falls from left to right
    near += [(DOT + 5, 0.0, "start"), (-DOT - 5, 0.0, "end")]
    near += [(0.0, -DOT - 8, "middle"), (0.0, DOT + 9, "middle")]
    far = [
        (side * reach, drop * lift, "start" if side > 0 else "end")
        for reach in (16, 34, 56)
        for lift in (16, 30, 46, 64)
        for side in (1, -1)
        for drop in (-1, 1)
    ]
    found = []
    for dx, dy, anchor in near + far:
        at, middle = x + dx, y + dy
        left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        label = {
            "x": round(at, 2),
            "y": round(middle + 4, 2),  # the base line lies below the middle of the letters
            "anchor": anchor,
            "leader": (dx, dy, anchor) in far,
            "from_x": x,
            "from_y": y,
            "to_y": round(middle, 2),
        }
        found.append((label, (left - 2, middle - LINE / 2, left + width + 2, middle + LINE / 2)))
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
