"""Methods, which choose A and B: one file for each."""

from topkast._method import Method, View
from topkast.methods._mixed import Mixed
from topkast.methods._random import Random
from topkast.methods._static import Static
from topkast.methods._topkast import TopKAST

__all__ = ["Method", "Mixed", "Random", "Static", "TopKAST", "View"]
