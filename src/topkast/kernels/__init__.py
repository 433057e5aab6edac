"""Products of sparse matrices with dense ones on CPUs, compiled by numba; on plain NumPy buffers.

Needs the extra ``topkast[cpu]``. Three products make up training with forward set A and backward
set B: the output ``A · X`` and the input gradient ``Aᵀ · dY`` (:func:`multiply`), and the weight
gradient ``dY · Xᵀ`` on B alone (:func:`sampled_product`). Activations are packed
(:func:`tile_width`) as (tiles, features, width), so that what a few rows of the sparse matrix
need stays in the first cache; a :class:`Layout` orders the entries of a set to fit.
"""

from topkast.kernels._images import fold, unfold
from topkast.kernels._layout import Layout, arrange
from topkast.kernels._packing import pack
from topkast.kernels._products import multiply, sampled_product, tile_width

__all__ = [
    "Layout",
    "arrange",
    "fold",
    "multiply",
    "pack",
    "sampled_product",
    "tile_width",
    "unfold",
]
