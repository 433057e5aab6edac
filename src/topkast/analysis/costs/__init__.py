"""What sparse training costs, in FLOPs and bytes."""

from topkast.analysis.costs._cost import cost
from topkast.analysis.costs._layers import Layer
from topkast.analysis.costs._report import Cost, LayerCost

__all__ = ["Cost", "Layer", "LayerCost", "cost"]
