"""What the array-API standard lacks: one file a library, chosen by the type of an array.

:class:`Backend` does everything by the functions of the standard. A library's own class overrides
what that library can do better, and is loaded when an array of it is seen for the first time. That
of a library which is not here is found by an entry point ``topkast.backends``, whose name is the
library's package and whose value is a function that returns the backend.
"""

from topkast.backends._base import Backend, Ranks
from topkast.backends._find import ENTRY_POINTS, backend_of, load_own

__all__ = ["ENTRY_POINTS", "Backend", "Ranks", "backend_of", "load_own"]
