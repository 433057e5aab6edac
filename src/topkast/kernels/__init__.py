"""Products of sparse and dense matrices on CPUs, compiled by numba, on plain NumPy buffers.

Needs the extra ``topkast[cpu]``. Three products make up training with forward set A and backward
set B: the output ``A · X``, the input gradient ``Aᵀ · dY``, and the weight gradient ``dY · Xᵀ`` on
B alone. :class:`LinearProducts` and :class:`ConvolutionProducts` provide all three for a layer. The
adapter of a framework converts its tensors to NumPy arrays, allocates the outputs and calls them.

A linear layer uses :func:`multiply` and :func:`sampled_product`. Activations are packed as
(tiles, features, width) (:func:`pack`, :func:`tile_width`), so that the activations for a few rows
of the sparse matrix stay in the L1 cache. A layout orders the entries of a set to match:
:class:`RowLayout` for entries that the compact vector holds by row, :class:`Layout` for entries in
any order.

For a convolution, images become planes (:func:`to_planes`), on which each weight reads at a fixed
offset (:class:`ConvGeometry`, :func:`shift`). Output and input gradient are :func:`convolve`, with
the layouts of the matrix and of its transpose; the weight gradient is :func:`sampled_correlation`.

Where weights come in units of r × 1, :class:`UnitLinearProducts` and
:class:`UnitConvolutionProducts` do the same. Each load of activations serves r products, and no
layout of the transpose is needed.

:func:`gather`, :func:`put` and :func:`compress` read and write the entries of dense tensors on A
and B.
"""

try:
    import numba as _numba  # noqa: F401 - imported to name the missing extra
except ModuleNotFoundError as error:
    from topkast._adapters import name_extra

    raise name_extra(error, "the kernels need", "cpu", "numba") from None

from topkast.backends._candidates import Division, Threshold
from topkast.kernels._columns import find_columns, find_row_starts
from topkast.kernels._convolution import ConvolutionProducts
from topkast.kernels._gather import compress, gather, put
from topkast.kernels._geometry import Bands, ConvGeometry, PlaneLayout
from topkast.kernels._layout import (
    Layout,
    RowLayout,
    make_layout,
    make_row_layout,
    make_transposed_layout,
)
from topkast.kernels._linear import LinearProducts
from topkast.kernels._packing import pack
from topkast.kernels._plane_products import OffsetLayout, convolve, sampled_correlation, shift
from topkast.kernels._planes import from_planes, lanes_of, to_planes
from topkast.kernels._products import multiply, sampled_product, tile_width
from topkast.kernels.chains._group import Needed
from topkast.kernels.chains._linear_chain import LinearChain
from topkast.kernels.chains._parallel_linear import ParallelLinear
from topkast.kernels.refresh._divide import divide
from topkast.kernels.refresh._generate import generate
from topkast.kernels.refresh._magnitudes import collect
from topkast.kernels.refresh._migrate import migrate
from topkast.kernels.refresh._thresholds import find_thresholds
from topkast.kernels.refresh._young import scale_displacement
from topkast.kernels.units._convolution import UnitConvolutionProducts
from topkast.kernels.units._linear import UnitLinearProducts

__all__ = [
    "Bands",
    "ConvGeometry",
    "ConvolutionProducts",
    "Division",
    "Layout",
    "LinearChain",
    "LinearProducts",
    "Needed",
    "OffsetLayout",
    "ParallelLinear",
    "PlaneLayout",
    "RowLayout",
    "Threshold",
    "UnitConvolutionProducts",
    "UnitLinearProducts",
    "collect",
    "compress",
    "convolve",
    "divide",
    "find_columns",
    "find_row_starts",
    "find_thresholds",
    "from_planes",
    "gather",
    "generate",
    "lanes_of",
    "make_layout",
    "make_row_layout",
    "make_transposed_layout",
    "migrate",
    "multiply",
    "pack",
    "put",
    "sampled_correlation",
    "sampled_product",
    "scale_displacement",
    "shift",
    "tile_width",
    "to_planes",
]
