"""Table 1: how B∖A is chosen, how long it is trained, and the rivals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkast_study.methods import METHODS, RIVALS
from topkast_study.plots import make_figure, plot_bars, save
from topkast_study.scales import Scale
from topkast_study.study import Claim, Labels, Outcome, Published, Row, Study

# Steps after which B∖A is not trained, as shares of the run; those of the paper out of 32,000.
_UNTIL = {"0": 0.0, "5/32": 5 / 32, "1/2": 0.5, "1": 1.0}


def _labels(method: str, fwd: float, bwd: float, until: str = "1") -> Labels:
    return METHODS[method].label, f"{fwd:g}", f"{bwd:g}", until


def _rows(scale: Scale) -> list[Row]:
    rows = [Row(_labels("dense", 0, 0), scale.images("dense"))]
    for fwd in scale.sparsities:
        for method in ("topkast", "random", *RIVALS):
            run = scale.images(method, fwd)
            rows.append(Row(_labels(method, fwd, run.bwd), run))
    for name, share in _UNTIL.items():
        until = None if share == 1 else round(share * scale.steps)
        run = scale.images("topkast", 0.9, 0.0, explore_until=until)
        rows.append(Row(_labels("topkast", 0.9, 0, name), run))
    return rows


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    dense = outcomes[0]
    pairs = [
        outcome
        for outcome in outcomes[1:]
        if not (outcome.row.run.method == "topkast" and outcome.row.run.bwd == 0)
    ]
    sparsities = sorted({outcome.row.run.fwd for outcome in pairs})
    figure, plots = make_figure(len(sparsities), height=4.4)
    for axes, fwd in zip(plots, sparsities, strict=True):
        here = [outcome for outcome in pairs if outcome.row.run.fwd == fwd]
        plot_bars(axes, here, [outcome.row.labels[0] for outcome in here])
        axes.axvline(dense.mean, color="#595959", linestyle=":", label="dense")
        axes.set_title(f"forward sparsity {fwd:g}", fontsize=11)
        axes.set_xlabel("test accuracy (%)")
        axes.legend(frameon=False, loc="lower left")
    save(figure, path)
    return (
        "Test accuracy after the last step: mean and standard deviation over seeds; the dotted "
        "line is the dense network."
    )


_TOPKAST, _RANDOM = ("Top-KAST", "Top-KAST (random)")

STUDY = Study(
    name="table1",
    title="Table 1: Top-KAST, its ablations, and its rivals",
    question=(
        "Is B∖A better chosen by magnitude or at random? Does training B∖A help, and for how "
        "long? How do other methods do at the same sparsity?"
    ),
    columns=("method", "fwd", "bwd", "B∖A trained in"),
    rows=_rows,
    claims=(
        Claim(
            "0.9/0.8: B∖A at random is better than by magnitude",
            (_RANDOM, "0.9", "0.8", "1"),
            (_TOPKAST, "0.9", "0.8", "1"),
        ),
        Claim(
            "0.95/0.9: B∖A by magnitude is better than at random",
            (_TOPKAST, "0.95", "0.9", "1"),
            (_RANDOM, "0.95", "0.9", "1"),
        ),
        *(
            Claim(
                f"0.9/0: training B∖A for {longer} of the run is better than for {shorter}",
                (_TOPKAST, "0.9", "0", longer),
                (_TOPKAST, "0.9", "0", shorter),
            )
            for shorter, longer in (("0", "5/32"), ("5/32", "1/2"), ("1/2", "1"))
        ),
        *(
            Claim(
                f"{fwd}/{bwd}: Top-KAST is better than {rival}",
                (_TOPKAST, fwd, bwd, "1"),
                (rival, fwd, fwd, "1"),
            )
            for fwd, bwd in (("0.9", "0.8"), ("0.95", "0.9"))
            for rival in ("static random", "SET")
        ),
    ),
    published=(
        Published(
            "Jayakumar et al. (2020), table 1: ResNet-50 on ImageNet; t is the step, of 32,000, "
            "after which B∖A is not trained.",
            ("method", "fwd", "bwd", "top-1 accuracy (%)"),
            (
                ("Top-KAST", "0.9", "0.8", "73.03"),
                ("Top-KAST (random)", "0.9", "0.8", "74.76"),
                ("Top-KAST", "0.95", "0.9", "70.42"),
                ("Top-KAST (random)", "0.95", "0.9", "68.48"),
                ("Top-KAST (t = 0)", "0.9", "0", "68.26"),
                ("Top-KAST (t = 5000)", "0.9", "0", "72.05"),
                ("Top-KAST (t = 16000)", "0.9", "0", "74.14"),
                ("Top-KAST (t = 32000)", "0.9", "0", "74.65"),
            ),
        ),
    ),
    plots={"methods.png": _plot},
    shows_time=True,
)
