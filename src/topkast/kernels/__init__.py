"""Products of sparse matrices with dense ones on CPUs, compiled by numba; on plain NumPy buffers.

Needs the extra ``topkast[cpu]``. Three products make up training with forward set A and backward
set B: the output ``A · X``, the input gradient ``Aᵀ · dY``, and the weight gradient ``dY · Xᵀ`` on
B alone. :class:`LinearProducts` and :class:`ConvolutionProducts` are the three of a layer, for the
adapter of any framework: it converts its tensors to NumPy arrays, allocates what is written, and
calls them.

They are made of :func:`multiply` and :func:`sampled_product`. Activations are packed
(:func:`tile_width`) as (tiles, features, width), so that what a few rows of the sparse matrix
need stays in the first cache; a layout orders the entries of a set to fit: :class:`RowLayout` where
the compact vector holds them by row, :class:`Layout` where they lie in any order.

For a convolution images become planes (:func:`to_planes`), on which each weight looks at a fixed
distance (:class:`Grid`, :func:`shift`): the same products are :func:`convolve`, with the layouts of
the matrix and of its transpose, and :func:`sampled_correlation`.

What dense tensors need at a step is here too: their entries on A and B, by :func:`gather`,
:func:`put` and :func:`compress`.
"""

try:
    import numba as _numba  # noqa: F401 - to say which extra brings it
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "the kernels need numba: pip install 'topkast[cpu]'", name="numba"
    ) from None

from topkast.kernels._candidates import (
    Division,
    Threshold,
    collect,
    count_not_finite,
    divide,
    find_threshold,
)
from topkast.kernels._columns import find_columns, find_row_starts
from topkast.kernels._convolutions import Shifted, convolve, sampled_correlation, shift
from topkast.kernels._convolved import ConvolutionProducts
from topkast.kernels._gather import compress, gather, put
from topkast.kernels._grid import Bands, Grid, Placement
from topkast.kernels._layout import Layout, RowLayout, make_layout, make_row_layout
from topkast.kernels._linear import LinearProducts
from topkast.kernels._packing import pack
from topkast.kernels._planes import from_planes, lanes_of, to_planes
from topkast.kernels._products import multiply, sampled_product, tile_width

__all__ = [
    "Bands",
    "ConvolutionProducts",
    "Division",
    "Grid",
    "Layout",
    "LinearProducts",
    "Placement",
    "RowLayout",
    "Shifted",
    "Threshold",
    "collect",
    "compress",
    "convolve",
    "count_not_finite",
    "divide",
    "find_columns",
    "find_row_starts",
    "find_threshold",
    "from_planes",
    "gather",
    "lanes_of",
    "make_layout",
    "make_row_layout",
    "multiply",
    "pack",
    "put",
    "sampled_correlation",
    "sampled_product",
    "shift",
    "tile_width",
    "to_planes",
]
