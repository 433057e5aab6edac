"""The cubic sparsity schedule of gradual pruning, as stretches of constant sparsity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from topkast._errors import OptionError
from topkast._options import Options
from topkast.selection._distribution import exact_fraction


def stretches(steps: int, window: tuple[int, int], interval: int) -> Iterator[tuple[int, Fraction]]:
    """Split a run into stretches: number of steps, and share of the pruning that remains.

    The sparsity is ``final + (initial - final) * remaining``. It changes at every `interval`-th
    step from the start of the `window` on (Zhu and Gupta, 2017, equation 1), and is final after the
    last change.

    Raises :class:`topkast.OptionError` for a window that is not inside the run, or shorter than the
    interval.

    >>> [(count, str(remaining)) for count, remaining in stretches(100, (20, 60), 20)]
    [(40, '1'), (20, '1/8'), (40, '0')]
    """
    start, stop = window
    if not 0 <= start < stop <= steps:
        raise OptionError(
            f"window must be the first and the last step of the pruning, within {steps} steps, got "
            f"{window}"
        )
    changes = (stop - start) // interval
    if not changes:
        raise OptionError(
            f"refresh_every={interval} is longer than the {stop - start} steps of the pruning "
            f"from {start} to {stop}: choose a smaller refresh_every, or a longer window"
        )
    yield start + interval, Fraction(1)
    for change in range(1, changes):
        yield interval, (1 - Fraction(change, changes)) ** 3
    yield steps - start - changes * interval, Fraction(0)


def at_refreshes(
    steps: int, window: tuple[int, int], interval: int
) -> Iterator[tuple[int, Fraction]]:
    """:func:`stretches` of a run whose sets change at every `interval`-th update, in any window.

    >>> [(count, str(remaining)) for count, remaining in at_refreshes(100, (15, 35), 20)]
    [(20, '1'), (20, '27/64'), (60, '0')]
    """
    start, stop = window
    first = min((start // interval + 1) * interval, steps)  # change
    yield first, Fraction(1)
    for update in range(first, min(steps, stop), interval):
        yield min(interval, steps - update), (1 - Fraction(update - start, stop - start)) ** 3
    final = steps - max(first, -(-stop // interval) * interval)
    if final > 0:
        yield final, Fraction(0)


def mean_remaining(steps: int, end: int, interval: int) -> Fraction:
    """Mean over the steps of what remains of a linear schedule that reaches 0 at the update `end`.

    It changes at every `interval`-th update.

    >>> str(mean_remaining(4, 2, 1))  # 1, 1/2, 0, 0
    '3/8'
    """
    remaining = sum(
        (end - update) * min(interval, steps - update)
        for update in range(0, min(end, steps), interval)
    )
    return Fraction(remaining, end * steps)


def while_pruning(options: Options, initial: float, remaining: Fraction) -> Options:
    """The options of a stretch: all sparsities between `initial` and their final values."""

    def sparsity(final: float) -> float:
        end = exact_fraction(final)
        return float(end + (min(exact_fraction(initial), end) - end) * remaining)

    overrides = {
        pattern: dict(values)
        | {name: sparsity(values[name]) for name in ("fwd", "bwd") if name in values}
        for pattern, values in (options.overrides or {}).items()
    }
    return replace(
        options, fwd=sparsity(options.fwd), bwd=sparsity(options.bwd), overrides=overrides or None
    )
