"""Operations that the array-API standard lacks: one file for each library.

:class:`Backend` implements them with functions of the standard. A library's subclass overrides the
operations that the library does better, and is loaded at the first array of the library. Other
packages add backends by an entry point in the group ``topkast.backends``: its name is the library's
package, and its value is a function that returns the backend.
"""

from topkast.backends._base import Backend, Ranks, threshold_finder
from topkast.backends._find import ENTRY_POINTS, backend_of, load_builtin

__all__ = [
    "ENTRY_POINTS",
    "Backend",
    "Ranks",
    "backend_of",
    "load_builtin",
    "threshold_finder",
]
