"""The formula and the settings of a method of :mod:`topkast.methods`."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from topkast._errors import OptionError
from topkast._method import Method
from topkast.methods import (
    ACDC,
    DNW,
    DSR,
    GSE,
    IHT,
    ITOP,
    SET,
    SMET,
    SNFS,
    SNIP,
    DeepRewiring,
    GradualPruning,
    GraNet,
    Mixed,
    Random,
    RigL,
    Static,
    TopKAST,
)

_FORMULAS: dict[type[Method], str] = {
    ACDC: "acdc",
    DNW: "dnw",
    DSR: "dsr",
    DeepRewiring: "deepr",
    GSE: "gse",
    GraNet: "granet",
    GradualPruning: "gmp",
    IHT: "iht",
    ITOP: "rigl",
    Mixed: "topkast",
    Random: "topkast",
    RigL: "rigl",
    SET: "set",
    SMET: "smet",
    SNFS: "snfs",
    SNIP: "snip",
    Static: "static",
    TopKAST: "topkast",
}


def describe_method(
    method: Any, steps: int | None, refresh_every: int | None
) -> tuple[Any, dict[str, Any]]:
    """The name of a method's formula, and the arguments of ``cost`` that follow from the method.

    A name stays as it is. ``"linear"`` are the end of a linear schedule and the sparsity at its
    start, ``"cubic"`` the start, the end and the first sparsity of a cubic one. `steps` and
    `refresh_every` are arguments of ``cost``.

    Raises :class:`topkast.OptionError` for a method without a formula.
    """
    if not isinstance(method, Method):
        return method, {}
    if type(method) not in _FORMULAS:
        raise OptionError(
            f"{type(method).__name__} has no formula: pass the name of a method with the same "
            "products, such as method='set' for products with A alone"
        )
    settings: dict[str, Any] = {"refresh_every": method.default_refresh_every}
    if isinstance(method, GradualPruning):
        settings["cubic"] = method.start, method.end, method.initial
    if isinstance(method, GSE):
        settings["sample_ratio"] = method.samples
    if isinstance(method, ACDC):
        settings["dense_share"] = method.dense / (method.dense + method.sparse)
        if steps is not None:
            interval = refresh_every or method.default_refresh_every
            settings["dense_share"] = float(_dense_share(method, steps, interval))
    if isinstance(method, IHT) and method.end:
        settings["linear"] = method.end, method.initial
    return _FORMULAS[type(method)], settings


def _dense_share(method: ACDC, steps: int, interval: int) -> Fraction:
    """Share of the steps in dense phases, the first and the last phase included."""
    dense = sum(
        min(interval, steps - update)
        for update in range(0, min(steps, method.end), interval)
        if not method.is_sparse(update)
    )
    return Fraction(dense, steps)
