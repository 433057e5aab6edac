"""The method that options ask for, and whether what it chose can be."""

from __future__ import annotations

from array_api_compat import array_namespace

from topkast._errors import MismatchError
from topkast._method import Method, View
from topkast._options import Options
from topkast._primitives import device, index_dtype, is_traced
from topkast._selection import Support
from topkast.methods._random import Random
from topkast.methods._topkast import TopKAST

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
        xp = array_namespace(view.weights, *support)
    except TypeError:
        raise MismatchError(
            f"{name} chose sets for {view.name} that are no arrays of the library of its weights, "
            f"{type(view.weights).__module__}"
        ) from None
    shape = (view.backward,)
    found = tuple(support.indices.shape), tuple(support.active.shape)
    if found != (shape, shape):
        raise MismatchError(
            f"{name} chose indices of shape {found[0]} and flags of shape {found[1]} for "
            f"{view.name}: expected |B| = {view.backward} of each"
        )
    if not is_traced(support.indices) and view.backward:
        indices = support.indices
        ordered = bool(xp.all(indices[1:] > indices[:-1]))
        if not ordered or int(indices[0]) < 0 or int(indices[-1]) >= view.weights.shape[0]:
            raise MismatchError(
                f"{name} chose indices for {view.name} that are not ascending, or not among its "
                f"{view.weights.shape[0]} entries"
            )
        forward = int(xp.sum(xp.astype(support.active, xp.int32)))
        if forward != view.forward:
            raise MismatchError(
                f"{name} chose {forward} entries of {view.name} for A: expected {view.forward}"
            )
    dtype = index_dtype(xp, device(support.indices))
    return Support(xp.astype(support.indices, dtype), xp.astype(support.active, xp.bool))
