"""Training steps of an MLP in JAX: dense, masked and sparse, in one process.

The network is 784-width-width-width-10 with ReLU, cross-entropy and Adam; the last layer stays
dense. A round times `refresh_every` steps together, so that the mean of a step includes one
refresh. Beside it stands the mean of steps between refreshes. Weights and states are donated.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import itertools

import jax
import jax.numpy as jnp
import optax
import topkast_jax
from _harness import (
    Timing,
    describe_environment,
    interleave,
    make_parser,
    markdown_table,
    write_json,
)

import topkast

SPARSITIES = [(0.9, 0.8), (0.95, 0.9), (0.98, 0.95)]
PLAIN_STEPS = 10  # between refreshes, timed together


def make_params(width: int) -> Any:
    sizes = [784, width, width, width, 10]
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        {"w": jax.random.normal(key, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def loss(alpha: Any, structures: Any, inputs: Any, labels: Any) -> Any:
    hidden = inputs
    for number, layer in enumerate(alpha):
        structure = structures.get(f"{number}.w")
        hidden = topkast_jax.sparse_linear(layer["w"], structure, hidden, layer["b"])
        if number < len(alpha) - 1:
            hidden = jax.nn.relu(hidden)
    return optax.softmax_cross_entropy_with_integer_labels(hidden, labels).mean()


class Dense:
    """Dense training with Adam."""

    def __init__(self, width: int, batch: int) -> None:
        self.params, self.tx = make_params(width), optax.adam(1e-3)
        self.state = self.tx.init(self.params)
        inputs = jax.random.normal(jax.random.key(1), (batch, 784))
        self.batch = inputs, jnp.argmax(inputs[:, :10], axis=1)
        self.train = jax.jit(self.step, donate_argnums=(0, 1))

    def step(self, params: Any, state: Any, inputs: Any, labels: Any) -> Any:
        grads = jax.grad(loss)(params, {}, inputs, labels)
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.params, self.state = self.train(self.params, self.state, *self.batch)
        jax.block_until_ready((self.params, self.state))


class Wrapped(Dense):
    """Training with sparse weights, in masked or sparse execution."""

    def __init__(
        self, width: int, batch: int, fwd: float, bwd: float, refresh_every: int, *, sparse: bool
    ) -> None:
        super().__init__(width, batch)
        options: dict[str, Any] = {"fwd": fwd, "bwd": bwd, "refresh_every": refresh_every}
        self.tx: Any = topkast.wrap_optimizer(optax.adam(1e-3), dense="3.*", **options)
        self.state = self.tx.init(self.params)
        if sparse:
            self.state = topkast_jax.sparsify(self.params, self.state)

    def step(self, params: Any, state: Any, inputs: Any, labels: Any) -> Any:
        alpha = topkast.forward_params(params, state)
        grads = jax.grad(loss)(alpha, state.structures, inputs, labels)
        return self.tx.step(grads, state, params)


def time_compilation(side: Dense) -> float:
    start = time.perf_counter()
    side.train.lower(side.params, side.state, *side.batch).compile()
    return time.perf_counter() - start


def measure(
    width: int, batch: int, fwd: float, bwd: float, refresh_every: int, rounds: int
) -> list[dict[str, Any]]:
    arguments = width, batch, fwd, bwd, refresh_every
    sides = {
        "dense": Dense(width, batch),
        "masked": Wrapped(*arguments, sparse=False),
        "sparse": Wrapped(*arguments, sparse=True),
    }
    compilation = {name: time_compilation(side) for name, side in sides.items()}

    def timed(steps: int, rounds: int) -> dict[str, Timing]:
        runs = {name: (lambda side=side: side.run(steps)) for name, side in sides.items()}
        timings = interleave(runs, rounds=rounds, warm_up=1)
        return {name: timing.divided(steps) for name, timing in timings.items()}

    # A refresh follows after every `refresh_every` updates: this warm-up ends just behind one.
    for side in sides.values():
        side.run(refresh_every)
    plain_rounds = max(1, min(rounds, refresh_every // PLAIN_STEPS - 2))
    plain = timed(PLAIN_STEPS, plain_rounds)
    for side in sides.values():  # to just behind the next one
        side.run(refresh_every - PLAIN_STEPS * (plain_rounds + 1))
    whole = timed(refresh_every, rounds)
    rows = [
        {
            "width": width,
            "batch": batch,
            "fwd": fwd,
            "bwd": bwd,
            "refresh_every": refresh_every,
            "side": name,
            "between_refreshes": asdict(plain[name]),
            "with_refreshes": asdict(whole[name]),
            "seconds_to_compile": compilation[name],
        }
        for name in sides
    ]
    head = [
        f"{fwd}/{bwd}, width {width}, batch {batch}",
        "ms between refreshes",
        "× dense",
        f"ms with one in {refresh_every}",
        "× dense",
        "s to compile",
    ]
    table = [
        [
            name,
            *(
                text
                for timing in (plain[name], whole[name])
                for text in (
                    f"{timing.median:.1f} ({timing.min:.1f}-{timing.max:.1f})",
                    f"{1 / timing.ratio:.2f}",
                )
            ),
            f"{compilation[name]:.1f}",
        ]
        for name in sides
    ]
    print(markdown_table(head, table), "\n", flush=True)
    return rows


def main() -> None:
    parser = make_parser(__doc__, "jax_training_step")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--refresh-every", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsities", type=int, default=len(SPARSITIES), help="number of pairs")
    options = parser.parse_args()
    rows = [
        row
        for width in options.widths
        for fwd, bwd in SPARSITIES[: options.sparsities]
        for row in measure(width, options.batch, fwd, bwd, options.refresh_every, options.rounds)
    ]
    packages = ("numpy", "jax", "jaxlib", "optax", "numba")
    environment = describe_environment(options.threads, packages)
    write_json(options.output, {"environment": environment, "rows": rows})


if __name__ == "__main__":
    main()
