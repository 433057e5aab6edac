"""The rivals as their authors' code trains them: dense arrays, a mask, and one momentum buffer.

Written from the papers and the public code, in NumPy. Of the library it uses the random words
alone, without which sets could not be compared: the largest word is drawn first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from topkast.reference import tie_words
from topkast.selection._random import make_key, random_draws, random_normals, random_words

Vector = np.ndarray[Any, Any]


@dataclass
class Group:
    """Tensors whose weights are ranked as one, as vectors of n entries."""

    bounds: dict[str, tuple[int, int]]
    theta: Vector
    count: int  # of A at the end
    seed: int = 0
    mask: Vector = field(init=False)
    buffer: Vector = field(init=False)  # of momentum
    mean: Vector = field(init=False)  # of the gradient on all weights
    moments: Vector = field(init=False)  # of Adam, and the steps of each entry

    def __post_init__(self) -> None:
        self.mask = np.zeros(self.theta.size, bool)
        self.buffer, self.mean = np.zeros_like(self.theta), np.zeros_like(self.theta)

    @property
    def name(self) -> str:
        return " + ".join(self.bounds)

    def words(self, draw: int) -> Vector:
        key = make_key(self.seed, self.name, "draws")
        return np.asarray(random_draws(np.arange(self.theta.size), key, draw), np.int64)

    def first(self, count: int, scores: Vector, among: Vector) -> Vector:
        """Flags of the `count` largest scores among flagged weights; of equal ones, by hash."""
        ties = tie_words(self.theta.size, self.seed, self.name).astype(np.int64)
        candidates = np.flatnonzero(among)
        order = np.lexsort((-ties[candidates], -scores[candidates].astype(np.float64)))
        flags = np.zeros(self.theta.size, bool)
        flags[candidates[order[:count]]] = True
        return flags

    def inside(self, bounds: tuple[int, int]) -> Vector:
        indices = np.arange(self.theta.size)
        return (indices >= bounds[0]) & (indices < bounds[1])

    def replace(self, mask: Vector) -> None:
        """The new A: what enters starts at zero, without momentum; what leaves is forgotten."""
        stays = self.mask & mask
        self.theta, self.buffer = self.theta * stays, self.buffer * stays
        self.mask = mask


# Changes A after an update, given the dense gradient of that update.
Refresh = Callable[[Group, Vector, int], None]


def share_at(update: int, fraction: float, until: int | None) -> Fraction:
    """The share that is replaced: half a cosine from `fraction` to 0."""
    if until is None:
        return Fraction(str(fraction))
    if update >= until:
        return Fraction(0)
    cosine = Fraction(round(1e9 * math.cos(math.pi * update / until)), 10**9)
    return Fraction(str(fraction)) * (1 + cosine) / 2


def cubic(group: Group, update: int, start: int, end: int, initial: float) -> int:
    """|A| under the sparsity of Zhu and Gupta; zeros are rounded down."""
    size = group.theta.size
    progress = Fraction(min(max(update - start, 0), end - start), end - start)
    final = 1 - Fraction(group.count, size)
    sparsity = final + (Fraction(str(initial)) - final) * (1 - progress) ** 3
    return size - math.floor(sparsity * size)


def draw_first(group: Group) -> None:
    group.mask = group.first(group.count, group.words(0), np.ones(group.theta.size, bool))
    group.theta = group.theta * group.mask


def magnitude_first(count: Callable[[Group], int], *, rests: bool = False) -> Any:
    def start(group: Group) -> None:
        everything = np.ones(group.theta.size, bool)
        group.mask = group.first(count(group), abs(group.theta), everything)
        if not rests:
            group.theta = group.theta * group.mask

    return start


def drop_smallest(group: Group, count: int) -> Vector:
    """A without its `count` smallest."""
    return group.first(int(group.mask.sum()) - count, abs(group.theta), group.mask)


def evolve(
    fraction: float, *, until: int | None = None, signed: bool = False, again: bool = True
) -> Refresh:
    """SET; SMET draws from what was outside (`again` is false)."""

    def refresh(group: Group, gradient: Vector, update: int) -> None:
        share = share_at(update, fraction, until)
        signs = [group.theta >= 0, group.theta < 0] if signed else [np.ones_like(group.mask)]
        counts = [math.floor(share * int((group.mask & sign).sum())) for sign in signs]
        room = int((~group.mask).sum())
        if not again and sum(counts) > room:  # in the same proportion
            first = counts[0] * room // sum(counts)
            counts = [first, room - first][: len(counts)]
        kept = np.zeros_like(group.mask)
        for sign, count in zip(signs, counts, strict=True):
            own = group.mask & sign
            kept |= group.first(int(own.sum()) - count, abs(group.theta), own)
        outside = ~kept if again else ~group.mask
        group.replace(kept | group.first(sum(counts), group.words(update), outside))

    return refresh


def grow_largest(
    fraction: float,
    *,
    until: int | None = None,
    again: bool = True,
    samples: float | None = None,
    momentum: bool = False,
) -> Refresh:
    """RigL, ITOP, sparse momentum without redistribution, and GSE with its uniform sample."""

    def refresh(group: Group, gradient: Vector, update: int) -> None:
        count = math.floor(share_at(update, fraction, until) * int(group.mask.sum()))
        scores = abs(group.mean if momentum else gradient)
        if not again:
            count = min(count, int((~group.mask).sum()))
        kept = drop_smallest(group, count)
        candidates = ~kept if again else ~group.mask
        if samples is not None:
            size = math.ceil(Fraction(str(samples)) * int(group.mask.sum()))
            candidates = group.first(size, group.words(update), ~group.mask)
        group.replace(kept | group.first(count, scores, candidates))

    return refresh


def reparameterize(fraction: float) -> Refresh:
    """DSR with exactly the wanted number dropped: shares of growth follow what stays."""

    def refresh(group: Group, gradient: Vector, update: int) -> None:
        count = math.floor(Fraction(str(fraction)) * int(group.mask.sum()))
        count = min(count, int((~group.mask).sum()))
        kept = drop_smallest(group, count)
        insides = [group.inside(bounds) for bounds in group.bounds.values()]
        for inside in insides:
            if not (kept & inside).any():
                kept |= group.first(1, abs(group.theta), group.mask & inside)
        total = int((group.mask & ~kept).sum())
        stays = [int((kept & inside).sum()) for inside in insides]
        exact = [Fraction(total * stay, sum(stays)) for stay in stays]
        grown = [math.floor(share) for share in exact]
        order = sorted(range(len(exact)), key=lambda index: grown[index] - exact[index])
        for index in order[: total - sum(grown)]:
            grown[index] += 1
        mask = kept.copy()
        for inside, number in zip(insides, grown, strict=True):
            mask |= group.first(number, group.words(update), inside & ~group.mask)
        group.replace(mask)

    return refresh


def rewire(group: Group, gradient: Vector, update: int) -> None:
    """Deep Rewiring: what has lost the sign of its position is replaced."""
    key = make_key(group.seed, group.name, "signs")
    signs = np.where(np.asarray(random_words(np.arange(group.theta.size), key)) >= 0, 1, -1)
    kept = group.mask & (signs * group.theta >= 0)
    dropped = int((group.mask & ~kept).sum())
    group.replace(kept | group.first(dropped, group.words(update), ~group.mask))


def rewire_first(group: Group) -> None:
    key = make_key(group.seed, group.name, "signs")
    signs = np.where(np.asarray(random_words(np.arange(group.theta.size), key)) >= 0, 1, -1)
    agrees = np.where(group.theta >= 0, 1, -1) == signs
    group.mask = group.first(group.count, group.words(0), agrees)
    assert group.mask.sum() == group.count
    group.theta = group.theta * group.mask


def prune(start: int, end: int, initial: float = 0.0) -> Refresh:
    """Gradual magnitude pruning: what is masked rests, and may return until `end`."""

    def refresh(group: Group, gradient: Vector, update: int) -> None:
        count = cubic(group, update, start, end, initial)
        if update <= end or group.mask.sum() != count:
            group.mask = group.first(count, abs(group.theta), np.ones_like(group.mask))

    return refresh


def regenerate(
    start: int, end: int, *, fraction: float, until: int | None, initial: float = 0.5
) -> Refresh:
    """GraNet: prunes all tensors as one, then regenerates in each."""

    def refresh(group: Group, gradient: Vector, update: int) -> None:
        if update < start:
            return
        count = cubic(group, update, start, end, initial)
        pruned = group.first(count, abs(group.theta), group.mask)
        share, mask = share_at(update, fraction, until), np.zeros_like(pruned)
        for bounds in group.bounds.values():
            own = pruned & group.inside(bounds)
            size = int(own.sum())
            kept = group.first(size - math.floor(share * size), abs(group.theta), own)
            outside = group.inside(bounds) & ~kept
            mask |= kept | group.first(math.floor(share * size), abs(gradient), outside)
        group.replace(mask)

    return refresh


def alternate(warm_up: int, sparse: int, dense: int, end: int) -> Refresh:
    """AC/DC."""

    def refresh(group: Group, gradient: Vector, update: int) -> None:
        phase = (update - warm_up) % (sparse + dense)
        is_sparse = update >= end or (update >= warm_up and phase < sparse)
        if not is_sparse:
            group.replace(np.ones_like(group.mask))
        elif group.mask.all():
            group.replace(group.first(group.count, abs(group.theta), group.mask))

    return refresh


def threshold(end: int) -> Refresh:
    """IHT: all but the largest become zero, and all move; momentum is kept."""

    def refresh(group: Group, gradient: Vector, update: int) -> None:
        size = group.theta.size
        count = group.count + (size - group.count) * max(end - update, 0) // max(end, 1)
        group.mask = group.first(count, abs(group.theta), np.ones_like(group.mask))
        group.theta = group.theta * group.mask

    return refresh


def largest(group: Group, gradient: Vector, update: int) -> None:
    """DNW."""
    group.mask = group.first(group.count, abs(group.theta), np.ones_like(group.mask))


@dataclass
class Original:
    """A method, and how it steps by SGD with momentum."""

    start: Callable[[Group], None]
    refresh: Refresh
    moves_all: bool = False  # instead of A alone
    noise: float = 0.0
    l1: float = 0.0

    def step(
        self, group: Group, gradient: Vector, update: int, rates: tuple[float, float], every: int
    ) -> None:
        """The step after `update` updates, and the refresh after it."""
        rate, momentum = rates
        moves = np.ones_like(group.mask) if self.moves_all else group.mask
        own = gradient + self.l1 * np.sign(group.theta)
        if self.noise:
            key, units = make_key(group.seed, group.name, "noise"), np.arange(group.theta.size)
            own = own + self.noise * np.asarray(random_normals(units, key, update, np.float64))
        group.buffer = momentum * group.buffer + own * moves
        group.theta = group.theta - rate * group.buffer * moves
        group.mean = 0.5 * group.mean + 0.5 * gradient
        if (update + 1) % every == 0:
            self.refresh(group, gradient, update + 1)


class ByEntry(Original):
    """Steps by Adam, whose averages each entry corrects by the steps that it has taken itself."""

    def step(
        self, group: Group, gradient: Vector, update: int, rates: tuple[float, float], every: int
    ) -> None:
        """The step after `update` updates, and the refresh after it."""
        if not update:
            group.moments = np.zeros((3, group.theta.size))
        mean, square, taken = group.moments
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        taken = taken + 1
        scale = np.sqrt(square / (1 - 0.999**taken))
        direction = mean / (1 - 0.9**taken) / np.where(square > 0, scale, 1)
        group.theta = group.theta - rates[0] * direction * group.mask
        group.mean = 0.5 * group.mean + 0.5 * gradient
        old = group.mask
        if (update + 1) % every == 0:
            self.refresh(group, gradient, update + 1)
        group.moments = np.stack([mean, square, taken]) * (old & group.mask)
