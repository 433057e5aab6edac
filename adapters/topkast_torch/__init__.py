"""Top-KAST for PyTorch: an optimizer around any elementwise ``torch.optim`` optimizer."""

try:
    import torch as _torch  # noqa: F401 - imported to name the missing extra
except ModuleNotFoundError as error:
    from topkast.adapter import name_extra

    raise name_extra(error, "topkast_torch needs", "torch", "torch") from None

from topkast_torch._averages import WeightAverage
from topkast_torch._generate_weights import generate_weights
from topkast_torch._measure_layers import measure_layers
from topkast_torch.distributed._data_parallel import ddp_comm_hook
from topkast_torch.distributed._fully_shard import fully_shard
from topkast_torch.export._load import load_forward, load_sparse
from topkast_torch.export._save import save_forward
from topkast_torch.optimizer._optimizer import TopKASTOptimizer, wrap
from topkast_torch.sparse._layers import SparseConv2d, SparseLinear
from topkast_torch.sparse._sparsify import ExecutionReport, LayerExecution, densify, sparsify
from topkast_torch.sparse.chains._parallel import SparseParallel
from topkast_torch.sparse.chains._sequential import SparseSequential

__all__ = [
    "ExecutionReport",
    "LayerExecution",
    "SparseConv2d",
    "SparseLinear",
    "SparseParallel",
    "SparseSequential",
    "TopKASTOptimizer",
    "WeightAverage",
    "ddp_comm_hook",
    "densify",
    "fully_shard",
    "generate_weights",
    "load_forward",
    "load_sparse",
    "measure_layers",
    "save_forward",
    "sparsify",
    "wrap",
]
