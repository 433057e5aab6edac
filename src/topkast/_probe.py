"""What an optimizer does to a tensor, found by trying it: the core of every adapter's probe.

An adapter brings trials, in each of which a fresh optimizer of the user's kind steps on small
tensors; what the trials must show, and what follows from them, is said here once.
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

# What factors tensors does so from some number of rows and columns on, 128 as a rule; the user's
# own tensors are tried up to a size that costs milliseconds.
_MIN_AXIS, _MAX_AXIS, _MAX_ENTRIES = 130, 1030, 1 << 21
_SMALL_AXIS = 9
_STEPS_ON_SMALL, _STEPS_ON_LARGE = 50, 3  # some optimizers use the matrix after 25 steps alone
_TOLERANCE = 1e-4  # of the largest update; a reduction over the tensor rounds in another order
_ENTRIES = 256  # of the vectors on which entrants are tried
_STEPS, _STEPS_OF_ENTRANTS = 100, 12
_SIMILAR = 0.33  # difference of logarithms up to which displacements count as those of Adam


class Trial(Protocol):
    """A fresh optimizer with tensors of its own, float32 or float64, by name."""

    def step(self, grads: HostArrays) -> list[HostArrays]:
        """Displacement in one step of each tensor, then of each copy of it that the state keeps."""

    def renew(self, entrants: HostArray) -> None:
        """Start the state of some entries anew, in every tensor, as when they enter B."""


class Traits(NamedTuple):
    """What the loop must know of how an optimizer moves a tensor."""

    betas: Betas | None = None  # whose bias corrections make entrants move too fast
    ascends: bool = False  # along the gradient, and not against it


def check_permutation(
    start: Callable[[HostArrays], Trial],
    shapes: Mapping[str, Shape],
    name: str,
    steps: int = _STEPS_ON_SMALL,
) -> None:
    """Raise :class:`UnsupportedOptimizerError` unless permuting coordinates permutes the update.

    Compared are tensors of such shapes and the same entries in another order as one row, which is
    what the optimizer is given in their place. `shapes` are those of the user's tensors; tensors of
    similar shapes are tried, and small ones for some `steps`. `name` is that of the optimizer.
    """
    # The small ones first: what keeps a matrix for each axis must not meet a long one.
    small = {key: _trial_shape(shape, _SMALL_AXIS, _SMALL_AXIS) for key, shape in shapes.items()}
    moved = _compare(start, small, name, steps)
    if shapes and not moved:
        raise UnsupportedOptimizerError(
            f"{name} did not move a tensor by finite numbers in {steps} steps with random "
            "gradients, so that nothing shows whether it is elementwise: pass probe=False if you "
            "know that it is"
        )
    _compare(start, trial_shapes(shapes), name, _STEPS_ON_LARGE)


def _compare(
    start: Callable[[HostArrays], Trial], shapes: Mapping[str, Shape], name: str, steps: int
) -> bool:
    """Step on tensors of these shapes and on rows of their entries; whether one moved."""
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
    plain, mixed = start(first), start(permuted(first))
    for _ in range(steps):
        gradient = draw()
        expected, compact = permuted(plain.step(gradient)[0]), mixed.step(permuted(gradient))[0]
        if not all(np.isfinite(one).all() for one in expected.values()):
            break  # it diverges, as a learning rate may be that is to be tried
        for key, shape in shapes.items():
            largest = float(np.abs(expected[key]).max(initial=0.0))
            difference = float(np.abs(expected[key] - compact[key]).max(initial=0.0))
            moved |= largest > 0
            if not difference <= _TOLERANCE * largest:
                share = difference / largest if largest else math.inf
                raise UnsupportedOptimizerError(
                    f"{name} does not treat a tensor as a bag of coordinates: as one row in "
                    f"another order, a tensor of shape {shape} is updated differently, by "
                    f"{share:.1e} of the update. It uses rows, columns, the shape or the whole "
                    "matrix (as Muon, Shampoo and Adafactor do), which the vector of the weights "
                    "that Top-KAST updates does not have. Wrap an elementwise optimizer (Adam, "
                    "SGD, ...), or pass probe=False if it adds noise"
                )
    return moved


def check_joint(
    start: Callable[[HostArrays], Trial], keys: Sequence[str], joint: str, name: str
) -> None:
    """Raise :class:`UnsupportedOptimizerError` unless tensors may be handed over as one vector.

    `keys` are those of the tensors and `joint` that of the vector: a rule that normalises by tensor
    (LAMB, LARS, clipping by block) updates the two differently.
    """
    generator = np.random.default_rng(2)
    sizes = [3 + 2 * number for number in range(len(keys))]

    def draw() -> list[HostArray]:
        return [
            np.float64(10.0**-number) * generator.standard_normal((1, size))
            for number, size in enumerate(sizes)
        ]

    def apart(parts: list[HostArray]) -> HostArrays:
        return dict(zip(keys, parts, strict=True))

    first = draw()
    plain, together = start(apart(first)), start({joint: np.concatenate(first, axis=1)})
    for _ in range(_STEPS_ON_LARGE):
        gradients = draw()
        expected = plain.step(apart(gradients))[0]
        whole = together.step({joint: np.concatenate(gradients, axis=1)})[0][joint]
        parts = np.split(whole.reshape(-1), np.cumsum(sizes)[:-1])
        for key, part in zip(keys, parts, strict=True):
            one = expected[key].reshape(-1)
            if not np.abs(one - part).max() <= _TOLERANCE * np.abs(one).max():
                raise UnsupportedOptimizerError(
                    f"{name} normalises by tensor, and distribution='global' hands it one vector "
                    "of all tensors: choose distribution='uniform' or 'erk', or another optimizer"
                )


def compact_shape(shape: Shape) -> Shape:
    """(1, …, 1, n): what an optimizer is given in the place of a tensor."""
    return (1,) * (len(shape) - 1) + (math.prod(shape),)


def trial_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes like those given, large enough for an optimizer to do all that it would do to them.

    One tensor of each number of dimensions is as large as the user's largest (up to a limit), the
    others as large as factoring asks for.
    """
    largest: dict[int, str] = {}
    for name, shape in shapes.items():
        best = largest.setdefault(len(shape), name)
        if _axes(shape) > _axes(shapes[best]):
            largest[len(shape)] = name
    return {
        name: _trial_shape(
            shape, _MIN_AXIS, _MAX_AXIS if name == largest[len(shape)] else _MIN_AXIS
        )
        for name, shape in shapes.items()
    }


def _axes(shape: Shape) -> list[int]:
    return sorted(shape, reverse=True)[:2]


def _trial_shape(shape: Shape, min: int, max: int) -> Shape:  # noqa: A002 - the words for it
    """`shape` with its two longest axes of at least `min` and at most `max`, the others short."""
    long = sorted(range(len(shape)), key=lambda axis: shape[axis], reverse=True)[:2]
    # Odd lengths that differ: a rule that mixes up rows and columns must show.
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
    """How an optimizer moves each of some tensors, by name.

    Entries of B whose state starts anew after some steps are compared with such that stay, with
    what the optimizer did to a new tensor under the same gradients, and with Adam under each pair
    of betas that may be the optimizer's. `dimensions` are the tensors' numbers of dimensions.
    """
    generator = np.random.default_rng(1)
    entrants = np.arange(_ENTRIES) % 2 == 1
    signs = generator.choice([-1.0, 1.0], _ENTRIES)
    sizes = np.repeat(generator.uniform(0.5, 2.0, _ENTRIES // 2), 2)  # alike in both halves

    def draw() -> HostArray:
        noise = np.repeat(generator.standard_normal(_ENTRIES // 2), 2)
        return (signs * sizes * (1 + 0.3 * noise)).astype(np.float32)

    def spread(vector: HostArray) -> HostArrays:
        shapes = {count: (1,) * (count - 1) + (-1,) for count in dimensions.values()}
        shared = {count: vector.reshape(shape) for count, shape in shapes.items()}
        return {key: shared[count] for key, count in dimensions.items()}

    if not any(candidates.values()):
        gradients = [draw() for _ in range(_STEPS_OF_ENTRANTS)]
    else:
        gradients = [draw() for _ in range(_STEPS)]
        gradients += gradients[:_STEPS_OF_ENTRANTS]
    trial = start(spread(generator.standard_normal(_ENTRIES).astype(np.float32) * 0.01))
    moved: dict[str, list[list[HostArray]]] = {key: [] for key in dimensions}
    for number, gradient in enumerate(gradients):
        if number == _STEPS:
            trial.renew(entrants)
        steps = trial.step(spread(gradient))
        for key in dimensions:
            moved[key].append([step[key].reshape(-1) for step in steps if key in step])
    traits = {}
    for key in dimensions:
        along = sum(
            float(np.vdot(gradient, step[0]))
            for gradient, step in zip(gradients, moved[key], strict=True)
        )
        betas = None
        # Copies of the tensor are what some optimizers move.
        for each in zip(*moved[key], strict=False) if candidates[key] else ():
            betas = betas or _find_betas(each, candidates[key], gradients, entrants)
        traits[key] = Traits(betas, along > 0)
    return traits


def _find_betas(
    moved: Sequence[HostArray],
    candidates: Sequence[Betas],
    gradients: Sequence[HostArray],
    entrants: HostArray,
) -> Betas | None:
    """The betas by whose corrections entrants move as new tensors do, if there are any.

    Where not even scaled entrants do so, since a new tensor moves differently in other ways, those
    under which Adam's entrants move as the optimizer's.
    """
    late = np.arange(_STEPS, _STEPS + _STEPS_OF_ENTRANTS)
    with np.errstate(all="ignore"):
        sizes = [np.abs(step) for step in moved]
        ratios = np.log([sizes[n][entrants].mean() / sizes[n][~entrants].mean() for n in late])
        settled = np.mean([size.mean() for size in sizes[_STEPS - len(late) : _STEPS]])
        new = np.log([size.mean() / settled for size in sizes[: len(late)]])

        def differs(one: HostArray, other: HostArray) -> float:
            return float(np.sqrt(np.mean((one - other) ** 2)))

        if differs(ratios, new) < _SIMILAR:
            return None
        counts = np.arange(1.0, 1 + len(late))
        best, least = None, _SIMILAR
        for betas in candidates:
            scaled = ratios + np.log(kappa(counts, betas) / kappa(late + 1.0, betas))
            adam = np.log(_adam_ratios(betas, gradients, entrants))
            # Not where one of them is no number.
            for difference in (differs(scaled, new), differs(ratios, adam)):
                if difference < least:
                    best, least = betas, difference
        return best


def beta_pairs(betas: Sequence[float]) -> list[Betas]:
    """Pairs of factors (of the mean, of the square) that an optimizer with these may use."""
    if not all(0 <= beta < 1 for beta in betas):
        return []
    return [(mean, float(square)) for square in betas[1:] for mean in (float(betas[0]), 0.0)]


def _adam_ratios(betas: Betas, gradients: Sequence[HostArray], entrants: HostArray) -> list[float]:
    """How much further than settled entries entrants of Adam move."""
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
