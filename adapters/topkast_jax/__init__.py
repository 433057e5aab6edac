"""Top-KAST for JAX: a gradient transformation around any elementwise optax optimizer."""

from topkast_jax._state import CheckedState
from topkast_jax._transform import TopKASTGradientTransformation, wrap
from topkast_jax.sparse._linear import sparse_linear
from topkast_jax.sparse._sparsify import densify, find_obstacles, sparsify
from topkast_jax.sparse._structure import Layouts, Structure

__all__ = [
    "CheckedState",
    "Layouts",
    "Structure",
    "TopKASTGradientTransformation",
    "densify",
    "find_obstacles",
    "sparse_linear",
    "sparsify",
    "wrap",
]
