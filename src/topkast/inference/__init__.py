"""Inference with the forward set A by the compiled kernels, on NumPy arrays, without a framework.

:func:`load` reads a file of :func:`topkast_torch.save_forward`. Needs the extras ``cpu`` and
``safetensors``: ``pip install 'topkast[cpu,safetensors]'``. PyTorch is neither needed nor imported.
"""

from topkast.inference._layers import BatchNorm, Convolution, Linear
from topkast.inference._model import Model, load

__all__ = ["BatchNorm", "Convolution", "Linear", "Model", "load"]
