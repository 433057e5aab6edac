"""Inspection of a wrapped optimizer in any framework: masks, weights, a summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from array_api_compat import array_namespace

from topkast._errors import MismatchError
from topkast._primitives import Array, device
from topkast._table import format_table
from topkast._tensors import RankedTensors
from topkast.selection._compact import scatter
from topkast.selection._distribution import Shape
from topkast.selection._support import Support, in_forward

Parts: TypeAlias = Mapping[str, int]  # bytes by what they hold


def find_states(x: Any, method: str = "__topkast_inspect__") -> list[Any]:
    """Find the states of wrapped optimizers in `x`, which may be such a state itself.

    The search enters tuples, lists, dictionaries and the ``opt_state`` of a training state. Raises
    :class:`MismatchError` if it finds no state, or one without the given `method`.
    """
    states = list(_states_in(x))
    if states and all(hasattr(state, method) for state in states):
        return states
    name = type(x).__name__
    if states:
        raise MismatchError(
            f"{name} is a PyTorch optimizer, whose model holds the forward view already: "
            "forward_params expects params and the state of a functional optimizer"
        )
    if callable(getattr(x, "init", None)):
        hint = f"this is the transformation: pass the state that {name}.init(params) returned"
    elif _is_restored(x):
        hint = (
            "this is a state that lost its types, as when restored from a file: restore it into "
            "the state that init(params) returns"
        )
    else:
        hint = "it contains no such state"
    raise MismatchError(
        f"expected a wrapped PyTorch optimizer, or the state that init of a wrapped optimizer "
        f"returned, got {name}: {hint}"
    )


def _states_in(x: Any) -> Iterator[Any]:
    if hasattr(x, "__topkast_inspect__"):
        yield x
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _states_in(item)
    elif isinstance(x, Mapping):
        for item in x.values():
            yield from _states_in(item)
    elif hasattr(x, "opt_state"):
        yield from _states_in(x.opt_state)


def _is_restored(x: Any) -> bool:
    """Whether `x` contains a state whose named tuples became dictionaries."""
    if isinstance(x, Mapping):
        return {"updates", "supports"} <= x.keys() or any(map(_is_restored, x.values()))
    return isinstance(x, (tuple, list)) and any(map(_is_restored, x))


def _inspect(x: Any, params: Any) -> list[Inspection]:
    return [state.__topkast_inspect__(params) for state in find_states(x)]


class Masks(NamedTuple):
    """The masks of A (`forward`) and B (`backward`): booleans of the tensor's shape."""

    forward: Array
    backward: Array


@dataclass(frozen=True)
class Inspection:
    """The data of an optimizer that the functions of this module report."""

    updates: Any  # int, or traced
    shapes: Mapping[str, Shape]  # by name, dense tensors included
    params: Callable[[], Mapping[str, Array]]  # makes θ by name, dense tensors included
    ranked: Mapping[str, RankedTensors]  # by key, as are supports and entered_active
    supports: Mapping[str, Support]
    entered_active: Mapping[str, Array]
    held: Mapping[str, Parts]  # by the optimizer; by key, or by name of a dense tensor
    model_bytes: int  # of weights and gradients that `held` does not count
    disk_bytes: Mapping[str, int] = field(default_factory=dict)  # of files, by key


@dataclass(frozen=True)
class TensorSummary:
    """One row of a :class:`Summary`."""

    name: str
    shape: tuple[int, ...]
    forward: int  # |A|, in weights
    backward: int  # |B|, in weights
    forward_sparsity: float
    backward_sparsity: float
    mask_change: float  # share of A that entered at the last refresh
    empty_rows: int  # indices of the first axis without a weight in A
    held_bytes: int  # bytes that the optimizer holds for this tensor; see summary()
    held_parts: Mapping[str, int]  # the same, by what they hold
    disk_bytes: int = 0  # bytes of the file of its weights
    has_sets: bool = False  # whether A and B are chosen, even if they are all weights at the moment


@dataclass(frozen=True)
class Summary:
    """The result of :func:`summary`: prints as a table, converts with :meth:`to_dict`."""

    updates: int
    tensors: tuple[TensorSummary, ...]
    model_bytes: int  # of the model's weights and gradients that the optimizer does not hold

    @property
    def held_bytes(self) -> int:
        """Bytes that the optimizer holds for all tensors."""
        return sum(row.held_bytes for row in self.tensors)

    @property
    def held_parts(self) -> dict[str, int]:
        """Bytes that the optimizer holds for all tensors, by what they hold."""
        parts: dict[str, int] = {}
        for row in self.tensors:
            for part, count in row.held_parts.items():
                parts[part] = parts.get(part, 0) + count
        return parts

    @property
    def disk_bytes(self) -> int:
        """Bytes of the files of ``reservoir="disk"``."""
        return sum(row.disk_bytes for row in self.tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes held by the optimizer plus those of the model's weights and gradients."""
        return self.held_bytes + self.model_bytes

    def to_dict(self) -> dict[str, Any]:
        """Convert to built-in types, for JSON."""
        rows = [asdict(row) for row in self.tensors]
        sizes = {
            "held_bytes": self.held_bytes,
            "held_parts": self.held_parts,
            "total_bytes": self.total_bytes,
            "disk_bytes": self.disk_bytes,
        }
        return {"updates": self.updates, "tensors": rows} | sizes

    def scalars(self) -> dict[str, float]:
        """Return the quantities that change in training, for loggers such as TensorBoard.

        >>> import numpy as np, topkast
        >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8)
        >>> params = {"w": np.ones((10, 10))}
        >>> topkast.summary(tx.init(params), params).scalars()
        {'updates': 0, 'mask_change/w': 0.0, 'empty_rows/w': 3}
        """
        flat: dict[str, float] = {"updates": self.updates}
        for row in self.tensors:
            if row.has_sets:
                flat[f"mask_change/{row.name}"] = row.mask_change
                flat[f"empty_rows/{row.name}"] = row.empty_rows
        return flat

    def __str__(self) -> str:
        head = (
            "tensor",
            "shape",
            "|A|",
            "|B|",
            "fwd",
            "bwd",
            "mask change",
            "empty rows",
            "bytes held",
        )
        table = format_table(head, list(map(_cells, self.tensors)), text_columns=2)
        size = sum(math.prod(row.shape) for row in self.tensors)
        active = sum(row.forward for row in self.tensors)
        parts = ", ".join(f"{part} {count:,}" for part, count in self.held_parts.items() if count)
        disk = f"; {self.disk_bytes:,} on a disk" if self.disk_bytes else ""
        return (
            f"{table}\n"
            f"{size:,} weights, {active:,} active ({1 - active / max(size, 1):.1%} zeros), "
            f"{self.held_bytes:,} bytes held, {self.total_bytes:,} in all, "
            f"{self.updates:,} updates\n"
            f"held: {parts}{disk}"
        )


def _cells(row: TensorSummary) -> tuple[str, ...]:
    return (
        row.name,
        "×".join(map(str, row.shape)) or "()",
        f"{row.forward:,}",
        f"{row.backward:,}",
        f"{row.forward_sparsity:.4f}",
        f"{row.backward_sparsity:.4f}",
        f"{row.mask_change:.2%}",
        f"{row.empty_rows:,}",
        f"{row.held_bytes:,}",
    )


def masks(x: Any, params: Any = None, /) -> dict[str, Masks]:
    """Return the masks of A and B of every sparsified tensor.

    Parameters
    ----------
    x
        A wrapped PyTorch optimizer, the state of a wrapped functional one, or an optax state that
        contains such a state.
    params
        θ, needed with a functional state, which does not hold it.

    Returns
    -------
    dict of str to Masks
        Boolean arrays of the tensors' shapes, by name; dense tensors are left out.

    Raises
    ------
    MismatchError
        If `x` is neither, or if `params` are missing, or lack a tensor of the state.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5)
    >>> params = {"w": np.asarray([[0.1, -0.9], [0.5, 0.3]])}
    >>> topkast.masks(tx.init(params), params)["w"].forward
    array([[False,  True],
           [False, False]])
    """
    masks: dict[str, Masks] = {}
    for inspection in _inspect(x, params):
        for key, ranked in inspection.ranked.items():
            support = inspection.supports[key]
            xp = array_namespace(support.indices)
            everywhere = xp.ones(
                ranked.backward_size, dtype=xp.bool, device=device(support.indices)
            )
            forward, backward = (
                ranked.unflatten(scatter(flags, support, shape=(ranked.size,), fill=False))
                for flags in (in_forward(support), everywhere)
            )
            masks |= {name: Masks(forward[name], backward[name]) for name in ranked.shapes}
    return masks


def dense_params(x: Any, params: Any = None, /) -> dict[str, Array]:
    """Return the weights θ by name: dense tensors, and all weights of sparsified ones.

    Parameters
    ----------
    x
        A wrapped PyTorch optimizer, whose model holds only the forward view α; or the state of a
        wrapped functional one.
    params
        θ, needed with a functional state.

    Returns
    -------
    dict of str to array
        Copies (PyTorch), or the arrays of `params`.

    Raises
    ------
    MismatchError
        If `x` is neither, or if `params` are missing, or lack a tensor of the state.

    Examples
    --------
    >>> import torch, topkast
    >>> layer = torch.nn.Linear(4, 4)
    >>> opt = topkast.wrap_optimizer(
    ...     torch.optim.SGD(layer.named_parameters(), 0.1), fwd=0.75, bwd=0.5)
    >>> int((layer.weight != 0).sum()), int((topkast.dense_params(opt)["weight"] != 0).sum())
    (4, 16)
    """
    theta: dict[str, Array] = {}
    for inspection in _inspect(x, params):
        theta |= inspection.params()
    return theta


def summary(x: Any, params: Any = None, /) -> Summary:
    """Report shape, counts, sparsities, mask change and bytes of every tensor.

    The mask change is the share of A that entered at the last refresh. A wrapped PyTorch optimizer
    holds the values on B, their gradient, the inner optimizer's state, the indices, the layouts
    of the products, ages, a reserve of candidates, and the reservoir; a functional state holds the
    indices, ages and the inner rule's state. The total adds the model's weights and gradients,
    which are dense for masked tensors. An empty row is an index of the first
    axis without a weight in A: a neuron, or a rare token of an embedding.

    Parameters
    ----------
    x
        A wrapped PyTorch optimizer, or the state of a wrapped functional one.
    params
        θ, needed with a functional state.

    Returns
    -------
    Summary
        Prints as a table; ``to_dict()`` for JSON, ``scalars()`` for a logger.

    Raises
    ------
    MismatchError
        If `x` is neither, or if `params` are missing, or lack a tensor of the state.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> tx = topkast.wrap_optimizer(topkast.Adam(1e-3), fwd=0.9, bwd=0.8)
    >>> params = {"w": np.ones((10, 10)), "b": np.ones(10)}
    >>> print(topkast.summary(tx.init(params), params))
    tensor  shape  |A|  |B|     fwd     bwd  mask change  empty rows  bytes held
    w       10×10   10   20  0.9000  0.8000        0.00%           3         440
    b       10      10   10  0.0000  0.0000        0.00%           0         160
    110 weights, 20 active (81.8% zeros), 600 bytes held, 3,160 in all, 0 updates
    held: state 480, indices 80, ages 40
    """
    inspections = _inspect(x, params)
    if any(not isinstance(inspection.updates, int) for inspection in inspections):
        raise MismatchError(
            "summary counts weights, which a compiled function cannot: call it on the arrays that "
            "the function returns"
        )
    rows: dict[str, TensorSummary] = {}
    for inspection in inspections:
        for name, shape in inspection.shapes.items():
            size, parts = math.prod(shape), inspection.held.get(name, {})
            row = TensorSummary(
                name, shape, size, size, 0.0, 0.0, 0.0, 0, sum(parts.values()), dict(parts)
            )
            rows.setdefault(name, row)
    for inspection in inspections:
        for key, ranked in inspection.ranked.items():
            rows |= _summarise(inspection, key, ranked)
    return Summary(
        max(inspection.updates for inspection in inspections),
        tuple(rows.values()),
        sum(inspection.model_bytes for inspection in inspections),
    )


def _summarise(inspection: Inspection, key: str, ranked: RankedTensors) -> dict[str, TensorSummary]:
    """Summarise tensors that are ranked together."""
    support = inspection.supports[key]
    rows = {}
    for number, (name, (start, stop)) in enumerate(ranked.bounds.items()):
        active, exploring = (
            entries[(entries >= start) & (entries < stop)]
            for entries in (support.active_entries, support.exploring_entries)
        )
        forward, backward = active.shape[0], active.shape[0] + exploring.shape[0]
        shape, size = tuple(ranked.shapes[name]), stop - start
        share = Fraction(backward, ranked.backward_size)
        parts = {part: round(share * count) for part, count in inspection.held[key].items()}
        xp = array_namespace(active)
        occupied = xp.unique_values((active - start) // (size // shape[0]))
        rows[name] = TensorSummary(
            name,
            shape,
            forward,
            backward,
            1 - forward / size,
            1 - backward / size,
            int(inspection.entered_active[key][number]) / max(forward, 1),
            shape[0] - occupied.shape[0],
            sum(parts.values()),
            parts,
            round(share * inspection.disk_bytes.get(key, 0)),
            has_sets=True,
        )
    return rows
