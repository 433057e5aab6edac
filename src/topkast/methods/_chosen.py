"""The method that options select, and the check of the sets that it chose."""

from __future__ import annotations

from dataclasses import replace

from array_api_compat import array_namespace

from topkast._errors import MismatchError
from topkast._method import Method, View
from topkast._options import Options
from topkast._primitives import device, is_traced
from topkast.methods._random import Random
from topkast.methods._topkast import TopKAST
from topkast.selection._support import Support

_FEW = 1 << 16  # entries of tensors whose choice is repeated at each refresh
_SHORTHANDS: dict[str, Method] = {"magnitude": TopKAST(), "random": Random()}


def method_of(options: Options) -> Method:
    """The option `method`, or the method that `explore` abbreviates."""
    method: Method | None = options.method
    return _SHORTHANDS[options.explore] if method is None else method


def check_chosen(support: Support, view: View, method: Method) -> Support:
    """Raise :class:`topkast.MismatchError` unless the sets are valid and have the asked counts.

    The library's own methods are not checked, because tests cover them.
    """
    if type(method).__module__.startswith("topkast.methods."):
        return support
    name = type(method).__name__
    if not isinstance(support, Support):
        raise MismatchError(
            f"{name} chose a {type(support).__name__} for {view.name}, expected a topkast.Support"
        )
    try:
        array_namespace(view.weights, support.indices)
    except TypeError:
        raise MismatchError(
            f"{name} chose indices of type {type(support.indices).__module__}."
            f"{type(support.indices).__qualname__} for {view.name}, expected the library of its "
            f"weights, {type(view.weights).__module__}"
        ) from None
    size = view.weights.shape[0]
    support = support.in_groups(view.group_size)
    support.check(size, f"the support that {name} chose for {view.name}")
    counts, expected = (support.forward, support.backward), (view.forward, view.backward)
    if method.schedules:  # |A| may differ, up to |B|
        expected = min(support.forward, view.backward), view.backward
    if counts != expected:
        raise MismatchError(
            f"{name} chose |A|, |B| = {counts} units of {view.name}, expected {expected}"
        )
    _check_repeatable(support, view, method)
    return support.narrowed(size)


def _check_repeatable(support: Support, view: View, method: Method) -> None:
    """Raise :class:`topkast.MismatchError` unless the sets depend on what the method declares.

    A method that does not need the weights gets others, since PyTorch passes it zeros.
    """
    is_first, reads = isinstance(view.draw, int) and view.draw == 0, "weights" in method.needs
    # Of a large tensor, only the first choice is repeated: it takes the memory of all weights.
    is_checked = is_first or not (reads or view.weights.shape[0] > _FEW)
    if is_traced(view.weights) or is_traced(support.indices) or not is_checked:
        return
    if not reads:
        xp = array_namespace(view.weights)
        numbers = xp.arange(view.weights.shape[0], device=device(view.weights)) % 97
        view = replace(view, weights=xp.astype(numbers, view.weights.dtype))
    again = method.choose(view)
    xp = array_namespace(support.indices)
    same = again.forward == support.forward and again.indices.shape == support.indices.shape
    if same and bool(xp.all(again.indices == support.indices)):
        return
    problem = "draws numbers that depend on more than the seed, name and draw of its View"
    if not reads:
        problem += ", or reads view.weights although its `needs` lack 'weights'"
    raise MismatchError(
        f"{type(method).__name__} chose other sets of {view.name} when it was called again: it "
        f"{problem}"
    )
