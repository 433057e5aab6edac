"""Top-KAST for JAX: a gradient transformation around any elementwise optax optimizer."""

from topkast_jax._state import CheckedState
from topkast_jax._transform import TopKASTGradientTransformation, wrap

__all__ = ["CheckedState", "TopKASTGradientTransformation", "wrap"]
