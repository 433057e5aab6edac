"""Table 5: characters, against gradual pruning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkast_study.methods import METHODS
from topkast_study.plots import make_figure, plot_series, save, style_of
from topkast_study.scales import Scale
from topkast_study.study import Claim, Labels, Outcome, Published, Row, Study

_PAIRS = ((0.8, 0.0), (0.8, 0.6), (0.9, 0.0), (0.9, 0.8), (0.95, 0.0), (0.95, 0.9))


def _labels(method: str, fwd: float, bwd: float) -> Labels:
    return METHODS[method].label, f"{fwd:g}", f"{bwd:g}"


def _rows(scale: Scale) -> list[Row]:
    rows = [Row(_labels("dense", 0, 0), scale.text("dense"))]
    for fwd, bwd in _PAIRS:
        if bwd == 0:
            rows.append(Row(_labels("pruning", fwd, 0), scale.text("pruning", fwd)))
        rows.append(Row(_labels("topkast", fwd, bwd), scale.text("topkast", fwd, bwd)))
    return rows


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    figure, (axes,) = make_figure(1)
    dense, *others = outcomes
    axes.axhline(dense.mean, color="#595959", linestyle=":", label="dense")
    for label, method, is_dense, dashes in (
        ("gradual pruning", "pruning", True, "solid"),
        ("Top-KAST, bwd 0", "topkast", True, "solid"),
        ("Top-KAST, bwd 0.6, 0.8, 0.9", "topkast", False, "dashed"),
    ):
        here = [
            outcome
            for outcome in others
            if outcome.row.run.method == method and (outcome.row.run.bwd == 0) is is_dense
        ]
        x = [outcome.row.run.fwd for outcome in here]
        plot_series(axes, x, here, label=label, linestyle=dashes, **style_of(method))
    axes.set_xlabel("forward sparsity")
    axes.set_ylabel("validation loss (bits per character)")
    axes.legend(frameon=False)
    save(figure, path)
    return "Validation loss against the forward sparsity: mean ± standard deviation."


STUDY = Study(
    name="table5",
    title="Table 5: characters, against gradual pruning",
    question=(
        "On text, how does Top-KAST compare with gradual magnitude pruning, which needs all "
        "weights in training?"
    ),
    columns=("method", "fwd", "bwd"),
    rows=_rows,
    claims=(
        *(
            Claim(
                f"fwd {fwd:g}: gradual pruning is better than Top-KAST with bwd 0",
                _labels("pruning", fwd, 0),
                _labels("topkast", fwd, 0),
            )
            for fwd in (0.8, 0.9, 0.95)
        ),
        *(
            Claim(
                f"fwd {fwd:g}: Top-KAST with bwd 0 is better than with bwd {bwd:g}",
                _labels("topkast", fwd, 0),
                _labels("topkast", fwd, bwd),
            )
            for fwd, bwd in _PAIRS
            if bwd
        ),
        Claim("0.8/0 is better than 0.9/0", _labels("topkast", 0.8, 0), _labels("topkast", 0.9, 0)),
        Claim(
            "0.9/0 is better than 0.95/0", _labels("topkast", 0.9, 0), _labels("topkast", 0.95, 0)
        ),
    ),
    published=(
        Published(
            "Jayakumar et al. (2020), table 5: bits per character of a Transformer-XL on enwik8.",
            ("fwd", "bwd", "parameters", "pruning", "Top-KAST"),
            (
                ("0", "0", "69 M", "1.00", "1.00"),
                ("0.8", "0", "14 M", "1.02", "1.03"),
                ("0.8", "0.6", "14 M", "–", "1.05"),
                ("0.9", "0", "7 M", "1.06", "1.08"),
                ("0.9", "0.8", "7 M", "–", "1.10"),
                ("0.95", "0", "1.4 M", "1.13", "1.14"),
                ("0.95", "0.9", "1.4 M", "–", "1.17"),
            ),
        ),
    ),
    plots={"text.png": _plot},
)
