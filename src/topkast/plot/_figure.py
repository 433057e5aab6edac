"""What all figures share: colours, sizes, and where they are drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from topkast._errors import OptionError

Style: TypeAlias = Literal["light", "dark"]

WIDTH = 7.0  # inches: 700 pixels at matplotlib's 100 dots per inch


@dataclass(frozen=True)
class Colours:
    """Okabe and Ito's colours, as they are readable on a light or a dark background."""

    active: str  # A
    exploring: str  # B∖A
    resting: str  # outside B
    other: str
    alarm: str
    text: str


_STYLES = {
    "light": {"background": "#FFFFFF", "text": "#1F2328", "edge": "#6E7781"},
    "dark": {"background": "#131416", "text": "#E6E6E6", "edge": "#8B949E"},
}


@contextmanager
def open_figure(
    figure: Figure | SubFigure | None, style: Style | None, *, height: float
) -> Iterator[tuple[Figure | SubFigure, Colours]]:
    """Provide the figure to draw into, of a height in inches if it is new, and the colours.

    What is drawn inside the ``with`` block has the text colours of the style.
    """
    with mpl.rc_context(_settings(style)):
        if figure is None:
            figure = NotebookFigure(figsize=(WIDTH, height), layout="constrained")
        else:
            root = root_of(figure)
            if root.get_layout_engine() is None:
                root.set_layout_engine("constrained")
            if style is not None:
                figure.set_facecolor(_STYLES[style]["background"])
        yield figure, _colours()


def root_of(figure: Figure | SubFigure) -> Figure:
    """The figure that a subfigure belongs to, or the figure itself."""
    root: Any = figure.figure
    assert isinstance(root, Figure)
    return root


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=1.5 * self.dpi)
        return buffer.getvalue()


def _settings(style: Style | None) -> Any:  # names are literals to matplotlib's types
    if style is None:
        return {}
    if style not in _STYLES:
        raise OptionError(
            f"style={style!r}: expected 'light', 'dark', or None for matplotlib's settings"
        )
    background, text, edge = (_STYLES[style][name] for name in ("background", "text", "edge"))
    return {
        "figure.facecolor": background,
        "axes.facecolor": background,
        "savefig.facecolor": "auto",
        "text.color": text,
        "axes.labelcolor": text,
        "axes.titlecolor": "auto",
        "axes.edgecolor": edge,
        "legend.labelcolor": "None",
        "xtick.color": edge,
        "ytick.color": edge,
        "xtick.labelcolor": text,
        "ytick.labelcolor": text,
    }


def _colours() -> Colours:
    """Choose colours that are readable beside the colour of text."""
    text = mpl.rcParams["text.color"]
    if sum(to_rgb(text)) < 1.5:
        return Colours("#0072B2", "#E69F00", "#E4E7EB", "#009E73", "#D55E00", text)
    return Colours("#3D9BE0", "#E69F00", "#343A42", "#1FBF92", "#FF7A33", text)


def font_size(ratio: float = 0.9) -> float:
    """A size in points, as a ratio of the size that is set in matplotlib."""
    return ratio * float(mpl.rcParams["font.size"])


def prepare_axes(axes: Axes, *, grid: Literal["both", "x", "y"] | None = "both") -> None:
    """Set what all plots have in common.

    Ticks are made when a figure is drawn, after the settings of a style: their colours and sizes
    are set here.
    """
    settings: Any = mpl.rcParams
    for axis in ("x", "y"):
        colour, label_colour = (settings[f"{axis}tick.{part}"] for part in ("color", "labelcolor"))
        axes.tick_params(
            axis=axis,
            color=colour,
            labelcolor=colour if label_colour == "inherit" else label_colour,
            labelsize=font_size(),
        )
    axes.set_axisbelow(True)
    axes.grid(visible=False)
    if grid is not None:
        axes.grid(axis=grid, color=settings["text.color"], alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure | SubFigure, handles: Sequence[Any], *, columns: int) -> None:
    """Place a legend below all plots."""
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=font_size(),
        handlelength=1.6,
        columnspacing=1.4,
    )


def patch(colour: str, label: str) -> Patch:
    """An entry of a legend for an area."""
    return Patch(facecolor=colour, edgecolor="#808080", linewidth=0.5, label=label)


def percent(share: float) -> str:
    """A share with three digits, such as 12.5 %."""
    value = float(f"{100 * share:.3g}")
    if value == 0 or value >= 100:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 10 else f"{value:.2f} %" if value >= 1 else f"{value:.2g} %"


def shorten(name: str, length: int) -> str:
    """The end of a long name, which says more than its beginning."""
    return literal(name if len(name) <= length else f"…{name[1 - length :]}")


def literal(name: str) -> str:
    """A name as matplotlib writes it: not as a formula, if it has dollar signs."""
    return name.replace("$", r"\$")


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Write a text beside each row of horizontal bars, at the right of the plot."""
    for position, label in enumerate(labels):
        axes.text(
            1.015,
            position,
            label,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=font_size(),
        )
