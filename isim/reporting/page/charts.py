"""Charts of the page: curves as scalable pictures that need no script."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, Any]]
# Size in the picture's own units: one is a pixel on a phone.
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 24, 34
# Colours that differ in lightness, too.
COLORS = ("#1a5fb4", "#c64600", "#26a269", "#813d9c", "#77767b", "#986a44")


class Line(NamedTuple):
    """Curve: its name, colour, and points in the picture, such as "0,10 5,12"."""

    name: str
    color: str
    points: str
    dots: list[tuple[float, float, str]]


class Chart(NamedTuple):
    """Chart in the picture's units; `x_ticks` and `y_ticks` are places with their texts."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def chart(
    title: str, rows: Rows, x: str, columns: Mapping[str, str], *, y_label: str, scale: float = 1
) -> Chart | None:
    """Draw columns of a table against the column `x`; None where there is nothing to draw.

    `columns` maps columns to their names; cells that are no finite number are left out, `scale` is
    a factor on the values.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for column, name in columns.items():
        pairs = [(number(row.get(x)), number(row.get(column))) for row in rows]
        points = [(a, scale * b) for a, b in pairs if a is not None and b is not None]
        if points:
            found[name] = points
    every = [point for points in found.values() for point in points]
    if not every:
        return None
    whole = all(a == int(a) for a, _ in every)
    x_low, x_high, x_values = _axis([a for a, _ in every], whole=whole)
    y_low, y_high, y_values = _axis([b for _, b in every] + [0])

    def across(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM))

    lines = []
    for place, (name, points) in enumerate(found.items()):
        dots = [(across(a), down(b), f"{name}, {x} {a:g}: {b:.4g}") for a, b in points]
        joined = " ".join(f"{a},{b}" for a, b, _ in dots)
        lines.append(Line(name, COLORS[place % len(COLORS)], joined, dots))
    x_ticks = [(across(value), f"{value:g}") for value in x_values]
    y_ticks = [(down(value), f"{value:g}") for value in y_values]
    return Chart(title, x, y_label, lines, x_ticks, y_ticks)


def number(cell: Any) -> float | None:  # noqa: ANN401 - a cell of a table, or a JSON value
    """Return the finite number that a cell of a table holds; None for another one."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _axis(values: Sequence[float], whole: bool = False) -> tuple[float, float, list[float]]:
    """Choose the ends of an axis and about five round values on it."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = (high - low) / 4
    size = 10 ** math.floor(math.log10(step))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= step)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    if whole:
        first, last = math.ceil(low / step), math.floor(high / step)
        return low, high, [place * step for place in range(first, last + 1)]
    return first * step, last * step, [round(n * step, 10) for n in range(first, last + 1)]
