"""The stages of a linear layer's products, for single weights and for units of r × 1."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from topkast.backends._threads import default_threads
from topkast.kernels._linear import LinearProducts
from topkast.kernels._products import registers_of, tile_width
from topkast.kernels.chains._plan import Slot, Stage
from topkast.kernels.runtime._arguments import Vector
from topkast.kernels.runtime._pool import address_of
from topkast.kernels.runtime._vector import VECTOR_BYTES
from topkast.kernels.units._linear import UnitLinearProducts
from topkast.kernels.units._multiply import describe_multiply
from topkast.kernels.units._sample import describe_sample
from topkast.kernels.units._scatter import describe_scatter
from topkast.kernels.units._sizes import Planes

Argument = int | Slot

_SCRATCH = Slot("scratch")


class Product(NamedTuple):
    """A stage, and the bytes of scratch memory that each thread needs for it."""

    stage: Stage
    scratch_bytes: int


def stages_of(
    products: LinearProducts | UnitLinearProducts, dtype: Any
) -> WeightStages | UnitStages:
    """What makes the stages of a layer, for float32 or float64."""
    if isinstance(products, UnitLinearProducts):
        return UnitStages(products, np.dtype(dtype))
    return WeightStages(products, np.dtype(dtype))


class WeightStages:
    """Products with single weights. In all methods, `waits_for` is as for :class:`Stage`."""

    def __init__(self, products: LinearProducts, dtype: Any) -> None:
        self._products, self._dtype = products, dtype

    def width(self, batch: int) -> int:
        """Width of the tiles of packed activations."""
        return tile_width(batch, self._dtype)

    def forward(
        self,
        batch: int,
        waits_for: tuple[int, ...],
        *,
        values: Slot,
        x: Slot,
        out: Slot,
        bias: Slot | None,
        is_packed: bool,
        rectifies: bool,
        scratch: Slot = _SCRATCH,
    ) -> Product:
        """The output, (batch, rows) or packed; negative outputs become 0 if `rectifies`."""
        arguments: dict[str, Argument] = {"values": values, "x": x, "out": out, "positive": 0}
        arguments |= {"addend": 0, "scratch": scratch}
        arguments |= {"is_packed": int(is_packed), "rectifies": int(rectifies)}
        arguments["bias"] = 0 if bias is None else bias
        return self._multiply(self._products._active, batch, waits_for, arguments)

    def input_gradient(
        self,
        batch: int,
        waits_for: tuple[int, ...],
        *,
        values: Slot,
        gradient: Slot,
        out: Slot,
        is_packed: bool,
        positive: Slot | None = None,
        addend: Slot | None = None,
    ) -> Product:
        """The input gradient, (batch, width) or packed.

        It is 0 where `positive`, packed, is not positive. `addend`, packed, is added.
        """
        arguments: dict[str, Argument] = {"values": values, "x": gradient, "out": out, "bias": 0}
        arguments |= {"is_packed": int(is_packed), "rectifies": 0}
        arguments["positive"] = 0 if positive is None else positive
        arguments |= {"addend": 0 if addend is None else addend, "scratch": _SCRATCH}
        return self._multiply(self._products._transposed, batch, waits_for, arguments)

    def _multiply(
        self, layout: Any, batch: int, waits_for: tuple[int, ...], arguments: dict[str, Argument]
    ) -> Product:
        width = self.width(batch)
        tiles, registers = -(-batch // width), registers_of(width, self._dtype)
        complete = arguments | {
            "layout": address_of(layout._record),
            "max_chunk_rows": layout.max_chunk_rows,
            "tiles": tiles,
            "registers": registers,
            "batch": batch,
        }
        work = int(layout.chunk_entries[-1] - layout.chunk_entries[0]) * tiles * registers
        scratch = 0 if arguments["is_packed"] else layout.max_chunk_rows * width
        return Product(Stage("multiply", complete, work, waits_for), scratch * self._dtype.itemsize)

    def weight_gradient(
        self, batch: int, waits_for: tuple[int, ...], *, gradient: Slot, x: Slot, out: Slot
    ) -> Product:
        """The weight gradient on B."""
        active, exploring = self._products._active, self._products._exploring
        width = self.width(batch)
        tiles, registers = -(-batch // width), registers_of(width, self._dtype)
        has_other = exploring.stop > exploring.start
        arguments: dict[str, Argument] = {
            "layout": address_of(active._record),
            "other": address_of(exploring._record) if has_other else 0,
            "columns": address_of(active.columns),
            "other_columns": address_of(exploring.columns),
            "pitch": active.pitch,
            "stride": registers * VECTOR_BYTES,
            "x": x,
            "y": gradient,
            "out": out,
            "image_groups": tiles,
            "image_group_length": active.width * registers,
            "plane_length": registers,
            "leading_zeros": 0,
            "positions": registers,
            "registers": registers,
        }
        return Product(Stage("sample", arguments, exploring.stop * tiles * registers, waits_for), 0)


class UnitStages:
    """Products with units of r × 1; methods as those of :class:`WeightStages`."""

    def __init__(self, products: UnitLinearProducts, dtype: Any) -> None:
        self._products, self._dtype = products, dtype
        self._rows = products.rows
        self._zeros: Vector | None = None  # the bias of layers without one

    def width(self, batch: int) -> int:
        return self._products.packed_shape((batch, 1), self._dtype)[2]

    def forward(
        self,
        batch: int,
        waits_for: tuple[int, ...],
        *,
        values: Slot,
        x: Slot,
        out: Slot,
        bias: Slot | None,
        is_packed: bool,
        rectifies: bool,
        scratch: Slot = _SCRATCH,
    ) -> Product:
        products = self._products
        if bias is None and self._zeros is None:
            self._zeros = np.zeros(products.shape[0], self._dtype)
        arguments: dict[str, Any] = describe_multiply(
            products._active,
            self._rows,
            products._indices,
            self._planes(batch, is_packed),
            default_threads(),
        )
        slots = {"values": values, "x": x, "out": out, "scratch": scratch}
        start = bias if self._zeros is None or bias is not None else address_of(self._zeros)
        return self._product(
            "unit multiply",
            arguments | slots | {"bias": start, "rectifies": int(rectifies)},
            products._active.stop - products._active.start,
            waits_for,
        )

    def input_gradient(
        self,
        batch: int,
        waits_for: tuple[int, ...],
        *,
        values: Slot,
        gradient: Slot,
        out: Slot,
        is_packed: bool,
        positive: Slot | None = None,
        addend: Slot | None = None,
    ) -> Product:
        active = self._products._active
        arguments: dict[str, Any] = describe_scatter(
            active,
            self._rows,
            self._products._indices,
            self._planes(batch, is_packed),
            default_threads(),
        )
        slots = {"values": values, "y": gradient, "out": out, "scratch": _SCRATCH}
        others = {
            "positive": 0 if positive is None else positive,
            "addend": 0 if addend is None else addend,
        }
        units = active.stop - active.start
        return self._product("unit scatter", arguments | slots | others, units, waits_for)

    def weight_gradient(
        self, batch: int, waits_for: tuple[int, ...], *, gradient: Slot, x: Slot, out: Slot
    ) -> Product:
        products = self._products
        arguments: dict[str, Any] = describe_sample(
            products._active,
            products._exploring,
            self._rows,
            products._indices,
            self._planes(batch, False),
            default_threads(),
        )
        slots = {"y": gradient, "x": x, "out": out}
        return self._product("unit sample", arguments | slots, len(products._indices), waits_for)

    def _planes(self, batch: int, is_packed: bool) -> Planes:
        width = self.width(batch)
        registers = width * self._dtype.itemsize // VECTOR_BYTES
        tiles = -(-batch // width)
        sizes = tiles, self._products.shape[1], registers, registers, registers
        return Planes(*sizes, is_linear=True, batch=0 if is_packed else batch)

    def _product(
        self, kernel: str, arguments: dict[str, Any], units: int, waits_for: tuple[int, ...]
    ) -> Product:
        vectors = arguments["groups"] * arguments["registers"] * self._rows
        stage = Stage(kernel, arguments, units * vectors, waits_for)
        return Product(stage, arguments["scratch_bytes"])
