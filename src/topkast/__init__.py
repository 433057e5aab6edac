"""Top-KAST: networks that are sparse from the first training step to the last, in any framework."""

from topkast import methods
from topkast._compact import forward_view, gather, scatter
from topkast._distribution import densities
from topkast._errors import (
    AdapterNotFoundError,
    DenseAverageWarning,
    MismatchError,
    NonFiniteError,
    OptionError,
    SparseExportWarning,
    StateDictError,
    UnsupportedOptimizerError,
    UnsupportedTensorError,
    WeightsMovedWarning,
)
from topkast._execution import densify, sparsify, unwrap
from topkast._exploration import exploration_gradient, exploration_penalty
from topkast._inspect import Masks, Summary, TensorSummary, dense_params, masks, summary
from topkast._rules import SGD, Adam, AdamW
from topkast._selection import select
from topkast._state import TopKASTState, forward_params
from topkast._support import Support, migrate
from topkast._transform import TopKASTTransform, apply_updates
from topkast._units import Blocks
from topkast._wrap import wrap_optimizer

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AdapterNotFoundError",
    "Blocks",
    "DenseAverageWarning",
    "Masks",
    "MismatchError",
    "NonFiniteError",
    "OptionError",
    "SparseExportWarning",
    "StateDictError",
    "Summary",
    "Support",
    "TensorSummary",
    "TopKASTState",
    "TopKASTTransform",
    "UnsupportedOptimizerError",
    "UnsupportedTensorError",
    "WeightsMovedWarning",
    "apply_updates",
    "dense_params",
    "densify",
    "densities",
    "exploration_gradient",
    "exploration_penalty",
    "forward_params",
    "forward_view",
    "gather",
    "masks",
    "methods",
    "migrate",
    "scatter",
    "select",
    "sparsify",
    "summary",
    "unwrap",
    "wrap_optimizer",
]
