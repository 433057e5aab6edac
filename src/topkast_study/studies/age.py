"""Age: the correction of Adam's displacement for weights that enter B late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from topkast_study.methods import METHODS
from topkast_study.plots import make_figure, save
from topkast_study.scales import Scale
from topkast_study.study import Claim, Labels, Outcome, Row, Study

_SETTINGS = (("topkast", 1), ("topkast", 10), ("topkast", 100), ("random", 10), ("set", 10))
_SETTINGS_TOO = (("rigl", 10),)


def _labels(method: str, every: int, age: bool) -> Labels:
    return METHODS[method].label, str(every), "with" if age else "without"


def _rows(scale: Scale) -> list[Row]:
    return [
        Row(
            _labels(method, every, age),
            scale.images(method, 0.9, refresh_every=every, age=age),
        )
        for method, every in _SETTINGS + _SETTINGS_TOO
        for age in (True, False)
    ]


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    figure, (axes,) = make_figure(1)
    positions = np.arange(len(outcomes) // 2)[::-1]
    for offset, number, colour in ((0.12, 0, "#0072B2"), (-0.12, 1, "#D55E00")):
        here = outcomes[number::2]
        axes.errorbar(
            [outcome.mean for outcome in here],
            positions + offset,
            xerr=[outcome.deviation for outcome in here],
            fmt="o",
            capsize=3,
            color=colour,
            label=f"{here[0].row.labels[2]} age",
        )
    names = [f"{o.row.labels[0]}, every {o.row.labels[1]}" for o in outcomes[::2]]
    axes.set_yticks(positions, names)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test accuracy (%)")
    axes.legend(frameon=False)
    save(figure, path)
    return "Test accuracy with and without age: mean and standard deviation over seeds."


STUDY = Study(
    name="age",
    title="Age: weights that enter B late",
    question=(
        "Adam would move a weight that enters B late by up to 6.6 learning rates in one step. The "
        "library scales its displacement by its age. Does this help in a short run?"
    ),
    columns=("method", "refresh every", "age"),
    rows=_rows,
    claims=tuple(
        Claim(
            f"{METHODS[method].label}, every {every}: age helps",
            _labels(method, every, True),
            _labels(method, every, False),
        )
        for method, every in _SETTINGS + _SETTINGS_TOO
    ),
    plots={"age.png": _plot},
    notes=(
        "The paper trains images with SGD and does not discuss this; the orderings are what the "
        "library's design expects. Forward sparsity 0.9; backward 0.8 of Top-KAST, 0.9 of SET and "
        "RigL."
    ),
)
