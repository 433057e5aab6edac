"""Analysis of sparse training: which weights a method uses, and what it costs.

The functions compare sets of weights from any source. Wherever they take sets, pass one of these:

- a wrapped PyTorch optimizer, or the state of a functional one together with ``params``;
- what :func:`topkast.masks` returned, or boolean arrays by the names of their tensors;
- one :class:`topkast.Masks` or one boolean array, for a single tensor, whose name is then ``""``;
- a :class:`topkast.Support`, or supports by name, with the weights that they belong to as
  ``params``.

A boolean array is A, of any method; B is then taken to be the same. Arrays may belong to any
library; results are Python numbers and NumPy arrays. Matching needs scipy: ``pip install
'topkast[analysis]'``. :mod:`topkast.plot` draws the results.
"""

from topkast.analysis._change import Change, ReservoirUse, mask_change, reservoir_use
from topkast.analysis._ever_active import EverActive
from topkast.analysis._history import MaskHistory, MaskRecord
from topkast.analysis._layers import UnitGroup
from topkast.analysis._matching import UnitMatch, match_units
from topkast.analysis._overlap import Overlap, overlap
from topkast.analysis._sets import ByTensor
from topkast.analysis._units import DeadUnits, UnitCounts, dead_units, unit_counts
from topkast.analysis.costs import Layer, LayerCost

__all__ = [
    "ByTensor",
    "Change",
    "DeadUnits",
    "EverActive",
    "Layer",
    "LayerCost",
    "MaskHistory",
    "MaskRecord",
    "Overlap",
    "ReservoirUse",
    "UnitCounts",
    "UnitGroup",
    "UnitMatch",
    "dead_units",
    "mask_change",
    "match_units",
    "overlap",
    "reservoir_use",
    "unit_counts",
]
