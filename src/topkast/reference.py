"""Algorithm 1 of the paper in plain NumPy: dense, slow, and meant to be read along with the paper.

Every backend is tested against it. It shares no code with the library: the sets are masks of the
tensor's shape, found by sorting, and the moments are dense arrays.

Examples
--------
>>> import numpy as np
>>> from topkast.reference import TopKAST, SGD
>>> layer = TopKAST(np.asarray([4.0, 3.0, 2.0, 1.0]), SGD(lr=0.1), fwd=0.75, bwd=0.5, penalty=0.0)
>>> layer.alpha
array([4., 0., 0., 0.])
>>> layer.step(np.ones(4))  # dense_params - lr * gradient, on B = {0, 1} alone
>>> layer.theta
array([3.9, 2.9, 2. , 1. ])
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

import numpy as np

Vector = np.ndarray[Any, Any]


def tie_words(size: int, seed: int, name: str) -> Vector:
    """A hash of (seed, tensor name, index), by which equal magnitudes rank; uint32.

    The prefixes of DistributedDataParallel and torch.compile are no part of a name.
    """
    *modules, last = name.split(".")
    wrappers = "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"
    name = ".".join([module for module in modules if module not in wrappers] + [last])
    digest = hashlib.blake2s(f"{seed} ties {name}".encode(), digest_size=16).digest()
    words = np.arange(size, dtype=np.uint32)
    for key in (*struct.unpack("<4I", digest), 0):
        words ^= np.uint32(key)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            words ^= words >> np.uint32(shift)
            words *= np.uint32(factor)
        words ^= words >> np.uint32(16)
    return words


def unit_scores(theta: Vector, block: tuple[int, int], score: str = "sum") -> Vector:
    """Scores of the blocks of a tensor as a matrix: the sum or maximum of their magnitudes."""
    (rows, columns), combine = block, {"sum": np.add, "max": np.maximum}[score]
    matrix = np.abs(theta).reshape(len(theta), -1)
    if matrix.dtype == np.float16:
        matrix = matrix.astype(np.float32)

    def reduce(terms: list[Vector]) -> Vector:  # in the order ((0 + 1) + (2 + 3)) + 4
        while len(terms) > 1:
            unpaired = terms[len(terms) // 2 * 2 :]
            pairs = zip(terms[::2], terms[1::2], strict=False)
            terms = [combine(first, second) for first, second in pairs] + unpaired
        return terms[0]

    matrix = reduce([matrix[row::rows] for row in range(rows)])
    return reduce([matrix[:, column::columns] for column in range(columns)])


def top_k(
    theta: Vector,
    sparsity: float,
    *,
    block: tuple[int, int] | None = None,
    block_score: str = "sum",
    pattern: tuple[int, int] | None = None,
    seed: int = 0,
    name: str = "",
) -> Vector:
    """Mask of the units with the largest magnitudes; ties are broken by hash.

    With a `pattern`, the units of each group of consecutive ones are ranked separately.
    """
    scores = np.abs(theta) if block is None else unit_scores(theta, block, block_score)
    n = scores.size
    if pattern is None:
        size, k = max(1, n), max(1, n - math.floor(Decimal(str(sparsity)) * n)) if n else 0
    else:
        size, k = pattern[1], round((1 - sparsity) * pattern[1])
    words = tie_words(n, seed, name).astype(np.int64)
    order = np.lexsort((-words, -scores.ravel(), np.arange(n) // size))
    mask = np.zeros(n, dtype=bool)
    mask[order.reshape(-1, size)[:, :k]] = True
    if block is not None:  # repeat the flag of each unit for its weights
        mask = np.kron(mask.reshape(scores.shape), np.ones(block, dtype=bool))
    return mask.reshape(theta.shape)


class Rule(Protocol):
    """An optimizer that changes theta and keeps moments by name."""

    moments: dict[str, Vector]

    def change(self, theta: Vector, gradient: Vector) -> Vector:
        """The change of theta, given a gradient that is zero outside B."""
        ...

    def maturity(self, steps: Any) -> Any:
        """Size of Adam's bias correction after `steps` steps; 1 for rules without one."""
        ...


class TopKAST:
    """One tensor under Algorithm 1, refreshed every `refresh_every` updates (appendix C)."""

    def __init__(
        self,
        theta: Vector,
        rule: Rule,
        *,
        fwd: float,
        bwd: float,
        refresh_every: int = 1,
        penalty: float = 1e-4,
        penalty_kind: str = "l2",
        block: tuple[int, int] | None = None,
        block_score: str = "sum",
        pattern: tuple[int, int] | None = None,
        seed: int = 0,
        name: str = "",
    ) -> None:
        self.theta, self.rule, self.updates = theta.copy(), rule, 0
        self.age = np.zeros(theta.shape, dtype=int)  # updates since each entry entered B
        self.fwd, self.bwd, self.refresh_every = fwd, bwd, refresh_every
        self.penalty, self.penalty_kind = penalty, penalty_kind
        self.rule.moments = {name: np.zeros_like(theta) for name in rule.moments}
        # fwd_params = TopK(dense_params, X%); bwd_params = TopK(dense_params, Y%)
        self.seed, self.name, self.pattern = seed, name, pattern
        self.block, self.block_score = block, block_score
        self.forward, self.backward = self.select()

    def select(self) -> tuple[Vector, Vector]:
        """Masks of A and B for the current weights."""
        forward, backward = (
            top_k(
                self.theta,
                sparsity,
                block=self.block,
                block_score=self.block_score,
                pattern=self.pattern,
                seed=self.seed,
                name=self.name,
            )
            for sparsity in (self.fwd, self.bwd)
        )
        return forward, backward

    @property
    def alpha(self) -> Vector:
        """The weights of the forward pass, ``output = model(fwd_params, input)``."""
        return np.where(self.forward, self.theta, 0)

    def step(self, gradient: Vector) -> None:
        """Take one update from the dense gradient of the loss at alpha."""
        # loss += l2(fwd_params) + l2(just_bwd_set) / (X / 100): X is the density in per cent
        density = 1 - self.fwd
        weight = np.where(self.forward, 1, np.where(self.backward, 1 / density, 0))
        direction = self.theta if self.penalty_kind == "l2" else np.sign(self.theta)
        gradient = gradient + (self.penalty * weight).astype(self.theta.dtype) * direction
        # bwd_params = bwd_params - grad(loss, bwd_params)
        change = self.rule.change(self.theta, np.where(self.backward, gradient, 0))
        self.updates, self.age = self.updates + 1, self.age + 1
        # An entry that entered late moves like a new parameter under Adam, by its own step count.
        change = change * self.rule.maturity(self.age) / self.rule.maturity(self.updates)
        change = change.astype(self.theta.dtype)
        self.theta = np.where(self.backward, self.theta + change, self.theta)
        if self.updates % self.refresh_every == 0:
            before = self.backward
            self.forward, self.backward = self.select()
            stayed = before & self.backward
            self.age = np.where(stayed, self.age, 0)
            self.rule.moments = {
                name: np.where(stayed, moment, 0) for name, moment in self.rule.moments.items()
            }


@dataclass
class SGD:
    """Gradient descent with momentum."""

    lr: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        self.moments: dict[str, Any] = {"velocity": 0}

    def change(self, theta: Vector, gradient: Vector) -> Vector:
        """See :class:`Rule`."""
        velocity = self.momentum * self.moments["velocity"] + gradient
        self.moments = {"velocity": velocity}
        return np.asarray(-self.lr * velocity)

    def maturity(self, steps: Any) -> Any:
        """See :class:`Rule`."""
        return 1


@dataclass
class AdamW:
    """Adam with decoupled weight decay."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        self.moments: dict[str, Any] = {"mean": 0, "square": 0}
        self.steps = 0

    def change(self, theta: Vector, gradient: Vector) -> Vector:
        """See :class:`Rule`."""
        self.steps += 1
        (beta1, beta2), t = self.betas, self.steps
        mean = beta1 * self.moments["mean"] + (1 - beta1) * gradient
        square = beta2 * self.moments["square"] + (1 - beta2) * gradient**2
        self.moments = {"mean": mean, "square": square}
        step = mean / (1 - beta1**t) / (np.sqrt(square / (1 - beta2**t)) + self.eps)
        return np.asarray(-self.lr * (step + self.weight_decay * theta))

    def maturity(self, steps: Any) -> Any:
        """See :class:`Rule`."""
        beta1, beta2 = self.betas
        return np.sqrt(1 - beta2**steps) / (1 - beta1**steps)
