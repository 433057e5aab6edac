"""Top-KAST: networks that are sparse from the first training step to the last, in any framework."""

from typing import TYPE_CHECKING

from topkast import methods
from topkast._errors import (
    AdapterNotFoundError,
    DenseAverageWarning,
    MismatchError,
    NonFiniteError,
    OptionError,
    ReservoirError,
    SparseExportWarning,
    StateDictError,
    UnsupportedOptimizerError,
    UnsupportedTensorError,
    WeightsMovedWarning,
)
from topkast._execution import densify, sparsify, unwrap
from topkast._exploration import exploration_gradient, exploration_penalty
from topkast._inspect import Masks, Summary, TensorSummary, dense_params, masks, summary
from topkast._wrap import wrap_optimizer
from topkast.analysis.costs import Cost, cost
from topkast.functional._arrays import apply_updates
from topkast.functional._rules import SGD, Adam, AdamW
from topkast.functional._state import TopKASTState, forward_params
from topkast.functional._transform import TopKASTTransform
from topkast.selection._compact import forward_view, gather, scatter
from topkast.selection._distribution import densities
from topkast.selection._select import select
from topkast.selection._support import Support, migrate
from topkast.selection._units import Blocks

if TYPE_CHECKING:
    from topkast import plot as plot
else:

    def __getattr__(name):
        """Import :mod:`topkast.plot`, which needs matplotlib, where it is first used."""
        if name == "plot":
            import importlib

            return importlib.import_module("topkast.plot")
        raise AttributeError(f"module 'topkast' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AdapterNotFoundError",
    "Blocks",
    "Cost",
    "DenseAverageWarning",
    "Masks",
    "MismatchError",
    "NonFiniteError",
    "OptionError",
    "ReservoirError",
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
    "cost",
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
