"""The kernels as handlers of XLA's foreign function interface: no Python and no lock in a call.

A handler is a ``numba.cfunc`` that reads XLA's call frame itself, and runs the same kernels as
PyTorch's layers on the threads of XLA. Nothing here imports JAX: an adapter registers
:func:`handlers` under their names.
"""

from topkast.kernels.xla._handlers import handlers
from topkast.kernels.xla._header import IncompatibleHeaderError, check_header
from topkast.kernels.xla._structure import plan_structure

__all__ = ["IncompatibleHeaderError", "check_header", "handlers", "plan_structure"]
