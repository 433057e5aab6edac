"""The arguments of :func:`topkast.cost`, checked and completed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from fractions import Fraction
from numbers import Real
from typing import Any

from topkast._errors import OptionError
from topkast._options import Options, Overrides
from topkast.analysis.costs._formulas import FORMULAS, STATIC_WITH_TWO_SETS, Formula
from topkast.analysis.costs._layers import is_count
from topkast.analysis.costs._schedule import (
    at_refreshes,
    mean_remaining,
    stretches,
    while_pruning,
)
from topkast.selection._distribution import exact_fraction


def find_formula(
    method: Any, fwd: float | None, bwd: float | None, overrides: Overrides
) -> Formula:
    """The formula of a method; raises :class:`topkast.OptionError` for an unknown name."""
    if isinstance(method, str) and method in FORMULAS:
        two_sets = method == "static" and _has_two_sets(fwd, bwd, overrides)
        return STATIC_WITH_TWO_SETS if two_sets else FORMULAS[method]
    names = ", ".join(map(repr, FORMULAS))
    close = get_close_matches(str(method).lower(), FORMULAS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(f"method={method!r} has no formula: expected one of {names}{hint}")


def _has_two_sets(fwd: float | None, bwd: float | None, overrides: Any) -> bool:
    """Whether B is larger than A, of all tensors or of some."""
    pairs = [(fwd, bwd)]
    if isinstance(overrides, Mapping):
        pairs += [
            (values.get("fwd", fwd), values.get("bwd", bwd))
            for values in overrides.values()
            if isinstance(values, Mapping)
        ]
    return any(backward not in (None, forward) for forward, backward in pairs)


def make_options(
    method: str,
    formula: Formula,
    *,
    fwd: float | None,
    bwd: float | None,
    dense: Any,
    overrides: Overrides,
    refresh_every: int | None,
    **options: Any,
) -> Options:
    """The options of :func:`topkast.wrap_optimizer` under which a method's sets have their sizes.

    Raises :class:`topkast.OptionError` for sparsities that are missing, or that a method lacks.
    """
    if method == "dense":
        if fwd is not None or bwd is not None or overrides:
            raise OptionError("method='dense' has no sparsity: leave fwd, bwd and overrides out")
        fwd, dense = 0.0, True
    if fwd is None:
        raise OptionError(f"method={method!r} needs fwd, the forward sparsity, such as fwd=0.9")
    if formula is STATIC_WITH_TWO_SETS and bwd is None:
        bwd = fwd
    if formula.trains == "B" and bwd is None:
        raise OptionError(
            f"method={method!r} needs bwd, the backward sparsity, such as bwd={fwd!r} for A = B"
        )
    if formula.trains != "B":
        if bwd not in (None, _bwd_to_wrap_with(method, formula, fwd)):
            raise OptionError(
                f"method={method!r} trains {_TRAINED[formula.trains]}: leave bwd={bwd!r} out"
            )
        bwd = fwd if formula.trains == "A" else 0.0
        overrides = _with_backward(method, formula, overrides)
    return Options(
        fwd=fwd,
        bwd=0.0 if bwd is None else bwd,
        dense=dense,
        overrides=overrides,
        refresh_every=formula.interval if refresh_every is None else refresh_every,
        reservoir_path=".",  # which reservoir='disk' needs; no file is written
        **options,
    )


def _bwd_to_wrap_with(method: str, formula: Formula, fwd: float | None) -> float | None:
    """The bwd that :func:`topkast.wrap_optimizer` asks for under a method with one sparsity.

    It says which weights the library holds, which need not be those that the formula counts.
    """
    begins_dense = formula.initial is not None or formula.has_dense_phases
    return 0.0 if begins_dense or method in ("dnw", "iht") else fwd


_TRAINED = {"A": "the weights of A alone", "all": "all weights"}


def _with_backward(method: str, formula: Formula, overrides: Any) -> Any:
    """The overrides of a method with one sparsity, with the backward sparsities that follow."""
    if not isinstance(overrides, Mapping) or not all(
        isinstance(values, Mapping) for values in overrides.values()
    ):
        return overrides  # None, or for Options to refuse
    completed: dict[str, Mapping[str, Any]] = {}
    for pattern, values in overrides.items():
        wrapped = _bwd_to_wrap_with(method, formula, values.get("fwd"))
        if "bwd" in values and values["bwd"] != wrapped:
            raise OptionError(
                f"overrides[{pattern!r}] sets bwd={values['bwd']!r}, but method={method!r} trains "
                f"{_TRAINED[formula.trains]}: leave it out"
            )
        values = {name: value for name, value in values.items() if name != "bwd"}
        follows = "fwd" in values and formula.trains == "A"
        completed[pattern] = {**values, "bwd": values["fwd"]} if follows else values
    return completed


def find_pruning(
    method: str,
    formula: Formula,
    options: Options,
    *,
    steps: int | None,
    window: Any,
    initial: float | None,
    linear: tuple[int, float] | None = None,
    cubic: tuple[int, int, float] | None = None,
) -> list[tuple[int, Options]]:
    """The stretches of a sparsity schedule: number of steps, and options in force.

    `linear` is the end of a linear schedule, and the sparsity at its start; its stretches are those
    at its first and its last sparsity which have the same mean. `cubic` are the start and the end
    of a cubic schedule, and the sparsity at its start: the sparsity changes at refreshes, unless a
    `window` is given too. Empty for methods of constant sparsity.

    Raises :class:`topkast.OptionError` for a schedule that is not given, or not possible.
    """
    if formula.initial is None:
        given = {"window": window, "initial": initial}
        for name, value in given.items():
            if value is not None:
                raise OptionError(
                    f"{name}={value!r} is of a sparsity schedule, but method={method!r} has a "
                    "constant sparsity: leave it out"
                )
        if linear is None:
            return []
    if steps is None:
        raise OptionError(
            f"method={method!r} changes its sparsity, and its cost is a mean over the steps: pass "
            "steps, a positive integer, got None"
        )
    if linear is not None:
        end, first = linear
        share = mean_remaining(steps, end, options.refresh_every)
        parts = share.numerator, share.denominator - share.numerator
        stages = while_pruning(options, first, Fraction(1)), options
        return [(count, stage) for count, stage in zip(parts, stages, strict=True) if count]
    if initial is not None and not 0 <= check_fraction("initial", initial, max=1) <= options.fwd:
        raise OptionError(
            f"initial is the sparsity from which pruning starts: it must lie in [0, fwd], got "
            f"{initial!r} and fwd={options.fwd!r}"
        )
    first = (formula.initial or 0.0) if cubic is None else cubic[2]
    if cubic is not None and window is None:
        changes = at_refreshes(steps, cubic[:2], options.refresh_every)
    else:
        if window is None:
            window = int(formula.window[0] * steps), int(formula.window[1] * steps)
        elif not (isinstance(window, tuple) and len(window) == 2 and all(map(is_count, window))):
            raise OptionError(f"window must be two steps, such as (0, {steps}), got {window!r}")
        changes = stretches(steps, window, options.refresh_every)
    first = first if initial is None else initial
    return [(count, while_pruning(options, first, remaining)) for count, remaining in changes]


def check_fraction(name: str, value: Any, *, max: int | None) -> Fraction:  # noqa: A002
    """Return a number of at least 0, and at most `max`, by its decimal digits."""
    is_number = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    if is_number and value >= 0 and (max is None or value <= max):
        return exact_fraction(float(value))
    upper = "" if max is None else f" and at most {max}"
    raise OptionError(f"{name} must be a finite number of at least 0{upper}, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise :class:`topkast.OptionError` unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
