"""The result of :func:`topkast.cost`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from topkast._table import format_table


@dataclass(frozen=True)
class LayerCost:
    r"""The cost of one tensor: a row of :class:`Cost`.

    Attributes
    ----------
    name, shape, positions
        As given; see :class:`topkast.analysis.Layer`.
    forward, backward
        \|A\| and \|B\| of the trained model, in weights; both are the size of a dense tensor. B are
        the weights with a gradient at each step.
    forward_flops
        FLOPs of the trained model's product for one sample.
    training_flops
        FLOPs of a training step for one sample, the mean over the steps.
    dense_forward_flops
        FLOPs of the product of the same tensor for one sample if it is dense. A training step
        takes three times as many.
    bytes
        Bytes in memory, by what they hold.
    dense_bytes
        The same for a dense tensor.
    """

    name: str
    shape: tuple[int, ...]
    positions: float
    forward: int
    backward: int
    forward_flops: float
    training_flops: float
    dense_forward_flops: float
    bytes: Mapping[str, int]
    dense_bytes: int


@dataclass(frozen=True)
class Cost:
    """The result of :func:`topkast.cost`: prints as a table, converts with :meth:`to_dict`.

    Attributes
    ----------
    method
        Name of the method.
    formula
        Its formula for the FLOPs of a training step.
    optimizer
        The inner optimizer's name.
    layers
        The cost of each tensor, in order.
    """

    method: str
    formula: str
    optimizer: str
    layers: tuple[LayerCost, ...]

    @property
    def forward_flops(self) -> float:
        """FLOPs of a forward pass of the trained model for one sample."""
        return sum(layer.forward_flops for layer in self.layers)

    @property
    def training_flops(self) -> float:
        """FLOPs of a training step for one sample, the mean over the steps."""
        return sum(layer.training_flops for layer in self.layers)

    @property
    def dense_forward_flops(self) -> float:
        """FLOPs of a forward pass of the dense model for one sample."""
        return sum(layer.dense_forward_flops for layer in self.layers)

    @property
    def dense_training_flops(self) -> float:
        """FLOPs of a dense training step for one sample, three times those of a forward pass."""
        return 3 * self.dense_forward_flops

    @property
    def forward_fraction(self) -> float:
        """Forward FLOPs as a fraction of the dense ones; 1 if there are none."""
        return _ratio(self.forward_flops, self.dense_forward_flops)

    @property
    def fraction(self) -> float:
        """Training FLOPs as a fraction of the dense ones; 1 if there are none."""
        return _ratio(self.training_flops, self.dense_training_flops)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes in memory, by what they hold."""
        parts: dict[str, int] = {}
        for layer in self.layers:
            for part, count in layer.bytes.items():
                parts[part] = parts.get(part, 0) + count
        return parts

    @property
    def total_bytes(self) -> int:
        """Bytes in memory, all in."""
        return sum(self.bytes.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of values, gradient and state in dense training with the same optimizer."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Names of tensors with two or more dimensions for which no product was counted."""
        return tuple(
            layer.name
            for layer in self.layers
            if len(layer.shape) > 1 and not layer.dense_forward_flops
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to built-in types, for JSON."""
        names = (
            "forward_flops",
            "training_flops",
            "dense_forward_flops",
            "dense_training_flops",
            "forward_fraction",
            "fraction",
            "bytes",
            "total_bytes",
            "dense_bytes",
        )
        rows = [asdict(layer) for layer in self.layers]
        fields = {"method": self.method, "formula": self.formula, "optimizer": self.optimizer}
        return fields | {name: getattr(self, name) for name in names} | {"layers": rows}

    def __str__(self) -> str:
        head = ("layer", "shape", "positions", "|A|", "|B|", "forward", "training", "of dense")
        counted = [layer for layer in self.layers if layer.dense_forward_flops]
        total = ("in all", "", "", *_sums(self.layers), *_flops(self))
        table = format_table(head, [*map(_cells, counted), total], text_columns=2)
        parts = ", ".join(f"{part} {count:,}" for part, count in self.bytes.items() if count)
        lines = [
            table,
            f"{self.method}, {self.formula}: {self.fraction:.4f} of the training FLOPs of dense "
            f"training, {self.forward_fraction:.4f} of the forward FLOPs",
            f"bytes: {parts}; {self.total_bytes:,} in all, dense {self.dense_bytes:,} "
            f"({_ratio(self.total_bytes, self.dense_bytes):.2f} ×), {self.optimizer}",
        ]
        if self.uncounted:
            lines.append(f"no product counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def _cells(layer: LayerCost) -> tuple[str, ...]:
    dense = 3 * layer.dense_forward_flops
    return (
        layer.name,
        "×".join(map(str, layer.shape)),
        f"{layer.positions:,g}",
        f"{layer.forward:,}",
        f"{layer.backward:,}",
        _short(layer.forward_flops),
        _short(layer.training_flops),
        f"{_ratio(layer.training_flops, dense):.4f}",
    )


def _sums(layers: tuple[LayerCost, ...]) -> tuple[str, str]:
    forward, backward = (
        sum(getattr(layer, name) for layer in layers) for name in ("forward", "backward")
    )
    return f"{forward:,}", f"{backward:,}"


def _flops(cost: Cost) -> tuple[str, str, str]:
    return _short(cost.forward_flops), _short(cost.training_flops), f"{cost.fraction:.4f}"


def _short(flops: float) -> str:
    """Three digits and a prefix: 8.18 G."""
    prefixes = ["", " k", " M", " G", " T", " P"]
    while flops >= 999.5 and len(prefixes) > 1:
        flops /= 1000
        prefixes.pop(0)
    return f"{flops:.3g}{prefixes[0]}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
