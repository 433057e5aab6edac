"""The backward sparsity, at equal forward sparsity and at equal operations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkast_study.plots import make_figure, plot_series, save
from topkast_study.scales import Scale
from topkast_study.study import Claim, Labels, Outcome, Published, Row, Study

_BACKWARD = {0.9: (0.9, 0.8, 0.6, 0.3, 0.0), 0.95: (0.95, 0.9, 0.8, 0.5, 0.0)}
# Forward and backward sparsities of equal (2D + (D + M)) / 3: less forward for more backward.
_EQUAL = ((0.88, 0.88), (0.9, 0.84), (0.92, 0.8), (0.94, 0.76))


def _labels(fwd: float, bwd: float, method: str = "Top-KAST") -> Labels:
    return method, f"{fwd:g}", f"{bwd:g}"


def _rows(scale: Scale) -> list[Row]:
    pairs = [(fwd, bwd) for fwd, choices in _BACKWARD.items() for bwd in choices]
    rows = [Row(_labels(*pair), scale.images("topkast", *pair)) for pair in (*pairs, *_EQUAL)]
    random = ((0.9, 0.8), (0.95, 0.9), (0.95, 0.8))
    return rows + [
        Row(_labels(*pair, "Top-KAST (random)"), scale.images("random", *pair)) for pair in random
    ]


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    figure, (left, right) = make_figure(2, height=3.8)
    by_labels = {outcome.row.labels: outcome for outcome in outcomes}
    for (fwd, choices), colour in zip(_BACKWARD.items(), ("#0072B2", "#D55E00"), strict=True):
        here = [by_labels[_labels(fwd, bwd)] for bwd in choices]
        plot_series(left, choices, here, label=f"fwd {fwd:g}", color=colour, marker="o")
    left.invert_xaxis()
    left.set_xlabel("backward sparsity, denser to the right")
    left.set_ylabel("test accuracy (%)")
    left.legend(frameon=False)
    equal = [by_labels[_labels(*pair)] for pair in _EQUAL]
    plot_series(right, range(len(equal)), equal, label="", color="#0072B2", marker="o")
    right.set_xticks(range(len(equal)), [f"{fwd:g}/{bwd:g}" for fwd, bwd in _EQUAL])
    right.set_xlabel("fwd/bwd at equal operations")
    right.set_ylabel("test accuracy (%)")
    save(figure, path)
    return (
        "Left: test accuracy against the backward sparsity. Right: pairs that take equally many "
        "operations of training. Mean ± standard deviation."
    )


STUDY = Study(
    name="bwd",
    title="The backward sparsity",
    question=(
        "How should bwd be chosen? (Review 2, which also asks for 0.95/0.8.) Is a denser backward "
        "pass worth its operations, or are they better spent on a denser forward pass?"
    ),
    columns=("method", "fwd", "bwd"),
    rows=_rows,
    claims=(
        Claim("0.9/0.8 is better than 0.9/0.9", _labels(0.9, 0.8), _labels(0.9, 0.9)),
        Claim("0.9/0 is better than 0.9/0.8", _labels(0.9, 0.0), _labels(0.9, 0.8)),
        Claim("0.95/0.9 is better than 0.95/0.95", _labels(0.95, 0.9), _labels(0.95, 0.95)),
        Claim("0.95/0.8 is better than 0.95/0.9", _labels(0.95, 0.8), _labels(0.95, 0.9)),
        Claim(
            "0.95/0.8: by magnitude is better than at random",
            _labels(0.95, 0.8),
            _labels(0.95, 0.8, "Top-KAST (random)"),
        ),
        Claim(
            "at equal operations, 0.9/0.84 is better than 0.88/0.88",
            _labels(0.9, 0.84),
            _labels(0.88, 0.88),
        ),
        Claim(
            "at equal operations, 0.94/0.76 is better than 0.9/0.84",
            _labels(0.94, 0.76),
            _labels(0.9, 0.84),
        ),
    ),
    published=(
        Published(
            "Jayakumar et al. (2020), table 1: top-1 accuracy (%) of ResNet-50 on ImageNet. "
            "Without training B∖A, 0.9/0 has 68.26.",
            ("fwd", "bwd", "top-1 accuracy (%)"),
            (("0.9", "0.8", "73.03"), ("0.9", "0", "74.65"), ("0.95", "0.9", "70.42")),
        ),
    ),
    plots={"backward.png": _plot},
    notes=(
        "The fourth to seventh orderings are questions of the reviews and of this study: the paper "
        "has no figures for them."
    ),
)
