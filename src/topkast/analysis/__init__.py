"""Analysis of sparse training: what it costs."""

from topkast.analysis._cost import cost
from topkast.analysis._layers import Layer
from topkast.analysis._report import Cost, LayerCost

__all__ = ["Cost", "Layer", "LayerCost", "cost"]
