"""Blocks of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkast_study.plots import make_figure, plot_series, save
from topkast_study.scales import PAIRS, Scale
from topkast_study.study import Claim, Labels, Outcome, Row, Study

_BLOCKS = ((1, 1), (2, 2), (4, 4), (8, 8), (1, 16), (16, 1))
_SQUARE = 4


def _labels(fwd: float, block: tuple[int, int]) -> Labels:
    return f"{fwd:g}", f"{PAIRS[fwd]:g}", f"{block[0]}×{block[1]}"


def _rows(scale: Scale) -> list[Row]:
    return [
        Row(_labels(fwd, block), scale.images("topkast", fwd, block=block))
        for fwd in (0.8, 0.9)
        for block in _BLOCKS
    ]


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    figure, (axes,) = make_figure(1)
    for fwd, colour in ((0.8, "#0072B2"), (0.9, "#D55E00")):
        here = [outcome for outcome in outcomes if outcome.row.run.fwd == fwd]
        squares, others = here[:_SQUARE], here[_SQUARE:]
        label = f"{fwd:g}/{PAIRS[fwd]:g}"
        x = range(len(squares))
        plot_series(axes, x, squares, label=label, color=colour, marker="o")
        rest = [float(_SQUARE + k) for k in range(len(others))]
        plot_series(axes, rest, others, label="", color=colour, marker="s", linestyle="none")
    axes.set_xticks(range(len(_BLOCKS)), [f"{rows}×{columns}" for rows, columns in _BLOCKS])
    axes.set_xlabel("rows × columns of a block")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(frameon=False, title="fwd/bwd")
    save(figure, path)
    return "Test accuracy against the size of a block: mean ± standard deviation."


STUDY = Study(
    name="blocks",
    title="Blocks of weights",
    question="What does it cost to choose whole blocks of weights, which hardware prefers?",
    columns=("fwd", "bwd", "block"),
    rows=_rows,
    claims=tuple(
        Claim(
            f"{fwd:g}/{PAIRS[fwd]:g}: single weights are better than blocks of {side}×{side}",
            _labels(fwd, (1, 1)),
            _labels(fwd, (side, side)),
        )
        for fwd in (0.8, 0.9)
        for side in (4, 8)
    ),
    plots={"blocks.png": _plot},
    notes="The paper chooses single weights only; the orderings are what one would expect.",
)
