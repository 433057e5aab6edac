"""Products of parameters, of which the default session runs a few."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def star(*axes: Iterable[Any] | Mapping[str, Any]) -> list[Any]:
    """The product of axes, as parameters: slow where two or more differ from the first of its axis.

    So the default session tries each value of each axis, and the property session all of them.
    The keys of a mapping name its values.

    >>> [(one.values, len(one.marks)) for one in star(["a", "b"], [1, 2])]
    [(('a', 1), 0), (('a', 2), 0), (('b', 1), 0), (('b', 2), 1)]
    """
    named = [
        axis.items() if isinstance(axis, Mapping) else [(str(value), value) for value in axis]
        for axis in axes
    ]
    params = []
    for chosen in itertools.product(*map(enumerate, named)):
        others = sum(position > 0 for position, _ in chosen)
        name = "-".join(name for _, (name, _) in chosen)
        values = [value for _, (_, value) in chosen]
        params.append(pytest.param(*values, id=name, marks=pytest.mark.slow if others > 1 else []))
    return params
