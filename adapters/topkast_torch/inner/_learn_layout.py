"""What an inner optimizer keeps for each weight, learned from trials of fresh optimizers."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import UnsupportedOptimizerError
from topkast_torch.inner._fresh import attributes_of, fresh_optimizer, is_store, name_of, take_step
from topkast_torch.inner._inner_state import (
    Layout,
    Path,
    Shape,
    Spec,
    Start,
    entries_of,
    map_tree,
    renew,
    walk,
)

_SIZES = 67, 139  # of two trials: lengths that differ are those of the weights
_STEPS = 3


def learn_layout(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dimensions: int
) -> Layout:
    """The layout for weights with a number of dimensions, from trials of fresh optimizers.

    Raises :class:`topkast.UnsupportedOptimizerError` for entries that depend on all weights, or
    on their number, without being one value each: they cannot follow B.
    """
    small, large = (_Run.random(optimizer, group, dimensions, size) for size in _SIZES)
    before = copy.deepcopy(_plain(attributes_of(small.fresh)))
    for _ in range(_STEPS):
        small.step()
        large.step()
    if not {"state", "param_groups"} <= set(small.fresh.state_dict()):
        raise UnsupportedOptimizerError(
            f"{name_of(optimizer)} has a state dict of its own form: without 'state' and "
            "'param_groups' it cannot be saved on B"
        )
    _check_elsewhere(optimizer, small, large)
    _check_objects(optimizer, small)
    specs = _find_specs(optimizer, small, large)
    starts = _find_starts(optimizer, group, dimensions, specs)
    after = attributes_of(small.fresh)
    stores = {path[0] for path in specs}
    counted = [
        name
        for name, value in after.items()
        if name not in stores and _differs(before, name, value)
    ]
    fixed = frozenset(small.entries(_stores_of(small.fresh))) - specs.keys()
    layout = Layout(specs, fixed, starts, True, tuple(counted))
    for name in counted:
        if not is_plain(after[name]):
            raise UnsupportedOptimizerError(
                f"{name_of(optimizer)} changes its attribute {name} at each step, a "
                f"{type(after[name]).__name__} that a state dict cannot hold"
            )
    return replace(layout, starts_suffice=_starts_alike(optimizer, group, dimensions, layout))


class _Run:
    """A fresh optimizer for one vector, with gradients that are drawn or given."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        group: Mapping[str, Any],
        dimensions: int,
        values: Tensor,
    ) -> None:
        self._optimizer, self._device = optimizer, device_of(group)
        shape = (1,) * (dimensions - 1) + (-1,)
        self.param = Parameter(values.to(self._device).reshape(shape))
        self.fresh = fresh_optimizer(optimizer, group, [self.param])
        self._generator = torch.Generator().manual_seed(3)

    @classmethod
    def random(
        cls,
        optimizer: torch.optim.Optimizer,
        group: Mapping[str, Any],
        dimensions: int,
        size: int,
    ) -> _Run:
        generator = torch.Generator().manual_seed(2)
        values = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        return cls(optimizer, group, dimensions, values)

    def draw(self) -> Tensor:
        size = self.param.numel()
        return torch.randn(size, generator=self._generator, dtype=torch.float32, device="cpu")

    def step(self, gradient: Tensor | None = None) -> None:
        gradient = self.draw() if gradient is None else gradient
        self.param.grad = gradient.to(self._device).reshape(self.param.shape)
        take_step(self._optimizer, self.fresh, self._device)

    def entries(self, stores: tuple[str, ...]) -> dict[Path, list[Tensor]]:
        """What is kept for the vector, by path."""
        found: dict[Path, list[Tensor]] = {}
        for path, entry in walk(entries_of(self.fresh, self.param, stores)):
            found.setdefault(path, []).append(entry)
        return found


def device_of(group: Mapping[str, Any]) -> torch.device:
    """Where the tensors of a group are."""
    param = next(iter(group["params"]), None)
    return torch.device("cpu") if param is None or param.is_meta else param.device


def _stores_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Attributes that are dictionaries by Parameter, as ``state`` is."""
    attributes = attributes_of(optimizer)
    return ("state", *(name for name, value in attributes.items() if is_store(value)))


def _find_specs(optimizer: torch.optim.Optimizer, small: _Run, large: _Run) -> dict[Path, Spec]:
    stores = _stores_of(small.fresh)
    first, second = small.entries(stores), large.entries(stores)
    specs: dict[Path, Spec] = {}
    for path in {**first, **second}:
        shapes = [
            [tuple(entry.shape) for entry in entries.get(path, [])] for entries in (first, second)
        ]
        if shapes[0] == shapes[1]:
            continue  # the same whatever the number of weights
        candidates = {
            _find_spec(one, other, tuple(small.param.shape), tuple(large.param.shape))
            for one, other in zip(*shapes, strict=False)
        }
        spec = next(iter(candidates)) if len(candidates) == 1 else None
        if spec is None or len(shapes[0]) != len(shapes[1]):
            raise UnsupportedOptimizerError(
                f"{name_of(optimizer)} keeps {_written(path)} of shape {shapes[0][:1]} for a "
                f"vector of {_SIZES[0]} weights, which is not one value for each: it cannot be "
                "carried over when the weights that are trained change"
            )
        specs[path] = spec
    return specs


def _find_spec(one: Shape, other: Shape, shape: Shape, other_shape: Shape) -> Spec | None:
    if len(one) != len(other):
        return None
    for leading in range(len(one)):
        for middle, other_middle, flat in (
            (shape, other_shape, False),
            (shape[-1:], other_shape[-1:], True),
        ):
            stop = leading + len(middle)
            if (
                one[leading:stop] == middle
                and other[leading:stop] == other_middle
                and one[:leading] == other[:leading]
                and one[stop:] == other[stop:]
            ):
                return Spec(leading, flat)
    return None


def _check_elsewhere(optimizer: torch.optim.Optimizer, small: _Run, large: _Run) -> None:
    """Refuse values per weight where they belong to no Parameter."""
    stores = _stores_of(small.fresh)
    elsewhere: dict[str, list[dict[Any, Any]]] = {
        "attribute": [
            {n: v for n, v in attributes_of(run.fresh).items() if n not in stores}
            for run in (small, large)
        ],
        "state": [
            {k: v for k, v in run.fresh.state.items() if k is not run.param}
            for run in (small, large)
        ],
        "group": [
            {n: v for n, v in run.fresh.param_groups[0].items() if n != "params"}
            for run in (small, large)
        ],
    }
    for kind, pair in elsewhere.items():
        first, second = (
            [(path, tuple(entry.shape)) for path, entry in walk(tree)] for tree in pair
        )
        for one, other in zip(first, second, strict=False):
            if one != other:
                raise UnsupportedOptimizerError(
                    f"{name_of(optimizer)} keeps values per weight in its {kind} "
                    f"{_written(one[0])}, where they belong to no Parameter: they cannot be "
                    "carried over when the weights that are trained change"
                )


def _check_objects(optimizer: torch.optim.Optimizer, run: _Run) -> None:
    """Refuse objects in the state that may hold anything, matrices of other sizes among them."""

    def check(path: Path, leaf: Any) -> Any:
        if not is_plain(leaf):
            raise UnsupportedOptimizerError(
                f"{name_of(optimizer)} keeps {_written(path)} for each tensor, a "
                f"{type(leaf).__name__}: what it holds cannot be carried over when the weights "
                "that are trained change"
            )
        return leaf

    map_tree(check, entries_of(run.fresh, run.param, _stores_of(run.fresh)))


def _find_starts(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    dimensions: int,
    specs: Mapping[Path, Spec],
) -> dict[Path, float | Start]:
    """What a fresh optimizer writes first, and what it has after a step without a gradient."""
    written, still = (_Run.random(optimizer, group, dimensions, _SIZES[0]) for _ in range(2))
    watched = _FirstWrites()
    written.fresh.state[written.param] = watched
    before = still.param.detach().clone()
    written.step()
    still.step(torch.zeros(_SIZES[0], dtype=torch.float32, device="cpu"))
    at_rest = still.entries(tuple(dict.fromkeys(str(path[0]) for path in specs)))
    starts: dict[Path, float | Start] = {}
    for path, spec in specs.items():
        first = watched.first.get(path[1]) if len(path) == 2 and path[0] == "state" else None
        entry = next(iter(at_rest.get(path, [])), None)
        weights = before, still.param.detach()
        if any(
            _equals(spec, candidate, weight)
            for candidate in (first, entry)
            if isinstance(candidate, Tensor)
            for weight in weights
        ):
            starts[path] = Start.WEIGHT
        elif isinstance(first, Tensor) and _constant(first) is not None:
            starts[path] = _constant(first) or 0.0
        elif entry is not None:
            starts[path] = _constant(entry) or 0.0
        else:
            starts[path] = 0.0
    return starts


def _equals(spec: Spec, entry: Tensor, weight: Tensor) -> bool:
    axis = spec.axis(tuple(weight.shape))
    if entry.dim() <= axis or entry.shape[axis] != weight.numel():
        return False  # what was written first was something else
    columns = entry.movedim(axis, -1).reshape(-1, weight.numel())
    if _constant(weight) is not None:
        return False  # an optimizer that clears weights
    return bool((columns == weight.reshape(1, -1)).all())


def _constant(entry: Tensor) -> float | None:
    flat = entry.detach().reshape(-1)
    if flat.numel() and bool((flat == flat[0]).all()) and not flat.is_complex():
        return float(flat[0])
    return None


def _starts_alike(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    dimensions: int,
    layout: Layout,
) -> bool:
    """Whether entries that start as the layout says are, a step later, those of a fresh one."""
    old = _Run.random(optimizer, group, dimensions, _SIZES[0])
    for _ in range(_STEPS):
        old.step()
    entrants = torch.arange(1, _SIZES[0], 2, device=old.param.device)
    renew(entries_of(old.fresh, old.param, layout.stores), layout, old.param, entrants)
    young = _Run(optimizer, group, dimensions, old.param.detach().reshape(-1).clone())
    gradient = old.draw()
    old.step(gradient)
    young.step(gradient)
    expected, found = young.entries(layout.stores), old.entries(layout.stores)
    for path, spec in layout.specs.items():
        if path not in expected:
            continue
        for one, other in zip(expected[path], found.get(path, []), strict=False):
            axis = spec.axis(tuple(old.param.shape))
            first, second = (
                entry.index_select(axis, entrants.to(entry.device)).double()
                for entry in (one, other)
            )
            scale = float(first.abs().max()) if first.numel() else 0.0
            if float((first - second).abs().max()) > 1e-4 * scale:
                return False
    return True


class _FirstWrites(dict[Hashable, Any]):
    """A state that remembers what each entry was set to first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[Hashable, Any] = {}

    def __setitem__(self, name: Hashable, value: Any) -> None:
        self.first.setdefault(name, value.clone() if isinstance(value, Tensor) else value)
        super().__setitem__(name, value)

    def setdefault(self, name: Hashable, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def update(self, *others: Any, **named: Any) -> None:
        for name, value in dict(*others, **named).items():
            self[name] = value


def first_writes(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], params: list[Parameter]
) -> list[dict[Hashable, Any]]:
    """What a fresh optimizer writes first into its state for each of `params`, at zero gradients.

    Nothing of `optimizer` or `params` changes.
    """
    device = device_of(group)
    stand_ins = [Parameter(param.detach().clone()) for param in params]
    fresh = fresh_optimizer(optimizer, group, stand_ins)
    watched = [_FirstWrites() for _ in stand_ins]
    for one, state in zip(stand_ins, watched, strict=True):
        one.grad = torch.zeros_like(one)
        fresh.state[one] = state
    take_step(optimizer, fresh, device)
    return [copy.deepcopy(state.first) for state in watched]


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether a state dict may hold `value`, and ``torch.load`` with ``weights_only`` reads it."""
    if value is None or isinstance(value, (bool, int, float, complex, str, Tensor)):
        return True
    if isinstance(value, Mapping):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return all(map(is_plain, value))
    return False


def _differs(before: Mapping[str, Any], name: str, value: Any) -> bool:
    if name not in before:
        return is_plain(value)
    one, other = before[name], value
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one, other)
    try:
        return bool(one != other)
    except (RuntimeError, ValueError):  # tensors somewhere inside
        return True


def _written(path: Path) -> str:
    return ".".join(map(str, path[1:] or path))
