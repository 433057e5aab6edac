"""Learn the layout of an inner optimizer's entries from trials of fresh optimizers."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import UnsupportedOptimizerError
from topkast_torch.inner._fresh import (
    attributes_of,
    class_name,
    first_entries,
    is_store,
    make_fresh_optimizer,
    take_step,
)
from topkast_torch.inner._inner_state import (
    Layout,
    Path,
    Shape,
    Spec,
    Start,
    entries_of,
    map_tree,
    reset_entries,
    walk,
)

_SIZES = 67, 139  # weights in two trials: axes whose lengths differ number weights
_STEPS = 3


def learn_layout(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dimensions: int
) -> Layout:
    """The layout for weights with `dimensions` dimensions, from trials of fresh optimizers.

    Raises :class:`topkast.UnsupportedOptimizerError` for entries that depend on all weights, or
    on their number, but are not one value per weight: they cannot be migrated.
    """
    small, large = (_Run.random(optimizer, group, dimensions, size) for size in _SIZES)
    before = copy.deepcopy(_select_plain(attributes_of(small.fresh)))
    for _ in range(_STEPS):
        small.step()
        large.step()
    if not {"state", "param_groups"} <= set(small.fresh.state_dict()):
        raise UnsupportedOptimizerError(
            f"{class_name(optimizer)} has a state dict without 'state' and 'param_groups': it "
            "cannot be saved on B"
        )
    _check_other_stores(optimizer, small, large)
    _check_objects(optimizer, small)
    specs = _find_specs(optimizer, small, large)
    starts = _find_starts(optimizer, group, dimensions, specs)
    after = attributes_of(small.fresh)
    stores = {path[0] for path in specs}
    counters = [
        name
        for name, value in after.items()
        if name not in stores and _differs(before, name, value)
    ]
    fixed = frozenset(small.entries(_stores_of(small.fresh))) - specs.keys()
    layout = Layout(specs, fixed, starts, True, tuple(counters))
    for name in counters:
        if not is_plain(after[name]):
            raise UnsupportedOptimizerError(
                f"{class_name(optimizer)} changes its attribute {name} at each step: it is a "
                f"{type(after[name]).__name__}, which a state dict cannot hold"
            )
    starts_suffice = _do_starts_suffice(optimizer, group, dimensions, layout)
    if not starts_suffice and first_entries(optimizer, group):
        raise UnsupportedOptimizerError(
            f"{class_name(optimizer)} writes the first entries of a weight in its constructor, "
            "from which weights that enter B cannot start: write them at a weight's first step, as "
            "torch.optim.Adam does"
        )
    return replace(layout, starts_suffice=starts_suffice)


class _Run:
    """A fresh optimizer for one vector, stepped with random or given gradients."""

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
        self.fresh = make_fresh_optimizer(optimizer, group, [self.param])
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
        """The entries for the vector, by path."""
        entries: dict[Path, list[Tensor]] = {}
        for path, entry in walk(entries_of(self.fresh, self.param, stores)):
            entries.setdefault(path, []).append(entry)
        return entries


def device_of(group: Mapping[str, Any]) -> torch.device:
    """The device of a group's tensors."""
    param = next(iter(group["params"]), None)
    return torch.device("cpu") if param is None or param.is_meta else param.device


def _stores_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Attributes that are dictionaries by Parameter, ``state`` included."""
    attributes = attributes_of(optimizer)
    return ("state", *(name for name, value in attributes.items() if is_store(value)))


def _find_specs(optimizer: torch.optim.Optimizer, small: _Run, large: _Run) -> dict[Path, Spec]:
    stores = _stores_of(small.fresh)
    small_entries, large_entries = small.entries(stores), large.entries(stores)
    specs: dict[Path, Spec] = {}
    for path in {**small_entries, **large_entries}:
        small_shapes, large_shapes = (
            [tuple(entry.shape) for entry in entries.get(path, [])]
            for entries in (small_entries, large_entries)
        )
        if small_shapes == large_shapes:
            continue  # independent of the number of weights
        candidates = {
            _find_spec(small_shape, large_shape, tuple(small.param.shape), tuple(large.param.shape))
            for small_shape, large_shape in zip(small_shapes, large_shapes, strict=False)
        }
        spec = next(iter(candidates)) if len(candidates) == 1 else None
        if spec is None or len(small_shapes) != len(large_shapes):
            raise UnsupportedOptimizerError(
                f"{class_name(optimizer)} keeps {_format_path(path)} of shape {small_shapes[:1]} "
                f"for a vector of {_SIZES[0]} weights, which is not one value for each weight: it "
                "cannot be carried over when B changes"
            )
        specs[path] = spec
    return specs


def _find_spec(small: Shape, large: Shape, small_param: Shape, large_param: Shape) -> Spec | None:
    """The weight axes of an entry, from its shapes in two trials and the shapes of the weights."""
    if len(small) != len(large):
        return None
    for leading in range(len(small)):
        for small_weights, large_weights, flat in (
            (small_param, large_param, False),
            (small_param[-1:], large_param[-1:], True),
        ):
            stop = leading + len(small_weights)
            if (
                small[leading:stop] == small_weights
                and large[leading:stop] == large_weights
                and small[:leading] == large[:leading]
                and small[stop:] == large[stop:]
            ):
                return Spec(leading, flat)
    return None


def _check_other_stores(optimizer: torch.optim.Optimizer, small: _Run, large: _Run) -> None:
    """Refuse values per weight that are not stored by Parameter."""
    stores = _stores_of(small.fresh)
    other_stores: dict[str, list[dict[Any, Any]]] = {
        "attribute": [
            {name: value for name, value in attributes_of(run.fresh).items() if name not in stores}
            for run in (small, large)
        ],
        "state": [
            {key: value for key, value in run.fresh.state.items() if key is not run.param}
            for run in (small, large)
        ],
        "group": [
            {name: value for name, value in run.fresh.param_groups[0].items() if name != "params"}
            for run in (small, large)
        ],
    }
    for location, trees in other_stores.items():
        small_shapes, large_shapes = (
            [(path, tuple(entry.shape)) for path, entry in walk(tree)] for tree in trees
        )
        for small_shape, large_shape in zip(small_shapes, large_shapes, strict=False):
            if small_shape != large_shape:
                raise UnsupportedOptimizerError(
                    f"{class_name(optimizer)} keeps values per weight in its {location} "
                    f"{_format_path(small_shape[0])}, not by Parameter: they cannot be carried "
                    "over when B changes"
                )


def _check_objects(optimizer: torch.optim.Optimizer, run: _Run) -> None:
    """Refuse objects in the state: they may hold anything, such as matrices of other sizes."""

    def check_leaf(path: Path, leaf: Any) -> Any:
        if not is_plain(leaf):
            raise UnsupportedOptimizerError(
                f"{class_name(optimizer)} keeps {_format_path(path)} for each tensor, a "
                f"{type(leaf).__name__}, whose contents cannot be carried over when B changes"
            )
        return leaf

    map_tree(check_leaf, entries_of(run.fresh, run.param, _stores_of(run.fresh)))


def _find_starts(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    dimensions: int,
    specs: Mapping[Path, Spec],
) -> dict[Path, float | Start]:
    """The start of each entry, from its first write and its value after a step at zero gradient."""
    moving, resting = (_Run.random(optimizer, group, dimensions, _SIZES[0]) for _ in range(2))
    recorder = _FirstWrites()
    if moving.param in moving.fresh.state:  # written by the constructor
        recorder.update(moving.fresh.state[moving.param])
    moving.fresh.state[moving.param] = recorder
    before = resting.param.detach().clone()
    moving.step()
    resting.step(torch.zeros(_SIZES[0], dtype=torch.float32, device="cpu"))
    at_rest = resting.entries(tuple(dict.fromkeys(str(path[0]) for path in specs)))
    starts: dict[Path, float | Start] = {}
    for path, spec in specs.items():
        first = recorder.first.get(path[1]) if len(path) == 2 and path[0] == "state" else None
        entry = next(iter(at_rest.get(path, [])), None)
        weights = before, resting.param.detach()
        if any(
            _equals(spec, candidate, weight)
            for candidate in (first, entry)
            if isinstance(candidate, Tensor)
            for weight in weights
        ):
            starts[path] = Start.WEIGHT
        elif isinstance(first, Tensor) and _constant_of(first) is not None:
            starts[path] = _constant_of(first) or 0.0
        elif entry is not None:
            starts[path] = _constant_of(entry) or 0.0
        else:
            starts[path] = 0.0
    return starts


def _equals(spec: Spec, entry: Tensor, weight: Tensor) -> bool:
    axis = spec.axis(tuple(weight.shape))
    if entry.dim() <= axis or entry.shape[axis] != weight.numel():
        return False  # the first write has another shape
    rows = entry.movedim(axis, -1).reshape(-1, weight.numel())
    if _constant_of(weight) is not None:
        return False  # an optimizer that clears weights
    return bool((rows == weight.reshape(1, -1)).all())


def _constant_of(entry: Tensor) -> float | None:
    flat = entry.detach().reshape(-1)
    if flat.numel() and bool((flat == flat[0]).all()) and not flat.is_complex():
        return float(flat[0])
    return None


def _do_starts_suffice(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    dimensions: int,
    layout: Layout,
) -> bool:
    """Whether entries reset by the layout equal a fresh optimizer's after one step."""
    old = _Run.random(optimizer, group, dimensions, _SIZES[0])
    for _ in range(_STEPS):
        old.step()
    entrants = torch.arange(1, _SIZES[0], 2, device=old.param.device)
    reset_entries(entries_of(old.fresh, old.param, layout.stores), layout, old.param, entrants)
    young = _Run(optimizer, group, dimensions, old.param.detach().reshape(-1).clone())
    gradient = old.draw()
    old.step(gradient)
    young.step(gradient)
    young_entries, old_entries = young.entries(layout.stores), old.entries(layout.stores)
    for path, spec in layout.specs.items():
        if path not in young_entries:
            continue
        pairs = zip(young_entries[path], old_entries.get(path, []), strict=False)
        for young_entry, old_entry in pairs:
            axis = spec.axis(tuple(old.param.shape))
            expected, actual = (
                entry.index_select(axis, entrants.to(entry.device)).double()
                for entry in (young_entry, old_entry)
            )
            scale = float(expected.abs().max()) if expected.numel() else 0.0
            if float((expected - actual).abs().max()) > 1e-4 * scale:
                return False
    return True


class _FirstWrites(dict[Hashable, Any]):
    """A state that records the first value written to each entry."""

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


def find_first_writes(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], params: list[Parameter]
) -> list[dict[Hashable, Any]]:
    """The first values that a fresh optimizer writes into its state for each of `params`.

    Gradients are zero. Neither `optimizer` nor `params` change.
    """
    device = device_of(group)
    copies = [Parameter(param.detach().clone()) for param in params]
    fresh = make_fresh_optimizer(optimizer, group, copies)
    recorders = [_FirstWrites() for _ in copies]
    for param, recorder in zip(copies, recorders, strict=True):
        param.grad = torch.zeros_like(param)
        fresh.state[param] = recorder
    take_step(optimizer, fresh, device)
    return [copy.deepcopy(recorder.first) for recorder in recorders]


def _select_plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` can read `value`."""
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
    old = before[name]
    if isinstance(old, Tensor) and isinstance(value, Tensor):
        return not torch.equal(old, value)
    try:
        return bool(old != value)
    except (RuntimeError, ValueError):  # containers of tensors
        return True


def _format_path(path: Path) -> str:
    return ".".join(map(str, path[1:] or path))
