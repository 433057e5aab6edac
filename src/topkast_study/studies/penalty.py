"""The exploration penalty: its coefficient, kind, and ratio of A to B∖A."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkast_study.plots import make_figure, plot_series, save
from topkast_study.scales import Scale
from topkast_study.study import Claim, Labels, Outcome, Row, Study

_COEFFICIENTS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
_RATIOS = (0.0, 1.0, 10.0, 100.0)
_FWD, _BWD = 0.9, 0.8
_STRONG = 1e-3  # the coefficient at which the ratio is varied


def _labels(kind: str, penalty: float, ratio: str) -> Labels:
    return kind, f"{penalty:g}", ratio


def _rows(scale: Scale) -> list[Row]:
    rows = []
    for kind in ("l2", "l1"):
        for penalty in _COEFFICIENTS:
            if penalty or kind == "l2":
                run = scale.images("topkast", _FWD, _BWD, penalty=penalty, penalty_kind=kind)
                rows.append(Row(_labels(kind, penalty, "1/D"), run))
    for ratio in _RATIOS:
        run = scale.images("topkast", _FWD, _BWD, penalty=_STRONG, ratio=ratio)
        rows.append(Row(_labels("l2", _STRONG, f"{ratio:g}"), run))
    return rows


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    figure, (left, middle, right) = make_figure(3, height=3.4)
    usual = [outcome for outcome in outcomes if outcome.row.run.ratio is None]
    for kind, colour in (("l2", "#0072B2"), ("l1", "#D55E00")):
        here = [o for o in usual if o.row.run.penalty and o.row.run.penalty_kind == kind]
        x = [float(o.row.run.penalty or 0) for o in here]
        plot_series(left, x, here, label=kind, color=colour, marker="o")
        changes = [100 * sum(r.mask_change for r in o.results) / len(o.results) for o in here]
        middle.plot(x, changes, color=colour, marker="o", label=kind)
    left.axhline(usual[0].mean, color="#595959", linestyle=":", label="no penalty")
    without = [100 * result.mask_change for result in usual[0].results]
    middle.axhline(sum(without) / len(without), color="#595959", linestyle=":", label="no penalty")
    for axes in (left, middle):
        axes.set_xscale("log")
        axes.set_xlabel("penalty λ")
        axes.legend(frameon=False)
    left.set_ylabel("test accuracy (%)")
    left.set_ylim(bottom=max(0.0, usual[0].mean - 10))
    middle.set_yscale("symlog", linthresh=0.1)
    middle.set_ylim(bottom=0)
    middle.set_ylabel("share of A that enters\nat a refresh (%)")
    ratios = [outcome for outcome in outcomes if outcome.row.run.ratio is not None]
    plot_series(right, range(len(ratios)), ratios, label="", color="#0072B2", marker="o")
    right.set_xticks(range(len(ratios)), [o.row.labels[2] for o in ratios])
    right.set_xlabel(f"ratio of B∖A to A (l2, λ = {_STRONG:g}); 1/D is 10")
    right.set_ylabel("test accuracy (%)")
    save(figure, path)
    return (
        f"{_FWD:g}/{_BWD:g}: test accuracy and the mean mask change against λ, and test accuracy "
        "against the weight of the penalty on B∖A: mean ± standard deviation. Accuracies "
        "below the axis are in the table."
    )


STUDY = Study(
    name="penalty",
    title="The exploration penalty",
    question=(
        "What does the exploration penalty do? (Review 4: it is introduced and then never "
        "mentioned again.) λ, l1 against l2, and its weight on B∖A, which the paper sets to 1/D."
    ),
    columns=("kind", "λ", "weight on B∖A"),
    rows=_rows,
    claims=(
        Claim(
            "l2 with λ = 1e-4 is better than no penalty",
            ("l2", "0.0001", "1/D"),
            ("l2", "0", "1/D"),
        ),
        Claim(
            "l2, λ = 1e-3: weight 1/D = 10 on B∖A is better than weight 1",
            ("l2", "0.001", "10"),
            ("l2", "0.001", "1"),
        ),
    ),
    plots={"penalty.png": _plot},
    shows_change=True,
    notes=(
        "The paper has no figures for this; both orderings are what section 2.3 argues. Its text "
        "says L2, its formula shows l1 (|θ|), and its pseudocode l2. D = 0.1, so weight 10 and "
        "1/D are the same penalty, added by the study and by the library; rounding may differ."
    ),
)
