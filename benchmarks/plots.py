"""Draws line plots as SVG pictures, light or dark as the reader's system."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT, _MARGIN, _GAP = 250, 190, 44, 34
"""The size of a panel's frame, the margin of the picture, and the space between panels, in pixels."""

# Okabe and Ito's colours, told apart by people who see few of them. Shapes of the marks differ, too.
_COLOURS = ("#999999", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_STYLE = """
.back{fill:#fff}text{fill:#1f2328;font:12px system-ui,sans-serif}.frame{stroke:#59636e;fill:none}.grid{stroke:#d1d9e0}
@media (prefers-color-scheme:dark){.back{fill:#0d1117}text{fill:#e6edf3}.frame{stroke:#9198a1}.grid{stroke:#30363d}}
"""


class Line(NamedTuple):
    """A line: its name, and its points as (x, y, lowest y, highest y)."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


class Panel(NamedTuple):
    """One frame with lines."""

    title: str
    lines: Sequence[Line]


def lines_plot(rows: Sequence[Sequence[Panel]], title: str, x_name: str, y_name: str) -> str:
    """Returns the picture of rows of panels, with one logarithmic x axis and one y axis for all of them."""
    names = list(dict.fromkeys(line.name for row in rows for panel in row for line in panel.lines))
    points = [point for row in rows for panel in row for line in panel.lines for point in line.points]
    xs = sorted({point[0] for point in points}) or [1.0]
    low = 10 * math.floor(min((point[2] for point in points), default=0.0) / 10)
    high = max(low + 10, 10 * math.ceil(max((point[3] for point in points), default=100.0) / 10))
    panels = 2 * _MARGIN + max(len(row) for row in rows) * (_WIDTH + _GAP) - _GAP
    width = max(panels, 2 * _MARGIN + sum(map(_legend_width, names)))
    height = 2 * _MARGIN + len(rows) * (_HEIGHT + _GAP) + 18
    drawn: list[str] = []
    for number, row in enumerate(rows):
        for place, panel in enumerate(row):
            corner = (_MARGIN + place * (_WIDTH + _GAP), _MARGIN + number * (_HEIGHT + _GAP))
            drawn += _panel(panel, corner, names, xs, (low, high))
    drawn += _legend(names, height - 16)
    drawn.append(f'<text x="{width / 2:.0f}" y="{height - 40}" text-anchor="middle">{escape(x_name)}</text>')
    drawn.append(f'<text x="8" y="18">{escape(y_name)}</text>')
    inside = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f'<rect class="back" width="100%" height="100%" rx="6"/>\n{inside}\n</svg>\n'
    )


def _panel(
    panel: Panel, corner: tuple[int, int], names: Sequence[str], xs: Sequence[float], ends: tuple[float, float]
) -> Iterator[str]:
    left, top = corner

    def at(x: float, y: float) -> tuple[float, float]:
        span = math.log(xs[-1] / xs[0]) or 1.0
        across = 14 + (_WIDTH - 28) * math.log(x / xs[0]) / span
        return left + across, top + _HEIGHT * (ends[1] - y) / (ends[1] - ends[0])

    yield f'<text x="{left}" y="{top - 7}" font-weight="bold">{escape(panel.title)}</text>'
    step = 10 if ends[1] - ends[0] <= 60 else 20
    for value in range(int(ends[0]), int(ends[1]) + 1, step):
        y = at(xs[0], value)[1]
        yield f'<line class="grid" x1="{left}" x2="{left + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value}</text>'
    for x in xs:
        yield f'<text x="{at(x, 0)[0]:.1f}" y="{top + _HEIGHT + 15}" text-anchor="middle">{x:g}</text>'
    yield f'<rect class="frame" x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}"/>'
    for line in panel.lines:
        number = names.index(line.name)
        # A little apart, so that the bars of one x do not hide each other.
        shift = 4 * (number - (len(names) - 1) / 2)
        places = [(at(x, y), at(x, low), at(x, high)) for x, y, low, high in line.points]
        yield from _line([tuple((x + shift, y) for x, y in three) for three in places], number)


def _line(places: Sequence[tuple[tuple[float, float], ...]], number: int) -> Iterator[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), *_ in places)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
    for (x, y), (_, low), (_, high) in places:
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
        yield _mark(x, y, number)


def _mark(x: float, y: float, number: int) -> str:
    colour = _COLOURS[number % len(_COLOURS)]
    corners = 3 + number % 5
    if corners == 7:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>'
    turns = [2 * math.pi * (n / corners - 0.25) for n in range(corners)]
    path = " ".join(f"{x + 4 * math.cos(turn):.1f},{y + 4 * math.sin(turn):.1f}" for turn in turns)
    return f'<polygon points="{path}" fill="{colour}"/>'


def _legend(names: Sequence[str], y: int) -> Iterator[str]:
    x = _MARGIN
    for number, name in enumerate(names):
        yield _mark(x, y - 4, number)
        yield f'<text x="{x + 9}" y="{y}">{escape(name)}</text>'
        x += _legend_width(name)


def _legend_width(name: str) -> int:
    return 34 + 7 * len(name)
