"""Names and globs of tensors, and which tensors stay dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from topkast._errors import OptionError

Patterns: TypeAlias = str | Sequence[str] | None
Dense: TypeAlias = bool | Callable[[str, Any], bool] | Patterns


def kept_dense(tensors: Mapping[str, Any], dense: Dense, stacked: Patterns = None) -> set[str]:
    """Names in `tensors` (name -> array) that stay dense under the options `dense` and `stacked`.

    Empty tensors, scalars and tensors with fewer than two dimensions above one stay dense; the
    leading axis of stacked tensors does not count. ``dense=False`` sparsifies all tensors except
    empty ones and scalars.
    """
    small = {
        name
        for name, tensor in tensors.items()
        if 0 in tuple(tensor.shape)
        or not tuple(tensor.shape)
        or (dense is not False and _count_long_axes(tensor.shape, matches(name, stacked)) < 2)
    }
    if dense is None or isinstance(dense, bool):
        return set(tensors) if dense else small
    if callable(dense):
        large = (name for name in tensors if name not in small)
        return small | {name for name in large if dense(name, tensors[name])}
    return small | {name for name in tensors if matches(name, dense)}


def _count_long_axes(shape: Sequence[int], stacked: bool) -> int:
    return sum(length > 1 for length in tuple(shape)[1 if stacked else 0 :])


def matches(name: str, patterns: Patterns) -> bool:
    """Whether `name` matches one of the names or globs."""
    return any(fnmatchcase(name, pattern) for pattern in as_patterns(patterns))


def as_patterns(patterns: Patterns) -> Sequence[str]:
    """Return the names or globs as a sequence: one, several or none."""
    if patterns is None:
        return ()
    return (patterns,) if isinstance(patterns, str) else patterns


def check_patterns(names: Iterable[str], option: str, patterns: Patterns) -> None:
    """Raise :class:`OptionError` for a pattern that matches no name.

    A misspelt pattern would silently change which tensors are sparsified.
    """
    names = list(names)
    for pattern in as_patterns(patterns):
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        if any(name.startswith(f"{pattern}.") for name in names):
            hint = f"did you mean {pattern + '.*'!r}?"
        elif close := get_close_matches(pattern, names, n=1):
            hint = f"did you mean {close[0]!r}?"
        elif all(name.replace(".", "").isdigit() for name in names):
            hint = "build the PyTorch optimizer from model.named_parameters() to have names"
        else:
            hint = "use one of these names, or a glob"
        raise OptionError(f"{option}={pattern!r} matches none of {_format_names(names)}: {hint}")


def _format_names(names: Sequence[str], max: int = 6) -> str:  # noqa: A002 - the word for it
    shown = ", ".join(map(repr, names[:max]))
    return f"the {len(names)} tensors {shown}" + (", ..." if len(names) > max else "")


def check_dense(dense: object) -> None:
    """Raise :class:`OptionError` unless this is a value of the option `dense`."""
    if isinstance(dense, bool):
        return
    if hasattr(dense, "parameters"):
        raise OptionError(
            f"dense was given a {type(dense).__name__}: pass the names of its tensors instead, as "
            "dense='head.*'"
        )
    if not callable(dense):
        check_names_of("dense", dense, " a predicate (name, tensor) -> bool, or a bool,")


def check_names_of(option: str, names: object, alternatives: str = "") -> None:
    """Raise :class:`OptionError` unless `names` are names or globs of tensors, or None."""
    if names is None or isinstance(names, str):
        return
    if not isinstance(names, Sequence) or not all(isinstance(item, str) for item in names):
        raise OptionError(
            f"{option} must be a name or glob, a sequence of them,{alternatives} or None, "
            f"got {names!r}"
        )
