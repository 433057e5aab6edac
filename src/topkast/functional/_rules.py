"""Update rules for plain arrays of any library: SGD, Adam and AdamW, with PyTorch's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._primitives import Array, device

Arrays = dict[str, Array]
LearningRate = float | Callable[[Array], Array]


class SGDState(NamedTuple):
    """Steps taken (0-d int32), and the momentum buffers by name."""

    step: Array
    velocity: Arrays


class AdamState(NamedTuple):
    """Steps taken (0-d int32), and the averages of the gradient and of its square, by name."""

    step: Array
    mean: Arrays
    square: Arrays


@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent with momentum.

    .. math:: v \leftarrow \mu v + g + w \theta, \quad \theta \leftarrow \theta - \eta v

    With Nesterov's variant the step is :math:`\eta (g + w \theta + \mu v)`.

    Parameters
    ----------
    lr
        Learning rate η, or a function of the number of previous steps (a 0-d int32 array).
    momentum
        Factor μ, in [0, 1).
    nesterov
        Whether to use Nesterov's variant.
    weight_decay
        Coefficient w, added to the gradient.

    Raises
    ------
    OptionError
        For a negative value, or `nesterov` without momentum.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> opt = topkast.wrap_optimizer(topkast.SGD(0.1, momentum=0.9), fwd=0.75, bwd=0.5)
    >>> params = {"w": np.asarray([[4.0, 3.0], [2.0, 1.0]])}
    >>> state = opt.init(params)
    >>> grads = {"w": np.ones((2, 2))}
    >>> updates, state = opt.update(grads, state, params)
    >>> topkast.apply_updates(params, updates)["w"].round(3)
    array([[3.9, 2.9],
           [2. , 1. ]])
    """

    lr: LearningRate
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    elementwise = True

    def __post_init__(self) -> None:
        _set_numbers(self, "lr", "momentum", "weight_decay")
        _check_not_negative(self, "lr", "weight_decay")
        _check_factor("momentum", self.momentum)
        if self.nesterov and not self.momentum:
            raise OptionError("nesterov=True needs momentum > 0")

    def init(self, params: Mapping[str, Array], /) -> SGDState:
        """State before the first step, for parameters by name."""
        return SGDState(_no_steps(params), _zeros(params) if self.momentum else {})

    def update(
        self, grads: Mapping[str, Array], state: SGDState, params: Mapping[str, Array], /
    ) -> tuple[Arrays, SGDState]:
        """Compute the displacements of the parameters, and the next state."""
        lr = learning_rate(self.lr, state.step)
        gradients = _with_decay(grads, params, self.weight_decay)
        velocity: Arrays = {}
        if self.momentum:
            velocity = {
                name: state.velocity[name] * self.momentum + gradient
                for name, gradient in gradients.items()
            }
            if self.nesterov:
                gradients = {
                    name: gradient + velocity[name] * self.momentum
                    for name, gradient in gradients.items()
                }
            else:
                gradients = velocity
        displacements = {name: -lr * gradient for name, gradient in gradients.items()}
        return displacements, SGDState(state.step + 1, velocity)


@dataclass(frozen=True)
class Adam:
    r"""Adam; its weight decay is added to the gradient.

    .. math::
       m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
       v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
       \theta \leftarrow \theta - \eta \frac{m / (1 - \beta_1^t)}
       {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Parameters
    ----------
    lr
        Learning rate η, or a function of the number of previous steps (a 0-d int32 array).
    betas
        Factors β₁ and β₂, each in [0, 1).
    eps
        ε, added to the denominator.
    weight_decay
        Coefficient of θ in the gradient.

    Raises
    ------
    OptionError
        For a negative value, or a factor outside [0, 1).

    Examples
    --------
    >>> import numpy as np, topkast
    >>> opt = topkast.wrap_optimizer(topkast.Adam(0.1), fwd=0.75, bwd=0.5)
    >>> params = {"w": np.asarray([[4.0, 3.0], [2.0, 1.0]])}
    >>> state = opt.init(params)
    >>> state.inner.mean["w"].shape
    (1, 2)
    """

    lr: LearningRate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    elementwise = True
    decoupled = False

    def __post_init__(self) -> None:
        _set_numbers(self, "lr", "eps", "weight_decay")
        betas: Any = self.betas
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise OptionError(f"betas must be two numbers, such as (0.9, 0.999), got {betas!r}")
        object.__setattr__(self, "betas", tuple(map(float, betas)))
        _check_not_negative(self, "lr", "eps", "weight_decay")
        for beta in self.betas:
            _check_factor("betas", beta)

    def init(self, params: Mapping[str, Array], /) -> AdamState:
        """State before the first step, for parameters by name."""
        return AdamState(_no_steps(params), _zeros(params), _zeros(params))

    def update(
        self, grads: Mapping[str, Array], state: AdamState, params: Mapping[str, Array], /
    ) -> tuple[Arrays, AdamState]:
        """Compute the displacements of the parameters, and the next state."""
        lr = learning_rate(self.lr, state.step)
        step = state.step + 1
        beta1, beta2 = self.betas
        gradients = dict(grads) if self.decoupled else _with_decay(grads, params, self.weight_decay)
        mean, square, displacements = {}, {}, {}
        for name, gradient in gradients.items():
            xp = array_namespace(gradient)
            real = _real_dtype(gradient)
            mean[name] = state.mean[name] * beta1 + gradient * (1 - beta1)
            squared = _by_component(lambda component: component * component, gradient)
            square[name] = state.square[name] * beta2 + squared * (1 - beta2)
            scale = lr / bias_correction(beta1, step, real)
            root = array_namespace(step).sqrt(bias_correction(beta2, step, real))
            displacement = -scale * _by_component(
                lambda mean, square, root=root, xp=xp: mean / (xp.sqrt(square) / root + self.eps),
                mean[name],
                square[name],
            )
            if self.decoupled and self.weight_decay:
                displacement = displacement - lr * self.weight_decay * params[name]
            displacements[name] = displacement
        return displacements, AdamState(step, mean, square)


@dataclass(frozen=True)
class AdamW(Adam):
    r"""Adam with decoupled weight decay: θ also loses :math:`\eta w \theta` at each step.

    Parameters
    ----------
    lr, betas, eps
        As in :class:`Adam`.
    weight_decay
        Coefficient w.

    Raises
    ------
    OptionError
        As :class:`Adam`.

    Examples
    --------
    >>> import topkast
    >>> topkast.AdamW(1e-3, weight_decay=0.1)
    AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.1)
    """

    weight_decay: float = 1e-2

    decoupled = True


def _real_dtype(array: Array) -> Any:
    xp = array_namespace(array)
    is_complex = xp.isdtype(array.dtype, "complex floating")
    return xp.real(array).dtype if is_complex else array.dtype


def _by_component(function: Callable[..., Array], *arrays: Array) -> Array:
    """Apply a real function to the real and imaginary parts of complex arrays, as PyTorch does."""
    xp = array_namespace(*arrays)
    dtype = arrays[0].dtype
    if not xp.isdtype(dtype, "complex floating"):
        return function(*arrays)
    real, imag = (
        xp.astype(function(*map(component_of, arrays)), dtype)
        for component_of in (xp.real, xp.imag)
    )
    return real + imag * 1j


def _no_steps(params: Mapping[str, Array]) -> Array:
    first = next(iter(params.values()))
    xp = array_namespace(first)
    return xp.zeros((), dtype=xp.int32, device=device(first))


def _zeros(params: Mapping[str, Array]) -> Arrays:
    return {name: array_namespace(param).zeros_like(param) for name, param in params.items()}


def learning_rate(lr: LearningRate, step: Array) -> Any:
    """The learning rate after `step` steps."""
    return lr(step) if callable(lr) else lr


def _with_decay(grads: Mapping[str, Array], params: Mapping[str, Array], factor: float) -> Arrays:
    if not factor:
        return dict(grads)
    return {name: grad + factor * params[name] for name, grad in grads.items()}


def bias_correction(beta: float, step: Array, dtype: Any) -> Array:
    """1 - β^t, through expm1: in float32, 1 - 0.999 has lost four of its seven digits."""
    xp = array_namespace(step)
    if beta == 0:
        return xp.ones((), dtype=dtype, device=device(step))
    return -xp.expm1(xp.astype(step, dtype) * math.log(beta))


def _set_numbers(rule: object, *names: str) -> None:
    """Convert NumPy's scalars, which would promote the arrays they multiply, to Python floats."""
    for name in names:
        value = getattr(rule, name)
        if not callable(value):
            object.__setattr__(rule, name, float(value))


def _check_not_negative(rule: object, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        if not callable(value) and not 0 <= value < math.inf:
            raise OptionError(f"{name} must be a finite number of at least 0, got {value!r}")


def _check_factor(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise OptionError(f"{name} must lie in [0, 1), got {value!r}")
