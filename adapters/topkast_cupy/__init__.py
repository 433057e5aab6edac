"""Top-KAST on CuPy arrays: CUDA kernels, which the core loads when it gets a CuPy array.

``topkast.wrap_optimizer(topkast.AdamW(1e-3), fwd=0.9, bwd=0.8)`` works on a dictionary of CuPy
arrays as on one of NumPy arrays. Users call only :func:`why_unavailable`.
"""

from topkast_cupy._backend import load
from topkast_cupy._module import why_unavailable

__all__ = ["load", "why_unavailable"]
