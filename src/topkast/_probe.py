"""Probes of an optimizer: how it updates a tensor, found by running it on small tensors.

An adapter provides trials, each with a fresh optimizer of the user's type. The checks and the
traits that are derived from the trials are the same for all adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from topkast._age import Betas, kappa
from topkast._errors import UnsupportedOptimizerError
from topkast.selection._distribution import Shape

HostArray: TypeAlias = np.ndarray[Any, Any]
HostArrays: TypeAlias = dict[str, HostArray]

# Optimizers that factor tensors do so from a minimum number of rows and columns, usually 128. The
# upper limits keep the cost of a trial to milliseconds.
_MIN_AXIS, _MAX_AXIS, _MAX_ENTRIES = 130, 1030, 1 << 21
_SMALL_AXIS = 9
_STEPS_ON_SMALL, _STEPS_ON_LARGE = 50, 3  # some optimizers use the matrix only after 25 steps
_TOLERANCE = 1e-4  # relative to the largest update: reductions over a tensor round differently
_ENTRIES = 256  # length of the vectors on which entrants are tried
_STEPS, _STEPS_OF_ENTRANTS = 100, 12
# RMS differences of logarithms: below the first, entrants move like a new tensor; below the second,
# betas explain how they move, if they do so better than none.
_EQUAL, _SIMILAR = 0.1, 0.33


class Trial(Protocol):
    """A fresh optimizer with its own tensors, float32 or float64, by name."""

    def step(self, grads: HostArrays) -> list[HostArrays]:
        """Take one step; return the displacements of the tensors, then of copies in the state."""

    def renew(self, entrants: HostArray) -> None:
        """Reset the state of the flagged entries in every tensor, as when they enter B."""


class Traits(NamedTuple):
    """The properties of an optimizer that the training loop depends on."""

    betas: Betas | None = None  # if their bias corrections make entrants move too fast
    ascends: bool = False  # whether it moves along the gradient instead of against it


def check_permutation(
    start: Callable[[HostArrays], Trial],
    shapes: Mapping[str, Shape],
    name: str,
    steps: int = _STEPS_ON_SMALL,
) -> None:
    """Raise :class:`UnsupportedOptimizerError` unless permuting coordinates permutes the update.

    Tensors with shapes similar to the user's `shapes` are compared with their permuted entries as
    one row, the layout that the optimizer is given in training. Small tensors are tried for `steps`
    steps. `name` is the optimizer's.
    """
    # Small tensors come first: an optimizer that keeps a matrix for each axis must not get a long
    # axis.
    small = {key: _trial_shape(shape, _SMALL_AXIS, _SMALL_AXIS) for key, shape in shapes.items()}
    moved = _compare(start, small, name, steps)
    if shapes and not moved:
        raise UnsupportedOptimizerError(
            f"{name} did not move a tensor by finite numbers in {steps} steps with random "
            "gradients, so it cannot be shown to be elementwise: pass probe=False if you know "
            "that it is"
        )
    _compare(start, trial_shapes(shapes), name, _STEPS_ON_LARGE)


def _compare(
    start: Callable[[HostArrays], Trial], shapes: Mapping[str, Shape], name: str, steps: int
) -> bool:
    """Compare steps on tensors of these shapes and on rows of their entries; whether any moved."""
    generator = np.random.default_rng(0)
    orders = {key: generator.permutation(math.prod(shape)) for key, shape in shapes.items()}

    def draw() -> HostArrays:
        return {key: generator.standard_normal(shape) for key, shape in shapes.items()}

    def permuted(tensors: HostArrays) -> HostArrays:
        return {
            key: tensor.reshape(-1)[orders[key]].reshape(compact_shape(shapes[key]))
            for key, tensor in tensors.items()
        }

    first, moved = draw(), False
    whole, row = start(first), start(permuted(first))
    for _ in range(steps):
        gradient = draw()
        expected, compact = permuted(whole.step(gradient)[0]), row.step(permuted(gradient))[0]
        if not all(np.isfinite(update).all() for update in expected.values()):
            break  # the user's learning rate may be too large for random gradients
        for key, shape in shapes.items():
            largest = float(np.abs(expected[key]).max(initial=0.0))
            difference = float(np.abs(expected[key] - compact[key]).max(initial=0.0))
            moved |= largest > 0
            if not difference <= _TOLERANCE * largest:
                share = difference / largest if largest else math.inf
                raise UnsupportedOptimizerError(
                    f"{name} does not treat a tensor as a bag of coordinates: permuting a tensor "
                    f"of shape {shape} into one row changes its update by {share:.1e} of the "
                    "update. The optimizer uses rows, columns, the shape or the whole matrix (as "
                    "Muon, Shampoo and Adafactor do), but Top-KAST hands it a vector of the "
                    "weights in B. Wrap an elementwise optimizer (Adam, SGD, ...), or pass "
                    "probe=False if it adds noise"
                )
    return moved


def check_joint(
    start: Callable[[HostArrays], Trial], keys: Sequence[str], joint: str, name: str
) -> None:
    """Raise :class:`UnsupportedOptimizerError` unless tensors may be joined into one vector.

    A rule that normalises by tensor (LAMB, LARS, clipping by block) updates the tensors `keys` and
    their concatenation `joint` differently.
    """
    generator = np.random.default_rng(2)
    sizes = [3 + 2 * number for number in range(len(keys))]

    def draw() -> list[HostArray]:
        return [
            np.float64(10.0**-number) * generator.standard_normal((1, size))
            for number, size in enumerate(sizes)
        ]

    def by_key(rows: list[HostArray]) -> HostArrays:
        return dict(zip(keys, rows, strict=True))

    first = draw()
    separate, joined = start(by_key(first)), start({joint: np.concatenate(first, axis=1)})
    for _ in range(_STEPS_ON_LARGE):
        gradients = draw()
        separate_updates = separate.step(by_key(gradients))[0]
        joint_update = joined.step({joint: np.concatenate(gradients, axis=1)})[0][joint]
        segments = np.split(joint_update.reshape(-1), np.cumsum(sizes)[:-1])
        for key, segment in zip(keys, segments, strict=True):
            expected = separate_updates[key].reshape(-1)
            if not np.abs(expected - segment).max() <= _TOLERANCE * np.abs(expected).max():
                raise UnsupportedOptimizerError(
                    f"{name} normalises by tensor, but distribution='global' hands it one vector "
                    "of all tensors: choose distribution='uniform' or 'erk', or another optimizer"
                )


def compact_shape(shape: Shape) -> Shape:
    """(1, …, 1, n): the shape in which an optimizer gets the n entries of a tensor."""
    return (1,) * (len(shape) - 1) + (math.prod(shape),)


def trial_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes like the given ones, large enough to trigger factoring.

    For each number of dimensions, one tensor is as large as the user's largest, up to a limit; the
    others have the smallest size that is factored.
    """
    largest: dict[int, str] = {}
    for name, shape in shapes.items():
        best = largest.setdefault(len(shape), name)
        if _longest_axes(shape) > _longest_axes(shapes[best]):
            largest[len(shape)] = name
    return {
        name: _trial_shape(
            shape, _MIN_AXIS, _MAX_AXIS if name == largest[len(shape)] else _MIN_AXIS
        )
        for name, shape in shapes.items()
    }


def _longest_axes(shape: Shape) -> list[int]:
    return sorted(shape, reverse=True)[:2]


def _trial_shape(shape: Shape, min: int, max: int) -> Shape:  # noqa: A002 - the words for it
    """Clamp the two longest axes of `shape` to between `min` and `max`, and shorten the others."""
    long = sorted(range(len(shape)), key=lambda axis: shape[axis], reverse=True)[:2]
    # The two lengths differ, so that a rule that confuses rows and columns is caught.
    sizes = {
        axis: sorted([min + rank, shape[axis], max + rank])[1] for rank, axis in enumerate(long)
    }
    room = _MAX_ENTRIES // math.prod(sizes.values())
    for axis in set(range(len(shape))) - set(long):
        sizes[axis] = sorted([1, shape[axis], 3, room])[1] if room else 1
        room //= sizes[axis]
    return tuple(sizes[axis] for axis in range(len(shape)))


def observe(
    start: Callable[[HostArrays], Trial],
    candidates: Mapping[str, Sequence[Betas]],
    dimensions: Mapping[str, int],
) -> dict[str, Traits]:
    """Determine the traits of an optimizer on each tensor, by name.

    After some steps the state of half of the entries is reset, as when they enter B. Their
    displacements are compared with those of settled entries, with those of a new tensor under the
    same gradients, and with those of Adam under each candidate pair of betas. `dimensions` are the
    numbers of dimensions of the tensors.
    """
    generator = np.random.default_rng(1)
    entrants = np.arange(_ENTRIES) % 2 == 1
    signs = generator.choice([-1.0, 1.0], _ENTRIES)
    sizes = np.repeat(generator.uniform(0.5, 2.0, _ENTRIES // 2), 2)  # equal for both halves

    def draw() -> HostArray:
        noise = np.repeat(generator.standard_normal(_ENTRIES // 2), 2)
        return (signs * sizes * (1 + 0.3 * noise)).astype(np.float32)

    def for_all(vector: HostArray) -> HostArrays:
        shapes = {count: (1,) * (count - 1) + (-1,) for count in dimensions.values()}
        shared = {count: vector.reshape(shape) for count, shape in shapes.items()}
        return {key: shared[count] for key, count in dimensions.items()}

    if not any(candidates.values()):
        gradients = [draw() for _ in range(_STEPS_OF_ENTRANTS)]
    else:
        gradients = [draw() for _ in range(_STEPS)]
        gradients += gradients[:_STEPS_OF_ENTRANTS]
    trial = start(for_all(generator.standard_normal(_ENTRIES).astype(np.float32) * 0.01))
    moved: dict[str, list[list[HostArray]]] = {key: [] for key in dimensions}
    for number, gradient in enumerate(gradients):
        if number == _STEPS:
            trial.renew(entrants)
        displacements = trial.step(for_all(gradient))
        for key in dimensions:
            moved[key].append([step[key].reshape(-1) for step in displacements if key in step])
    traits = {}
    for key in dimensions:
        along_gradient = sum(
            float(np.vdot(gradient, steps[0]))
            for gradient, steps in zip(gradients, moved[key], strict=True)
        )
        betas = None
        # Some optimizers move a copy of the tensor in their state.
        for tensor_steps in zip(*moved[key], strict=False) if candidates[key] else ():
            betas = betas or _find_betas(tensor_steps, candidates[key], gradients, entrants)
        traits[key] = Traits(betas, along_gradient > 0)
    return traits


def _find_betas(
    moved: Sequence[HostArray],
    candidates: Sequence[Betas],
    gradients: Sequence[HostArray],
    entrants: HostArray,
) -> Betas | None:
    """Find the betas whose corrections explain how entrants move; None if no scaling is needed.

    They either make scaled entrants move like a new tensor or, if a new tensor differs in other
    ways too, make Adam's entrants move like the optimizer's.
    """
    late = np.arange(_STEPS, _STEPS + _STEPS_OF_ENTRANTS)
    with np.errstate(all="ignore"):
        sizes = [np.abs(step) for step in moved]
        ratios = np.log([sizes[n][entrants].mean() / sizes[n][~entrants].mean() for n in late])
        settled = np.mean([size.mean() for size in sizes[_STEPS - len(late) : _STEPS]])
        new = np.log([size.mean() / settled for size in sizes[: len(late)]])

        def distance(first: HostArray, second: HostArray) -> float:
            return float(np.sqrt(np.mean((first - second) ** 2)))

        unscaled = distance(ratios, new)
        if unscaled < _EQUAL:
            return None
        counts = np.arange(1.0, 1 + len(late))
        best, smallest = None, min(_SIMILAR, unscaled)  # not the second if it is NaN
        for betas in candidates:
            scaled = ratios + np.log(kappa(counts, betas) / kappa(late + 1.0, betas))
            adam = np.log(_adam_ratios(betas, gradients, entrants))
            # A NaN compares as false, and its candidate is skipped.
            for difference in (distance(scaled, new), distance(ratios, adam)):
                if difference < smallest:
                    best, smallest = betas, difference
        return best


def beta_pairs(betas: Sequence[float]) -> list[Betas]:
    """Pairs of factors (of the mean, of the square) that an optimizer with these betas may use."""
    if not all(0 <= beta < 1 for beta in betas):
        return []
    return [(mean, float(square)) for square in betas[1:] for mean in (float(betas[0]), 0.0)]


def _adam_ratios(betas: Betas, gradients: Sequence[HostArray], entrants: HostArray) -> list[float]:
    """Displacement of entrants over that of settled entries under Adam, by step."""
    mean, square, ratios = np.zeros(_ENTRIES), np.zeros(_ENTRIES), []
    for number, gradient in enumerate(gradients):
        if number == _STEPS:
            mean, square = np.where(entrants, 0, mean), np.where(entrants, 0, square)
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        if number >= _STEPS:
            size = np.abs(mean) / np.sqrt(square)
            ratios.append(float(size[entrants].mean() / size[~entrants].mean()))
    return ratios
