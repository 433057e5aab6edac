"""Top-KAST for JAX: a gradient transformation around any elementwise optax optimizer."""

from topkast_jax._transform import TopKASTGradientTransformation, TopKASTState, wrap

__all__ = ["TopKASTGradientTransformation", "TopKASTState", "wrap"]
