"""What passes of several sparse linear layers share: sizes, plans, and stages of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from topkast.kernels._linear import LinearProducts
from topkast.kernels.chains._plan import Plan, Slot, Stage
from topkast.kernels.chains._stages import stages_of
from topkast.kernels.runtime._vector import VECTOR_BYTES
from topkast.kernels.units._linear import UnitLinearProducts

_MAX_PLANS = 64  # kept: one for each batch size and set of needed gradients


class Needed(NamedTuple):
    """The gradients that a backward pass computes; those of values and biases by layer."""

    x: bool
    values: tuple[bool, ...]
    biases: tuple[bool, ...]


class ProductGroup:
    """Sparse linear layers whose passes are one parallel region each.

    Parameters
    ----------
    products
        The products of each layer. All have single weights, or all have units of the same number
        of rows.
    dtype
        float32 or float64.

    Raises
    ------
    ValueError
        If there is no layer, or units differ.
    """

    def __init__(self, products: Sequence[LinearProducts | UnitLinearProducts], dtype: Any) -> None:
        if not products:
            raise ValueError("a group of layers needs at least one layer")
        if len({getattr(layer, "rows", 1) for layer in products}) > 1:
            raise ValueError("the layers of a group must have units of the same size")
        self.products = tuple(products)
        self._dtype = np.dtype(dtype)
        self._layers = [stages_of(layer, dtype) for layer in products]
        self._plans: dict[Any, Plan] = {}

    def check(self) -> None:
        """Raise ValueError if the columns of a layer were overwritten."""
        for products in self.products:
            products.check()

    def _run(self, key: Any, make_plan: Callable[..., Plan], addresses: Sequence[int]) -> None:
        """Run the plan that `make_plan` makes from `key`; plans are kept."""
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = make_plan(*key)
        plan.run(addresses)

    def _pack(
        self, batch: int, features: int, source: Slot, target: Slot, positive: Slot | int = 0
    ) -> Stage:
        """Pack (batch, features), with zeros where `positive` is given and not positive."""
        width = self._width(batch)
        arguments: dict[str, int | Slot] = {
            "source": source,
            "target": target,
            "count": -(-batch // width),
            "batch": batch,
            "features": features,
            "width": width,
            "positive": positive,
            "scratch": Slot("scratch") if positive else 0,
        }
        return Stage("pack", arguments, self._packed(batch) * features // self._lanes)

    def _parameter_gradients(
        self, batch: int, number: int, written: int, needed: Needed, gradient: Slot, packed: Slot
    ) -> list[Stage]:
        """The gradients of values and bias of a layer that are needed.

        `gradient` of the output is written by the stage `written`, `packed` is the input.
        """
        stages = []
        if needed.values[number]:
            out = Slot(f"grad_values {number}")
            product = self._layers[number].weight_gradient(
                batch, (written,), gradient=gradient, x=packed, out=out
            )
            stages.append(product.stage)
        if needed.biases[number]:
            width, rows = self._width(batch), self.products[number].shape[0]
            arguments: dict[str, int | Slot] = {
                "source": gradient,
                "out": Slot(f"grad_bias {number}"),
                "tiles": -(-batch // width),
                "rows": rows,
                "width": width,
            }
            work = self._packed(batch) * rows // self._lanes
            stages.append(Stage("sum", arguments, work, (written,)))
        return stages

    @property
    def _lanes(self) -> int:
        return int(VECTOR_BYTES // self._dtype.itemsize)

    def _packed(self, batch: int) -> int:
        """Entries of a packed feature."""
        width = self._width(batch)
        return int(-(-batch // width) * width)

    def _width(self, batch: int) -> int:
        """Width of the tiles, which all layers share."""
        return self._layers[0].width(batch)

    def _offsets(self, batch: int, features: Sequence[int]) -> list[int]:
        """Offset in bytes of each of some packed activations that lie in a row."""
        size = self._packed(batch) * self._dtype.itemsize
        return [size * sum(features[:number]) for number in range(len(features))]


def numbered(name: str, flags: Sequence[bool]) -> list[str]:
    """Names of slots of the layers with a flag."""
    return [f"{name} {number}" for number, flag in enumerate(flags) if flag]
