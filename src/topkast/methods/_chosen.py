"""The method that options ask for, and whether what it chose can be."""

from __future__ import annotations

from array_api_compat import array_namespace

from topkast._errors import MismatchError
from topkast._method import Method, View
from topkast._options import Options
from topkast.methods._random import Random
from topkast.methods._topkast import TopKAST
from topkast.selection._support import Support

_SHORTHANDS: dict[str, Method] = {"magnitude": TopKAST(), "random": Random()}


def method_of(options: Options) -> Method:
    """The option `method`, or the one for which `explore` is a shorthand."""
    method: Method | None = options.method
    return _SHORTHANDS[options.explore] if method is None else method


def check_chosen(support: Support, view: View, method: Method) -> Support:
    """Raise :class:`topkast.MismatchError` unless the sets are as numerous and ordered as asked.

    The methods of the library are trusted: their choices are tested.
    """
    if type(method).__module__.startswith("topkast.methods."):
        return support
    name = type(method).__name__
    if not isinstance(support, Support):
        raise MismatchError(
            f"{name} chose a {type(support).__name__} for {view.name}: expected a topkast.Support"
        )
    try:
        array_namespace(view.weights, support.indices)
    except TypeError:
        raise MismatchError(
            f"{name} chose sets for {view.name} that are no arrays of the library of its weights, "
            f"{type(view.weights).__module__}"
        ) from None
    size = view.weights.shape[0]
    support.check(size, f"{name} chose sets for {view.name}: what it returned")
    found, expected = (support.forward, support.backward), (view.forward, view.backward)
    if found != expected:
        raise MismatchError(
            f"{name} chose |A|, |B| = {found} entries of {view.name}: expected {expected}"
        )
    return support.narrowed(size)
