"""Top-KAST for PyTorch: an optimizer around any elementwise ``torch.optim`` optimizer."""

from topkast_torch._optimizer import TopKASTOptimizer, wrap

__all__ = ["TopKASTOptimizer", "wrap"]
