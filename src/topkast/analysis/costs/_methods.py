"""The formula and the settings of a method of :mod:`topkast.methods`."""

from __future__ import annotations

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


def describe_method(method: Any) -> tuple[Any, dict[str, Any]]:
    """The name of a method's formula, and the arguments of ``cost`` that follow from the method.

    A name stays as it is. Raises :class:`topkast.OptionError` for a method without a formula.
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
        settings |= {"window": (method.start, method.end), "initial": method.initial}
    if isinstance(method, GSE):
        settings["sample_ratio"] = method.samples
    if isinstance(method, ACDC):
        settings["dense_share"] = method.dense / (method.dense + method.sparse)
    return _FORMULAS[type(method)], settings
