"""Top-KAST for JAX: a gradient transformation around any elementwise optax optimizer."""

try:
    import jax as _jax  # noqa: F401 - imported to name the missing extra
    import optax as _optax  # noqa: F401
except ModuleNotFoundError as error:
    from topkast.adapter import name_extra

    raise name_extra(error, "topkast_jax needs", "jax", "jax", "optax") from None

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
