"""Methods, which choose A and B: one file for each."""

from topkast._method import Method, View
from topkast.methods._mixed import Mixed
from topkast.methods._random import Random
from topkast.methods._static import Static
from topkast.methods._topkast import TopKAST
from topkast.methods.pruning._acdc import ACDC
from topkast.methods.pruning._dnw import DNW, IHT
from topkast.methods.pruning._gradual import GradualPruning
from topkast.methods.pruning._granet import GraNet
from topkast.methods.pruning._snip import SNIP
from topkast.methods.rewiring._deep_rewiring import DeepRewiring
from topkast.methods.rewiring._dsr import DSR
from topkast.methods.rewiring._gse import GSE
from topkast.methods.rewiring._rigl import ITOP, RigL
from topkast.methods.rewiring._set import SET
from topkast.methods.rewiring._smet import SMET
from topkast.methods.rewiring._snfs import SNFS

__all__ = [
    "ACDC",
    "DNW",
    "DSR",
    "GSE",
    "IHT",
    "ITOP",
    "SET",
    "SMET",
    "SNFS",
    "SNIP",
    "DeepRewiring",
    "GraNet",
    "GradualPruning",
    "Method",
    "Mixed",
    "Random",
    "RigL",
    "Static",
    "TopKAST",
    "View",
]
