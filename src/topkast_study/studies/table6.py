"""Table 6: the interval between refreshes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkast_study.plots import make_figure, plot_series, save
from topkast_study.scales import PAIRS, Scale
from topkast_study.study import Claim, Outcome, Published, Row, Study

_INTERVALS = (1, 10, 100)


def _rows(scale: Scale) -> list[Row]:
    return [
        Row(
            (f"{fwd:g}", f"{PAIRS[fwd]:g}", str(every)),
            scale.images("topkast", fwd, refresh_every=every),
        )
        for fwd in (0.8, 0.9, 0.95)
        for every in _INTERVALS
    ]


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    figure, (axes,) = make_figure(1)
    for fwd, colour in ((0.8, "#0072B2"), (0.9, "#D55E00"), (0.95, "#009E73")):
        here = [outcome for outcome in outcomes if outcome.row.run.fwd == fwd]
        x = [outcome.row.run.refresh_every for outcome in here]
        label = f"{fwd:g}/{PAIRS[fwd]:g}"
        plot_series(axes, x, here, label=label, color=colour, marker="o")
    axes.set_xscale("log")
    axes.set_xticks(_INTERVALS, [str(every) for every in _INTERVALS])
    axes.set_xlabel("steps between two choices of A and B")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(frameon=False, title="fwd/bwd")
    save(figure, path)
    return "Test accuracy against the interval between refreshes: mean ± standard deviation."


STUDY = Study(
    name="table6",
    title="Table 6: how often A and B are chosen",
    question="Is it enough to choose A and B at every hundredth step?",
    columns=("fwd", "bwd", "refresh every"),
    rows=_rows,
    claims=(
        Claim(
            "0.8/0.5: every 100 steps is better than each step, by 0.1 points in the paper",
            ("0.8", "0.5", "100"),
            ("0.8", "0.5", "1"),
        ),
        Claim("0.9/0.8: the same, by 0.15 points", ("0.9", "0.8", "100"), ("0.9", "0.8", "1")),
        Claim(
            "0.95/0.9: each step is better than every 100 steps, by 0.04 points",
            ("0.95", "0.9", "1"),
            ("0.95", "0.9", "100"),
        ),
    ),
    published=(
        Published(
            "Jayakumar et al. (2020), table 6: top-1 accuracy (%) of ResNet-50 on ImageNet in "
            "32,000 steps; N is the interval.",
            ("fwd", "bwd", "N = 1", "N = 100"),
            (
                ("0.8", "0.5", "75.03", "75.14"),
                ("0.9", "0.8", "73.03", "73.18"),
                ("0.95", "0.9", "70.42", "70.38"),
            ),
        ),
    ),
    plots={"interval.png": _plot},
    notes=(
        "A hundred steps are 0.3 % of the paper's runs. Compare them with the same share of the "
        "steps here rather than with the same number."
    ),
    shows_time=True,
)
