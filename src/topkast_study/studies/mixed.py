"""The share of B∖A that is chosen by magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkast_study.plots import make_figure, plot_series, save
from topkast_study.scales import PAIRS, Scale
from topkast_study.study import Claim, Outcome, Published, Row, Study

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def _rows(scale: Scale) -> list[Row]:
    return [
        Row(
            (f"{fwd:g}", f"{PAIRS[fwd]:g}", f"{share:g}"),
            scale.images("mixed", fwd, by_magnitude=share),
        )
        for fwd in (*scale.sparsities, 0.99)
        for share in _SHARES
    ]


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    sparsities = sorted({outcome.row.run.fwd for outcome in outcomes})
    figure, plots = make_figure(len(sparsities), height=3.4)
    for axes, fwd in zip(plots, sparsities, strict=True):
        here = [outcome for outcome in outcomes if outcome.row.run.fwd == fwd]
        plot_series(axes, _SHARES, here, label="", color="#0072B2", marker="o")
        axes.set_title(f"{fwd:g}/{PAIRS[fwd]:g}", fontsize=11)
        axes.set_xlabel("share of B∖A by magnitude")
        axes.set_ylabel("test accuracy (%)")
    save(figure, path)
    return (
        "Test accuracy against the share of B∖A that is chosen by magnitude, the rest being drawn: "
        "mean ± standard deviation. The scales differ."
    )


STUDY = Study(
    name="mixed",
    title="B∖A by magnitude, at random, or both",
    question=(
        "The paper's random B∖A wins at 0.9/0.8 and loses at 0.95/0.9. Does a mixture do as well "
        "as the better of the two?"
    ),
    columns=("fwd", "bwd", "share by magnitude"),
    rows=_rows,
    claims=(
        Claim(
            "0.9/0.8: at random is better than by magnitude",
            ("0.9", "0.8", "0"),
            ("0.9", "0.8", "1"),
        ),
        Claim(
            "0.95/0.9: by magnitude is better than at random",
            ("0.95", "0.9", "1"),
            ("0.95", "0.9", "0"),
        ),
    ),
    published=(
        Published(
            "Jayakumar et al. (2020), table 1: top-1 accuracy (%) of ResNet-50 on ImageNet. It has "
            "no mixtures.",
            ("fwd", "bwd", "at random (share 0)", "by magnitude (share 1)"),
            (("0.9", "0.8", "74.76", "73.03"), ("0.95", "0.9", "68.48", "70.42")),
        ),
    ),
    plots={"mixed.png": _plot},
)
