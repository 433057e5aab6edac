"""Where the weights outside B are kept: in an array, in a file, or nowhere.

The option ``reservoir`` of :func:`topkast.wrap_optimizer` chooses. :class:`Generated` and
:class:`Init` are the initial weights of ``reservoir="seeded"``, in any library.
"""

from topkast.reservoirs._file import FileBase
from topkast.reservoirs._initial import Generated, Init
from topkast.reservoirs._reservoir import (
    ArrayReservoir,
    LayeredReservoir,
    Reservoir,
    Zeros,
)

__all__ = [
    "ArrayReservoir",
    "FileBase",
    "Generated",
    "Init",
    "LayeredReservoir",
    "Reservoir",
    "Zeros",
]
