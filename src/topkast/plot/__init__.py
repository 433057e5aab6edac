"""Figures of sparse training, drawn by matplotlib: ``pip install 'topkast[analysis]'``.

Each function takes what the library returns (an optimizer, masks, a history, a summary, costs) and
returns a :class:`matplotlib.figure.Figure`: ``figure.savefig(path)`` writes it, and a notebook
shows it. No function uses pyplot and its global state. Figures are 7 inches wide and readable when
they are shown with 700 pixels.

All functions have two options:

``figure``
    A figure or subfigure to draw into; None: a new one. The result is the figure itself, or the one
    that the subfigure belongs to. If it has no layout engine, it gets the constrained one.
``style``
    ``"light"`` or ``"dark"``, for pages with a light or a dark background; None: the colours of
    matplotlib's settings, as of ``matplotlib.style.use``. ``savefig(path, transparent=True)``
    leaves the background out.

The colours mean the same in all figures: A is blue, B∖A orange, and what lies outside B grey. They
are Okabe and Ito's, which colour-blind readers can tell apart.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401 - an optional dependency
except ModuleNotFoundError as error:
    from topkast._adapters import name_extra

    raise name_extra(error, "topkast.plot needs", "analysis", "matplotlib") from None

from topkast.plot._costs import costs
from topkast.plot._densities import densities
from topkast.plot._dynamics import dynamics
from topkast.plot._mask import mask
from topkast.plot._masks import masks
from topkast.plot._overlap import overlap

__all__ = ["costs", "densities", "dynamics", "mask", "masks", "overlap"]
