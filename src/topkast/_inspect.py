"""Looking inside a wrapped optimizer: masks, weights, a summary; the same in every framework."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from array_api_compat import array_namespace

from topkast._compact import scatter
from topkast._errors import MismatchError
from topkast._plan import Block
from topkast._primitives import Array, device
from topkast._selection import Support


def find_state(x: Any) -> Any:
    """The state of a wrapped optimizer: `x`, or the one in the containers that `x` consists of.

    Raises :class:`MismatchError` if there is none, or several.
    """
    found = list(_states_in(x))
    if len(found) != 1:
        raise MismatchError(
            f"expected a wrapped optimizer, or a state with that of one in it, and found "
            f"{len(found)} in {type(x).__name__}"
        )
    return found[0]


def _states_in(x: Any) -> Iterator[Any]:
    if hasattr(x, "__topkast_inspect__"):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _states_in(part)
    elif isinstance(x, Mapping):
        for part in x.values():
            yield from _states_in(part)


class Masks(NamedTuple):
    """Where a tensor is in A (`forward`) and in B (`backward`): booleans of its shape."""

    forward: Array
    backward: Array


@dataclass(frozen=True)
class Inspection:
    """What an adapter shows of itself to the functions of this module."""

    updates: int
    params: Mapping[str, Array]  # θ, dense tensors included, by name
    blocks: Mapping[str, Block]
    supports: Mapping[str, Support]  # by the key of the block, like the next
    changed: Mapping[str, Array]
    held: Mapping[str, int]  # bytes, by the key of the block or the name of a dense tensor


class Inspectable(Protocol):
    """A wrapped optimizer, or the state of one."""

    def __topkast_inspect__(self, params: Any) -> Inspection: ...


@dataclass(frozen=True)
class TensorSummary:
    """One row of a :class:`Summary`."""

    name: str
    shape: tuple[int, ...]
    forward: int  # |A|
    backward: int  # |B|
    forward_sparsity: float
    backward_sparsity: float
    mask_change: float  # share of A that the last refresh brought in
    held_bytes: int  # what the optimizer holds for this tensor; see summary()


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns: prints as a table, converts with :meth:`to_dict`."""

    updates: int
    tensors: tuple[TensorSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as built-in types, for JSON."""
        return {"updates": self.updates, "tensors": [asdict(row) for row in self.tensors]}

    def __str__(self) -> str:
        head = ("tensor", "shape", "|A|", "|B|", "fwd", "bwd", "mask change", "bytes held")
        rows = [head, *map(_cells, self.tensors)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        total = sum(row.held_bytes for row in self.tensors)
        size = sum(math.prod(row.shape) for row in self.tensors)
        active = sum(row.forward for row in self.tensors)
        lines.append(
            f"{size:,} weights, {active:,} active ({1 - active / max(size, 1):.1%} zeros), "
            f"{total:,} bytes held, {self.updates:,} updates"
        )
        return "\n".join(lines)


def _cells(row: TensorSummary) -> tuple[str, ...]:
    return (
        row.name,
        "×".join(map(str, row.shape)) or "()",
        f"{row.forward:,}",
        f"{row.backward:,}",
        f"{row.forward_sparsity:.4f}",
        f"{row.backward_sparsity:.4f}",
        f"{row.mask_change:.2%}",
        f"{row.held_bytes:,}",
    )


def masks(x: Inspectable, params: Any = None, /) -> dict[str, Masks]:
    """Masks of A and B of every sparsified tensor.

    Parameters
    ----------
    x
        A wrapped PyTorch optimizer, or the state of a wrapped functional one (or one of optax with
        that in it).
    params
        θ, for a functional state, which does not hold it.

    Returns
    -------
    dict of str to Masks
        Boolean arrays of the tensors' shapes, by name; dense tensors have none.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5)
    >>> params = {"w": np.asarray([[0.1, -0.9], [0.5, 0.3]])}
    >>> topkast.masks(tx.init(params), params)["w"].forward
    array([[False,  True],
           [False, False]])
    """
    inspection = find_state(x).__topkast_inspect__(params)
    found: dict[str, Masks] = {}
    for key, block in inspection.blocks.items():
        support = inspection.supports[key]
        xp = array_namespace(support.active)
        everywhere = xp.ones(block.backward, dtype=xp.bool, device=device(support.active))
        forward, backward = (
            block.unflatten(scatter(flags, support, shape=(block.size,), fill=False))
            for flags in (support.active, everywhere)
        )
        found |= {name: Masks(forward[name], backward[name]) for name in block.shapes}
    return found


def dense_params(x: Inspectable, params: Any = None, /) -> dict[str, Array]:
    """The weights θ by name, those outside A included, and dense tensors too.

    Parameters
    ----------
    x
        A wrapped PyTorch optimizer, whose model holds the forward view α alone; or the state of
        a wrapped functional one.
    params
        θ, for a functional state.

    Returns
    -------
    dict of str to array
        Copies (PyTorch), or the arrays of `params`.

    Examples
    --------
    >>> import torch, topkast
    >>> layer = torch.nn.Linear(4, 4)
    >>> opt = topkast.wrap_optimizer(
    ...     torch.optim.SGD(layer.named_parameters(), 0.1), fwd=0.75, bwd=0.5)
    >>> int((layer.weight != 0).sum()), int((topkast.dense_params(opt)["weight"] != 0).sum())
    (4, 16)
    """
    return dict(find_state(x).__topkast_inspect__(params).params)


def summary(x: Inspectable, params: Any = None, /) -> Summary:
    """Shapes, counts, sparsities, mask change and bytes of every tensor.

    The mask change is the share of A that the last refresh brought in. The bytes held are those
    of a wrapped PyTorch optimizer: compact values, their gradient, the inner optimizer's state,
    indices, and θ itself; or those of a functional state: indices and the inner rule's state.

    Parameters
    ----------
    x
        A wrapped PyTorch optimizer, or the state of a wrapped functional one.
    params
        θ, for a functional state.

    Returns
    -------
    Summary
        Prints as a table; ``to_dict()`` for JSON.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> tx = topkast.wrap_optimizer(topkast.Adam(1e-3), fwd=0.9, bwd=0.8)
    >>> params = {"w": np.ones((10, 10)), "b": np.ones(10)}
    >>> print(topkast.summary(tx.init(params), params))
    tensor  shape  |A|  |B|     fwd     bwd  mask change  bytes held
    w       10×10   10   20  0.9000  0.8000        0.00%         500
    b       10      10   10  0.0000  0.0000        0.00%         160
    110 weights, 20 active (81.8% zeros), 660 bytes held, 0 updates
    """
    inspection = find_state(x).__topkast_inspect__(params)
    rows = {
        name: TensorSummary(
            name,
            tuple(array.shape),
            math.prod(array.shape),
            math.prod(array.shape),
            0.0,
            0.0,
            0.0,
            inspection.held.get(name, 0),
        )
        for name, array in inspection.params.items()
    }
    for key, block in inspection.blocks.items():
        support = inspection.supports[key]
        for place, (name, (start, stop)) in enumerate(block.bounds.items()):
            inside = (support.indices >= start) & (support.indices < stop)
            backward = count_true(inside)
            forward = count_true(inside & support.active)
            size = stop - start
            rows[name] = TensorSummary(
                name,
                tuple(block.shapes[name]),
                forward,
                backward,
                1 - forward / size,
                1 - backward / size,
                int(inspection.changed[key][place]) / max(forward, 1),
                round(inspection.held[key] * backward / block.backward),
            )
    return Summary(inspection.updates, tuple(rows.values()))


def count_true(flags: Array) -> int:
    xp = array_namespace(flags)
    return int(xp.sum(xp.astype(flags, xp.int32)))
