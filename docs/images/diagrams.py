"""Draws the figures of the method: `python docs/images/diagrams.py` writes them beside this file.

Each figure has one file for light pages and one for dark pages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Colors:
    text: str
    muted: str
    active: str  # A
    exploring: str  # B∖A
    resting: str  # C


THEMES = {
    "light": Colors("#1f2328", "#57606a", "#0969b2", "#bf7000", "#c9d1d9"),
    "dark": Colors("#e6edf3", "#9da7b3", "#58a6ff", "#f0a840", "#484f58"),
}
FONT = "Arial, 'Liberation Sans', Helvetica, sans-serif"
FORWARD, BACKWARD = 0.2, 0.4  # densities of the figure


def text(x: float, y: float, words: str, color: str, anchor: str = "middle", bold: int = 0) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}"{weight}>{words}</text>'


def path(points: str, color: str, arrow: bool = False) -> str:
    end = f' marker-end="url(#{color[1:]})"' if arrow else ""
    return f'<path d="{points}" fill="none" stroke="{color}" stroke-width="1.6"{end}/>'


def hop(start: float, end: float, y: float, color: str) -> str:
    """An arrow over the border of two sets."""
    inward = (end - start) / 4
    return path(
        f"M{start} {y} C{start + inward} {y - 30} {end - inward} {y - 30} {end} {y - 4}",
        color,
        True,
    )


def cell(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{color}"/>'


def bracket(left: float, right: float, y: float, color: str) -> str:
    return path(f"M{left} {y - 6} V{y} H{right} V{y - 6}", color)


def color_of(rank: int, total: int, colors: Colors) -> str:
    if rank < FORWARD * total:
        return colors.active
    return colors.exploring if rank < BACKWARD * total else colors.resting


def draw_sets(colors: Colors) -> Iterator[str]:
    """The sets of one tensor: where its weights lie, and the same weights by magnitude."""
    yield text(100, 24, "One weight tensor", colors.text, bold=1)
    order = sorted(range(100), key=lambda number: number**3 * 7919 % 101)
    for position, rank in enumerate(order):
        row, column = divmod(position, 10)
        yield cell(10 + 18 * column, 96 + 18 * row, 16, 16, color_of(rank, 100, colors))
    yield path("M200 185 H232", colors.muted, arrow=True)

    left, step, base = 246, 17, 274
    total = 30
    middle = left + FORWARD * total * step - 2.5
    edge = left + BACKWARD * total * step - 2.5
    right = left + total * step - 5
    yield text((left + right) / 2, 24, "Its weights, sorted by magnitude", colors.text, bold=1)
    for rank in range(total):
        height = 165 * 0.93**rank
        x = left + step * rank
        yield cell(x, base - height, step - 5, height, color_of(rank, total, colors))

    yield hop(middle + 28, middle - 28, 96, colors.text)
    yield text(middle, 64, "grows: enters A", colors.text)
    yield hop(edge + 28, edge - 28, 154, colors.text)
    yield text(edge + 40, 150, "chosen at a refresh: enters B", colors.text, "start")
    yield hop(edge - 2, edge + 46, 196, colors.text)
    yield text(edge + 58, 190, "shrunk by the penalty: leaves B", colors.text, "start")

    yield bracket(left, middle - 3, 290, colors.active)
    yield text((left + middle) / 2, 309, "A: forward pass", colors.active, bold=1)
    yield bracket(left, edge - 3, 330, colors.exploring)
    words = "B: gradient, update, state"
    yield text((left + edge) / 2, 349, words, colors.exploring, bold=1)
    yield bracket(edge, right, 290, colors.muted)
    yield text((edge + right) / 2, 309, "C waits: not read, not changed", colors.muted, bold=1)


def box(x: float, y: float, width: float, lines: list[str], color: str, ink: str) -> Iterator[str]:
    height = 16 + 19 * len(lines)
    yield (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="none" '
        f'stroke="{color}" stroke-width="1.6"/>'
    )
    for number, line in enumerate(lines):
        yield text(x + width / 2, y + 22 + 19 * number, line, ink, bold=number == 0)


def draw_step(colors: Colors) -> Iterator[str]:
    """The loop of one step, and the refresh."""
    ink, muted = colors.text, colors.muted
    yield from box(10, 104, 130, ["θ", "all weights", "(C among them)"], muted, ink)
    yield from box(260, 30, 130, ["θ on B", "one vector"], colors.exploring, ink)
    yield from box(440, 30, 150, ["α", "θ on A, zero elsewhere"], colors.active, ink)
    yield from box(640, 30, 110, ["loss", "of the model"], ink, ink)
    yield from box(620, 196, 130, ["gradient on B", "∂L/∂α"], colors.exploring, ink)
    yield from box(440, 196, 150, ["exploration penalty", "added to the gradient"], ink, ink)
    yield from box(260, 196, 130, ["inner optimizer", "and its state on B"], colors.exploring, ink)
    yield path("M390 57 H432", ink, True)
    yield path("M590 57 H632", ink, True)
    yield path("M695 84 V188", ink, True)
    yield text(688, 140, "backward pass", ink, "end")
    yield path("M620 223 H598", ink, True)
    yield path("M440 223 H398", ink, True)
    yield path("M325 196 V92", ink, True)
    yield text(334, 140, "new values", ink, "start")
    yield path("M75 104 V57 H252", muted, True)
    yield text(84, 46, "refresh: choose A and B", muted, "start")
    yield path("M260 223 H75 V185", muted, True)
    yield text(84, 241, "write back", muted, "start")


FIGURES: dict[str, tuple[Callable[[Colors], Iterator[str]], int, int]] = {
    "sets": (draw_sets, 765, 362),
    "step": (draw_step, 765, 262),
}


def render(figure: str, theme: str) -> str:
    draw, width, height = FIGURES[figure]
    colors = THEMES[theme]
    markers = "".join(
        f'<marker id="{color[1:]}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
        for color in (colors.text, colors.muted)
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="{FONT}" font-size="14">',
            f"<defs>{markers}</defs>",
            *draw(colors),
            "</svg>\n",
        ]
    )


def main(folder: Path) -> None:
    for figure in FIGURES:
        for theme in THEMES:
            (folder / f"{figure}-{theme}.svg").write_text(render(figure, theme), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
