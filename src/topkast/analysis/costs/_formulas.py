"""Training FLOPs of sparse-training methods: one formula for each, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple


class Products(NamedTuple):
    """FLOPs of one product of a layer, for one sample.

    Attributes
    ----------
    active
        With the weights of A: f_A, or f_S of methods with one set; the mean over the steps if A
        changes in size.
    trained
        With the weights of B: f_B.
    dense
        With all weights: f_D.
    """

    active: Fraction
    trained: Fraction
    dense: Fraction


class Schedule(NamedTuple):
    """What formulas depend on besides the layers."""

    interval: int  # ΔT, steps between two refreshes
    sample_ratio: Fraction  # γ, positions that GSE samples for each weight of A
    dense_share: Fraction  # of AC/DC's steps in dense phases


def _dense(f: Products, schedule: Schedule) -> Fraction:
    return 3 * f.dense


def _sparse(f: Products, schedule: Schedule) -> Fraction:
    return 3 * f.active


def _dense_at_refresh(f: Products, schedule: Schedule) -> Fraction:
    interval = schedule.interval
    return (3 * f.active * interval + 2 * f.active + f.dense) / (interval + 1)


def _dense_gradient(f: Products, schedule: Schedule) -> Fraction:
    return 2 * f.active + f.dense


def _two_sets(f: Products, schedule: Schedule) -> Fraction:
    return 2 * f.active + f.trained


def _sampled(f: Products, schedule: Schedule) -> Fraction:
    return 3 * f.active + schedule.sample_ratio * f.active / schedule.interval


def _phases(f: Products, schedule: Schedule) -> Fraction:
    share = schedule.dense_share
    return share * 3 * f.dense + (1 - share) * 3 * f.active


@dataclass(frozen=True)
class Formula:
    """The cost of a method.

    Attributes
    ----------
    text
        The formula for FLOPs per step and sample.
    training
        The same as a function of the products of one layer.
    trains
        The weights that have a gradient and optimizer state: those of B, those of A alone, or all.
    keeps_resting
        Whether weights outside that set keep their values.
    interval
        Default of ΔT, for formulas with it.
    initial
        Default sparsity at the start of a cubic schedule; None: the sparsity is constant.
    window
        Default start and end of the schedule, as shares of the steps.
    has_dense_phases
        Whether all weights are in A for some of the steps.
    holds
        The weights that the library holds with their state, if these are not those that it trains:
        all, of methods that prune, or A alone.
    has_momentum
        Whether a running mean of the gradient of all weights is held.
    """

    text: str
    training: Callable[[Products, Schedule], Fraction]
    trains: Literal["A", "B", "all"] = "A"
    keeps_resting: bool = False
    interval: int = 1
    initial: float | None = None
    window: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))
    has_dense_phases: bool = False
    holds: Literal["A", "all"] | None = None
    has_momentum: bool = False


_STATIC = Formula("3 f_S", _sparse)
# Of a fixed random mask whose B is larger than A.
STATIC_WITH_TWO_SETS = Formula("2 f_A + f_B", _two_sets, "B")
_RIGL = Formula("(3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1)", _dense_at_refresh, interval=100)
# RigL prunes ResNet-50 from step 10,000 to step 25,000 of 32,000, at every 1,000th step.
_PRUNING = {
    "keeps_resting": True,
    "interval": 1000,
    "initial": 0.0,
    "window": (Fraction(10, 32), Fraction(25, 32)),
    "holds": "all",
}

FORMULAS = {
    "dense": Formula("3 f_D", _dense, "all"),
    "topkast": Formula("2 f_A + f_B", _two_sets, "B", keeps_resting=True),
    "static": _STATIC,
    "set": _STATIC,
    "deepr": _STATIC,
    "dsr": _STATIC,
    "snip": _STATIC,
    "mest": _STATIC,
    "smet": _STATIC,
    "rigl": _RIGL,
    "srigl": _RIGL,
    "granet": Formula(
        _RIGL.text,
        _dense_at_refresh,
        interval=4000,
        initial=0.5,
        window=(Fraction(0), Fraction(3, 10)),
        holds="all",
    ),
    "gse": Formula("3 f_S + γ f_S / ΔT", _sampled, interval=1000),
    "snfs": Formula("2 f_S + f_D", _dense_gradient, "all", holds="A", has_momentum=True),
    "dnw": Formula("2 f_S + f_D", _dense_gradient, "all", keeps_resting=True),
    "iht": Formula("2 f_S + f_D", _dense_gradient, "all"),
    "acdc": Formula("3 (p f_D + (1 - p) f_S)", _phases, has_dense_phases=True),
    "gmp": Formula("3 f_S", _sparse, **_PRUNING),  # type: ignore[arg-type]
    "gmp_dense_gradient": Formula("2 f_S + f_D", _dense_gradient, **_PRUNING),  # type: ignore[arg-type]
}
