"""Figure 2: accuracy against the operations of training, and against its time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullFormatter

from topkast_study.methods import METHODS, RIVALS
from topkast_study.plots import make_figure, save, style_of
from topkast_study.scales import Scale
from topkast_study.study import Claim, Labels, Outcome, Published, Row, Study

_TICKS = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]


def _labels(method: str, fwd: float, bwd: float, multiple: int) -> Labels:
    return METHODS[method].label, f"{fwd:g}", f"{bwd:g}", f"{multiple}×"


def _rows(scale: Scale) -> list[Row]:
    rows = []
    for multiple in scale.multiples:
        run = scale.images("dense", multiple=multiple)
        rows.append(Row(_labels("dense", 0, 0, multiple), run))
        for fwd in scale.wide_sparsities:
            for method in ("topkast", "random", *RIVALS):
                run = scale.images(method, fwd, multiple=multiple)
                rows.append(Row(_labels(method, fwd, run.bwd, multiple), run))
            if fwd == 0.8:
                for bwd in (0.8, 0.0):
                    run = scale.images("topkast", fwd, bwd, multiple=multiple)
                    rows.append(Row(_labels("topkast", fwd, bwd, multiple), run))
    return rows


def _flops(outcome: Outcome) -> float:
    return statistics.mean(result.flops for result in outcome.results)


def _seconds(outcome: Outcome) -> float:
    return min(result.seconds for result in outcome.results)


def _plot_flops(path: Path, outcomes: Sequence[Outcome]) -> str:
    _plot(path, outcomes, seconds=False)
    return (
        "Test accuracy against the operations of training, as a multiple of those of dense "
        "training. Hollow marks: twice the steps; lines join a method's two lengths. The dashed "
        "line is the dense network."
    )


def _plot_seconds(path: Path, outcomes: Sequence[Outcome]) -> str:
    _plot(path, outcomes, seconds=True)
    return (
        "The same against the processor time of training. With masked products on layers this "
        "small, sparsity saves no time: this shows what each method adds to a dense step."
    )


def _plot(path: Path, outcomes: Sequence[Outcome], *, seconds: bool) -> None:
    sparsities = sorted({o.row.run.fwd for o in outcomes if o.row.run.method != "dense"})
    dense = next(o for o in outcomes if o.row.run.method == "dense")
    figure, plots = make_figure(len(sparsities), height=4.6)
    handles = {}
    for axes, fwd in zip(plots, sparsities, strict=True):
        here = [o for o in outcomes if o.row.run.fwd == fwd and o.row.run.method != "dense"]
        for method, bwd in dict.fromkeys((o.row.run.method, o.row.run.bwd) for o in here):
            own = [o for o in here if (o.row.run.method, o.row.run.bwd) == (method, bwd)]
            x = [(_seconds if seconds else _flops)(outcome) for outcome in own]
            y = [outcome.mean for outcome in own]
            style, hollow = style_of(method), {"markerfacecolor": "white"}
            axes.plot(x, y, color=style["color"], linewidth=0.8, alpha=0.6)
            for number, point in enumerate(zip(x, y, strict=True)):
                face: dict[str, Any] = hollow if number else {}
                (line,) = axes.plot(*point, linestyle="none", markersize=7, **style, **face)
                if not number:
                    handles[METHODS[method].label] = line
            if method == "topkast" and fwd == 0.8:
                axes.annotate(
                    f"bwd {bwd:g}",
                    (x[0], y[0]),
                    fontsize=7,
                    xytext=(5, -9),
                    textcoords="offset points",
                )
        axes.axhline(dense.mean, color="#595959", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks([tick for tick in _TICKS if low <= tick <= high], minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"forward sparsity {fwd:g}", fontsize=11)
        axes.set_xlabel(
            "processor time of training (s)" if seconds else "operations ÷ dense training's"
        )
    plots[0].set_ylabel("test accuracy (%)")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=7,
        frameon=False,
        fontsize=8,
    )
    save(figure, path)


_RIVALS_IN_CLAIMS = (("static random", "0.8"), ("SET", "0.8"))

STUDY = Study(
    name="figure2",
    title="Figure 2: accuracy against operations and time of training",
    question=(
        "What does each method reach for the operations that it takes, at several sparsities and "
        "for one and two times the steps? And for the time? (Reviews 2 and 4: operations are not "
        "time.)"
    ),
    columns=("method", "fwd", "bwd", "steps"),
    rows=_rows,
    claims=(
        *(
            Claim(
                f"0.8, {steps} steps: Top-KAST (bwd 0.5) is better than {rival}",
                ("Top-KAST", "0.8", "0.5", steps),
                (rival, "0.8", bwd, steps),
            )
            for steps in ("1×", "2×")
            for rival, bwd in _RIVALS_IN_CLAIMS
        ),
        Claim(
            "0.8: RigL is better than Top-KAST (bwd 0.8)",
            ("RigL", "0.8", "0.8", "1×"),
            ("Top-KAST", "0.8", "0.8", "1×"),
        ),
        Claim(
            "0.8: twice the steps are better for Top-KAST (bwd 0.5)",
            ("Top-KAST", "0.8", "0.5", "2×"),
            ("Top-KAST", "0.8", "0.5", "1×"),
        ),
        *(
            Claim(
                f"{fwd}: Top-KAST (bwd {bwd}) is better than RigL",
                ("Top-KAST", fwd, bwd, "1×"),
                ("RigL", fwd, fwd, "1×"),
            )
            for fwd, bwd in (("0.98", "0.95"), ("0.99", "0.95"))
        ),
    ),
    published=(
        Published(
            "Jayakumar et al. (2020), figure 2 and section 4, in words: the figure's numbers are "
            "not printed. ResNet-50 on ImageNet.",
            ("forward sparsity", "what the figure shows"),
            (
                ("0.8", "Top-KAST is better than SET and static random patterns"),
                ("0.8", "Top-KAST is comparable with pruning at equal operations"),
                ("0.8", "RigL is the best of the other sparse methods; Top-KAST is comparable"),
                ("0.98, 0.99", "Top-KAST is better than RigL"),
            ),
        ),
    ),
    plots={"operations.png": _plot_flops, "time.png": _plot_seconds},
    notes=(
        "Review 2 reads figure 2a otherwise than the paper's text: RigL is more accurate at two "
        "numbers of operations. The fifth ordering is that reading."
    ),
    shows_time=True,
)
