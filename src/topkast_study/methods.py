"""The settings of each method: one table, in shares of the number of steps; none is tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from topkast.methods import (
    ACDC,
    DNW,
    GSE,
    IHT,
    SET,
    SMET,
    GradualPruning,
    GraNet,
    Method,
    Mixed,
    Random,
    RigL,
    Static,
    TopKAST,
)
from topkast_study.runs import Run

UNTIL = 0.75  # share of the steps after which nothing is replaced, and pruning ends
REFRESHES = 40  # of methods that do not refresh at each step


@dataclass(frozen=True)
class Entry:
    """A method, as all studies use it."""

    label: str
    colour: str
    build: Callable[[Run], Method | None]
    settings: str  # for the report
    every_step: bool = False  # whether the sets are chosen after each step

    def refresh_every(self, steps: int) -> int:
        return 1 if self.every_step else max(1, steps // REFRESHES)

    def bwd(self, fwd: float, bwd: float) -> float:
        """The backward sparsity: `bwd`, unless the method takes only one."""
        if self.label in ("static random", "SET", "SMET", "RigL", "GSE"):
            return fwd
        if self.label in ("dense", "gradual pruning", "GraNet", "AC/DC", "DNW", "IHT"):
            return 0.0
        return bwd


def _until(run: Run) -> int:
    return max(1, round(UNTIL * run.steps))


def _acdc(run: Run) -> ACDC:
    phase = 2 * run.refresh_every
    end = max(phase, round(0.85 * run.steps) // run.refresh_every * run.refresh_every)
    return ACDC(warm_up=2 * phase, sparse=phase, dense=phase, end=end)


METHODS = {
    "dense": Entry("dense", "#595959", lambda run: None, "all weights"),
    "topkast": Entry(
        "Top-KAST", "#0072B2", lambda run: TopKAST(), "each step; penalty 1e-4", every_step=True
    ),
    "random": Entry(
        "Top-KAST (random)",
        "#56B4E9",
        lambda run: Random(),
        "each step; penalty 1e-4; B∖A is drawn uniformly",
        every_step=True,
    ),
    "mixed": Entry(
        "Top-KAST (mixed)",
        "#3B8EA5",
        lambda run: Mixed(by_magnitude=run.by_magnitude),
        "each step; penalty 1e-4; a share of B∖A by magnitude, the rest drawn",
        every_step=True,
    ),
    "static": Entry("static random", "#E69F00", lambda run: Static(), "never"),
    "set": Entry("SET", "#D55E00", lambda run: SET(), "every 1/40 of the steps; replaces 0.3 of A"),
    "smet": Entry(
        "SMET",
        "#A6611A",
        lambda run: SMET(until=_until(run)),
        "every 1/40 of the steps; replaces 0.2 of A, falling to 0 at 75 %",
    ),
    "rigl": Entry(
        "RigL",
        "#009E73",
        lambda run: RigL(until=_until(run)),
        "every 1/40 of the steps; replaces 0.3 of A, falling to 0 at 75 %",
    ),
    "gse": Entry(
        "GSE",
        "#66A61E",
        lambda run: GSE(until=_until(run)),
        "every 1/40 of the steps; replaces 0.2 of A, falling to 0 at 75 %; samples \\|A\\| weights",
    ),
    "pruning": Entry(
        "gradual pruning",
        "#CC79A7",
        lambda run: GradualPruning(start=0, end=_until(run)),
        "every 1/40 of the steps; sparsity from 0 to its last value at 75 %",
    ),
    "granet": Entry(
        "GraNet",
        "#882255",
        lambda run: GraNet(start=0, end=max(1, run.steps // 2), until=_until(run)),
        "every 1/40 of the steps; sparsity from 0.5 to its last value at 50 %; replaces 0.5 of A, "
        "falling to 0 at 75 %",
    ),
    "acdc": Entry(
        "AC/DC",
        "#AA4499",
        _acdc,
        "a first phase of 10 %, then sparse and dense phases of 5 % each; sparse from 85 %",
    ),
    "dnw": Entry("DNW", "#332288", lambda run: DNW(), "each step", every_step=True),
    "iht": Entry(
        "IHT",
        "#7F7FBF",
        lambda run: IHT(end=max(1, run.steps // 2)),
        "each step; sparsity from 0 to its last value at 50 %",
        every_step=True,
    ),
}

RIVALS = tuple(name for name in METHODS if name not in ("dense", "topkast", "random", "mixed"))
