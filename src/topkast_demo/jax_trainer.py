"""The demo's networks, trained with JAX and optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path
from numpy.typing import NDArray

import topkast
from topkast_demo.jax_models import apply, initialise
from topkast_demo.methods import draw_static_masks, wrapper_options
from topkast_demo.networks import Network
from topkast_demo.settings import Settings
from topkast_demo.trainer import Batch, Trainer

# With the constants of torch.optim, which adds Adagrad's eps outside the root.
OPTIMIZERS: dict[str, Any] = {
    "adamw": partial(optax.adamw, weight_decay=1e-2),
    "adam": optax.adam,
    "nadam": optax.nadam,
    "adagrad": partial(optax.adagrad, initial_accumulator_value=0.0, eps=1e-20),
    "rmsprop": partial(optax.rmsprop, decay=0.99, eps_in_sqrt=False),
    "sgd": partial(optax.sgd, momentum=0.9),
}


class JaxTrainer(Trainer):
    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"jax": jax.__version__, "optax": optax.__version__}

    @classmethod
    def limit_threads(cls, count: int | None) -> AbstractContextManager[int | None]:
        return nullcontext()  # XLA reads its flags only before the first computation

    def __init__(
        self, network: Network, method: str, settings: Settings, *, dense: tuple[str, ...]
    ) -> None:
        self._params = initialise(network, jax.random.key(settings.seed))
        if method == "static":
            masks = draw_static_masks(self.params(), settings, dense)
            self._params = tree_map_with_path(
                lambda path, leaf: leaf * masks.get(_name(path), 1), self._params
            )
        schedule = map(settings.schedule, range(settings.steps))
        rates = jnp.asarray([settings.lr * factor for factor in schedule])
        tx = OPTIMIZERS[settings.optimizer](lambda count: rates[count])
        options = wrapper_options(method, settings, dense)
        self._is_wrapped = options is not None
        apply_gradients: Callable[..., tuple[Any, Any]] = partial(_apply_gradients, tx)
        view: Callable[[Any, Any], Any] = _get_params
        if options is not None:
            tx = topkast.wrap_optimizer(tx, **options)
            apply_gradients, view = tx.step, topkast.forward_params
        self._state = tx.init(self._params)

        def loss(alpha: Any, batch: Any) -> jax.Array:
            inputs, classes = batch
            logits = apply(network, alpha, inputs)
            losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
            return losses.mean()

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(view(params, state), batch)
            return *apply_gradients(grads, state, params), value

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._loss = jax.jit(lambda params, state, batch: loss(view(params, state), batch))
        self._predict = jax.jit(
            lambda params, state, inputs: apply(network, view(params, state), inputs).argmax(-1)
        )

    def step(self, batch: Batch) -> float:
        self._params, self._state, loss = self._step(self._params, self._state, batch)
        jax.block_until_ready(self._params)
        return float(loss)

    def loss(self, batch: Batch) -> float:
        return float(self._loss(self._params, self._state, batch))

    def predict(self, inputs: NDArray[Any]) -> NDArray[np.int64]:
        return np.asarray(self._predict(self._params, self._state, inputs), dtype=np.int64)

    def params(self) -> Mapping[str, jax.Array]:
        return {_name(path): leaf for path, leaf in tree_flatten_with_path(self._params)[0]}

    def masks(self) -> dict[str, topkast.Masks]:
        if not self._is_wrapped:
            return {}
        # In NumPy, because many small operations are slow in JAX.
        supports = jax.device_get(self._state.supports)
        return topkast.masks(
            self._state._replace(core=self._state.core._replace(supports=supports)), self._params
        )

    def state_bytes(self) -> int:
        inner = self._state.inner if self._is_wrapped else self._state
        return sum(leaf.nbytes for leaf in jax.tree.leaves(inner))

    def total_bytes(self) -> int:
        if self._is_wrapped:
            return topkast.summary(self._state, self._params).total_bytes
        weights: int = sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))
        return 2 * weights + self.state_bytes()


def _apply_gradients(
    tx: optax.GradientTransformation, grads: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """The ``step`` of a wrapped transformation, for any transformation."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _get_params(params: Any, _: Any) -> Any:
    return params


def _name(path: Any) -> str:
    return keystr(path, simple=True, separator=".")
