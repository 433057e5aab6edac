"""Methods: the sets that each chooses, on every array library, and custom methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
import optax
import pytest
import torch
from array_api_compat import array_namespace, device
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library, host
from torch import nn

import topkast
from topkast import Support
from topkast.methods import Method, Mixed, Random, Static, TopKAST, View
from topkast.reference import tie_words
from topkast.selection._distribution import exact_fraction, kept_count
from topkast.testing import assert_same_support, sparsities, to_numpy, weights

Tensor = np.ndarray[Any, Any]
METHODS: list[Method] = [TopKAST(), Random(), Mixed(0.0), Mixed(0.3), Mixed(1.0), Static()]


def counts(theta: Tensor, pair: tuple[float, float]) -> list[int]:
    return [kept_count(theta.size, 1 - exact_fraction(sparsity)) for sparsity in pair]


def choose(
    library: Library, method: Method, theta: Tensor, pair: tuple[float, float], draw: int = 0
) -> Support:
    forward, backward = counts(theta, pair)

    def run(array: Any) -> Support:
        flat = array_namespace(array).reshape(array, (-1,))
        return method.choose(View(flat, forward, backward, seed=3, name="w", draw=draw))

    support: Support = library.compile(run)(library.asarray(theta))
    return support


def by_magnitude(theta: Tensor) -> Tensor:
    """Flat indices sorted by magnitude, the largest first; ties by hash."""
    words = tie_words(theta.size, 3, "w").astype(np.int64)
    return np.lexsort((-words, -np.abs(theta).ravel()))


@pytest.mark.parametrize("method", METHODS, ids=repr)
@given(theta=weights(), pair=sparsities())
def test_counts_are_exact_and_indices_ascend(
    library: Library, method: Method, theta: Tensor, pair: tuple[float, float]
) -> None:
    support = choose(library, method, theta, pair)
    indices = to_numpy(support.indices)
    assert [support.forward, len(indices)] == counts(theta, pair)
    for entries in (support.active, support.exploring):
        assert (np.diff(to_numpy(entries)) > 0).all()
    assert len(np.unique(indices)) == len(indices)
    assert ((indices >= 0) & (indices < theta.size)).all()


@pytest.mark.parametrize("method", METHODS[:-1], ids=repr)
@given(theta=weights(), pair=sparsities())
def test_the_share_by_magnitude_is_exact(
    library: Library, method: Method, theta: Tensor, pair: tuple[float, float]
) -> None:
    support = choose(library, method, theta, pair)
    forward, backward = counts(theta, pair)
    shares = {"TopKAST": 1.0, "Random": 0.0}
    share = getattr(method, "by_magnitude", None)
    if share is None:
        share = shares[type(method).__name__]
    count = forward + int(exact_fraction(share) * (backward - forward))
    order = by_magnitude(theta)
    assert set(to_numpy(support.active)) == set(order[:forward])
    assert set(order[:count]) <= set(to_numpy(support.indices))


@given(theta=weights(), pair=sparsities(), draw=st.integers(0, 1000))
def test_the_limits_of_mixed_are_topkast_and_random(
    library: Library, theta: Tensor, pair: tuple[float, float], draw: int
) -> None:
    for share, other in [(0.0, Random()), (1.0, TopKAST())]:
        assert_same_support(
            choose(library, Mixed(share), theta, pair, draw),
            choose(library, other, theta, pair, draw),
        )


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_libraries_choose_the_same(any_library: Library, method: Method) -> None:
    theta = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    for draw in (0, 7):
        support = choose(any_library, method, theta, (0.9, 0.7), draw)
        expected = method.choose(View(theta.ravel(), 60, 180, seed=3, name="w", draw=draw))
        assert_same_support(support, expected)


def test_explore_is_a_shorthand() -> None:
    theta = np.random.default_rng(0).standard_normal(100)
    view = View(theta, 10, 30, 5, "w")
    shorthands: dict[Any, Method] = {"magnitude": TopKAST(), "random": Random()}
    for explore, method in shorthands.items():
        expected = topkast.select(theta, fwd=0.9, bwd=0.7, explore=explore, seed=5, name="w")
        assert_same_support(method.choose(view), expected)


@pytest.mark.parametrize(("method", "probability"), [(Mixed(0.5), 10 / 80), (Static(), 30 / 100)])
def test_draws_are_uniform(method: Method, probability: float) -> None:
    """Over 2,000 draws, all entries are drawn equally often, within five standard deviations."""
    theta = np.linspace(2, 1, 100)
    drawn, rounds = np.zeros(100), 2000
    for draw in range(rounds):
        drawn[method.choose(View(theta, 10, 30, seed=0, name="w", draw=draw)).indices] += 1
    first = 20 if isinstance(method, Mixed) else 0  # the largest entries are always chosen
    assert (drawn[:first] == rounds).all()
    tolerance = 5 * np.sqrt(rounds * probability * (1 - probability))
    assert (abs(drawn[first:] - rounds * probability) < tolerance).all()


@dataclass(frozen=True)
class Leading(Method):
    """A custom method: the first entries, shifted by one at each refresh if `moving`."""

    moving: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def choose(self, view: View) -> Support:
        xp = array_namespace(view.weights)
        indices = xp.arange(view.backward, dtype=xp.int32, device=device(view.weights))
        if self.moving:
            indices = indices + view.draw
        return Support(indices, view.forward)


def train_arrays(method: Method, library: Library, updates: int) -> list[Tensor]:
    """Indices of B after each update."""
    params: Any = {"w": library.asarray(np.linspace(-1, 1, 120, dtype=np.float32).reshape(12, 10))}
    tx = topkast.wrap_optimizer(
        topkast.SGD(0.1), fwd=0.9, bwd=0.8, method=method, refresh_every=1, seed=3
    )
    state, step = library.compile(tx.init)(params), library.compile(tx.step)
    history = [host(state.supports["w"].indices)]
    for _ in range(updates):
        grads = {"w": library.asarray(np.cos(np.arange(120.0, dtype=np.float32)).reshape(12, 10))}
        params, state = step(grads, state, params)
        history.append(host(state.supports["w"].indices))
    return history


def train_optax(method: Method, updates: int) -> list[Tensor]:
    params: Any = {"w": np.linspace(-1, 1, 120, dtype=np.float32).reshape(12, 10)}
    params = jax.tree.map(jax.numpy.asarray, params)
    tx = topkast.wrap_optimizer(
        optax.sgd(0.1), fwd=0.9, bwd=0.8, method=method, refresh_every=1, seed=3
    )
    state, step = tx.init(params), jax.jit(tx.step)
    history = [host(state.supports["w"].indices)]
    grads = {"w": np.cos(np.arange(120.0, dtype=np.float32)).reshape(12, 10)}
    for _ in range(updates):
        params, state = step(grads, state, params)
        history.append(host(state.supports["w"].indices))
    return history


def make_torch(method: Method | None, **options: Any) -> tuple[nn.Linear, Any]:
    layer = nn.Linear(10, 12, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 120).view(12, 10))
    settings: dict[str, Any] = {"fwd": 0.9, "bwd": 0.8, "refresh_every": 1, "seed": 3, **options}
    inner = torch.optim.SGD([("w", layer.weight)], 0.1)
    return layer, topkast.wrap_optimizer(inner, method=method, **settings)


def train_torch(method: Method, updates: int, *, sparse: bool) -> list[Tensor]:
    layer, opt = make_torch(method)
    model = nn.Sequential(layer)
    if sparse:
        topkast.sparsify(model, opt)
    history = [np.flatnonzero(topkast.masks(opt)["w"].backward)]
    for _ in range(updates):
        opt.zero_grad()
        model(torch.linspace(-1, 1, 50).view(5, 10)).sum().backward()
        opt.step()
        history.append(np.flatnonzero(topkast.masks(opt)["w"].backward))
    return history


TRAININGS: dict[str, Callable[[Method, int], list[Tensor]]] = {
    "optax": train_optax,
    "masked": lambda method, updates: train_torch(method, updates, sparse=False),
    "sparse": lambda method, updates: train_torch(method, updates, sparse=True),
}


class TestTraining:
    @pytest.mark.parametrize("name", TRAININGS)
    def test_static_sets_stay(self, name: str) -> None:
        history = TRAININGS[name](Static(), 3)
        expected = Static().choose(View(np.zeros(120), 12, 24, 3, "w")).indices
        for indices in history:
            np.testing.assert_array_equal(np.sort(indices), np.sort(expected))

    def test_static_sets_stay_in_arrays(self, any_library: Library) -> None:
        history = train_arrays(Static(), any_library, 3)
        for indices in history:
            np.testing.assert_array_equal(indices, history[0])

    @pytest.mark.parametrize("name", TRAININGS)
    def test_custom_method(self, name: str) -> None:
        history = TRAININGS[name](Leading(moving=True), 3)
        for update, indices in enumerate(history):
            np.testing.assert_array_equal(indices, np.arange(24) + update)

    def test_custom_method_in_arrays(self, any_library: Library) -> None:
        history = train_arrays(Leading(moving=True), any_library, 3)
        for update, indices in enumerate(history):
            np.testing.assert_array_equal(indices, np.arange(24) + update)

    def test_method_of_a_single_tensor(self) -> None:
        params = {name: np.linspace(-1, 1, 120).reshape(12, 10) for name in ("body", "head")}
        tx = topkast.wrap_optimizer(
            topkast.SGD(0.1), fwd=0.9, bwd=0.8, overrides={"head": {"method": Leading()}}
        )
        supports = tx.init(params).supports
        np.testing.assert_array_equal(supports["head"].indices, np.arange(24))
        assert supports["body"].active[-1] == 119

    def test_method_of_a_single_tensor_in_torch(self) -> None:
        _, opt = make_torch(None, overrides={"w": {"method": Leading()}})
        assert np.flatnonzero(topkast.masks(opt)["w"].backward).tolist() == list(range(24))

    def test_method_of_a_parameter_group(self) -> None:
        params = {name: nn.Parameter(torch.randn(12, 10)) for name in ("body", "head")}
        groups: list[Any] = [
            {"params": [("body", params["body"])]},
            {"params": [("head", params["head"])], "method": Leading()},
        ]
        opt = topkast.wrap_optimizer(torch.optim.SGD(groups, 0.1), fwd=0.9, bwd=0.8)
        for _ in range(2):
            masks = topkast.masks(opt)
            assert np.flatnonzero(masks["head"].backward).tolist() == list(range(24))
            assert np.flatnonzero(masks["body"].backward).tolist() != list(range(24))
            for param in params.values():
                param.grad = torch.randn(12, 10)
            opt.step()
        assert all("method" not in group for group in opt.param_groups)

    def test_layers_of_stacked_tensors_are_chosen_separately(self) -> None:
        tx = topkast.wrap_optimizer(
            topkast.SGD(0.1), fwd=0.9, bwd=0.8, stacked="w", method=Leading()
        )
        support = tx.init({"w": np.ones((2, 10, 10))}).supports["w"]
        np.testing.assert_array_equal(support.active, [*range(10), *range(100, 110)])

    def test_a_resumed_run_equals_an_uninterrupted_one(self) -> None:
        method = Mixed(0.5)
        expected = train_torch(method, 4, sparse=False)[-1]
        layer, opt = make_torch(method)
        _step(layer, opt, 2)
        other_layer, other = make_torch(method)
        other_layer.load_state_dict(layer.state_dict())
        other.load_state_dict(opt.state_dict())
        _step(other_layer, other, 2)
        np.testing.assert_array_equal(np.flatnonzero(topkast.masks(other)["w"].backward), expected)


def _step(layer: nn.Linear, opt: Any, updates: int) -> None:
    for _ in range(updates):
        opt.zero_grad()
        layer(torch.linspace(-1, 1, 50).view(5, 10)).sum().backward()
        opt.step()


class Fewer(Leading):
    def choose(self, view: View) -> Support:
        support = super().choose(view)
        return Support(support.indices[1:], support.forward)


class Backwards(Leading):
    def choose(self, view: View) -> Support:
        support = super().choose(view)
        return Support(support.indices[::-1], support.forward)


class Outside(Leading):
    def choose(self, view: View) -> Support:
        support = super().choose(view)
        return Support(support.indices + view.weights.shape[0] - 1, support.forward)


class Repeating(Leading):
    def choose(self, view: View) -> Support:
        support = super().choose(view)
        return Support.of(support.active, support.exploring - view.forward)


class Uncounted(Leading):
    def choose(self, view: View) -> Support:
        return Support(super().choose(view).indices, view.forward - 1)


class Elsewhere(Leading):
    def choose(self, view: View) -> Support:
        support = super().choose(view)
        return Support(torch.asarray(support.indices), support.forward)


class Tuples(Leading):
    def choose(self, view: View) -> Any:
        support = super().choose(view)
        return support.active, support.exploring


class Wide(Leading):
    def choose(self, view: View) -> Support:
        support = super().choose(view)
        return Support(support.indices.astype(np.int64), support.forward)


class Curious(Leading):
    needs: ClassVar[frozenset[str]] = frozenset({"weights", "hessian"})


class Undeclared(TopKAST):
    """The largest weights, which it does not ask for."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def choose(self, view: View) -> Support:
        return super().choose(view)


class UndeclaredLater(Undeclared):
    """The same at refreshes alone, where PyTorch passes zeros."""

    def choose(self, view: View) -> Support:
        if isinstance(view.draw, int) and view.draw == 0:
            return Leading().choose(view)
        return super().choose(view)


class OwnGenerator(Method):
    """Draws that are other ones in each process, and after a checkpoint."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    def choose(self, view: View) -> Support:
        drawn = np.random.default_rng().permutation(view.weights.shape[0])[: view.backward]
        active, exploring = np.sort(drawn[: view.forward]), np.sort(drawn[view.forward :])
        indices = np.concatenate([active, exploring])
        if isinstance(view.weights, torch.Tensor):
            return Support(torch.from_numpy(indices), view.forward)
        return Support(indices, view.forward)


class TestRefusals:
    @pytest.mark.parametrize("method", [Undeclared(), UndeclaredLater(), OwnGenerator()])
    @pytest.mark.parametrize("training", ["arrays", "masked"])
    def test_sets_that_depend_on_what_was_not_declared(self, method: Method, training: str) -> None:
        runs = TRAININGS | {"arrays": lambda own, count: train_arrays(own, LIBRARIES[0], count)}
        message = f"{type(method).__name__} chose other sets of w when it was called again"
        with pytest.raises(topkast.MismatchError, match=message) as caught:
            runs[training](method, 1)
        assert ("`needs` lack 'weights'" in str(caught.value)) == ("weights" not in method.needs)

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (Fewer(), r"Fewer chose \|A\|, \|B\| = \(12, 23\) .* w, expected \(12, 24\)"),
            (Backwards(), "Backwards chose for w has indices of A that do not ascend"),
            (Outside(), r"Outside chose for w has indices outside of \[0, 120\)"),
            (Repeating(), "Repeating chose for w has an index twice"),
            (Uncounted(), r"Uncounted chose \|A\|, \|B\| = \(11, 24\) .* w, expected \(12, 24\)"),
            (Elsewhere(), r"Elsewhere chose indices of type torch\.Tensor .* weights, numpy"),
            (Tuples(), "Tuples chose a tuple for w, expected a topkast.Support"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Method) else "",
    )
    def test_invalid_sets(self, method: Method, message: str) -> None:
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, method=method)
        with pytest.raises(topkast.MismatchError, match=message):
            tx.init({"w": np.ones((12, 10))})

    def test_indices_may_be_wide(self) -> None:
        params = {"w": np.linspace(-1, 1, 120).reshape(12, 10)}
        state, expected = (
            topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, method=method).init(params)
            for method in (Wide(), Leading())
        )
        assert_same_support(state.supports["w"], expected.supports["w"])
        assert state.supports["w"].indices.dtype == np.int32

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "random"}, "method must be a topkast.methods.Method"),
            ({"method": Random}, r"construct it first, Random\(\)"),
            ({"method": Static(), "explore": "random"}, "choose one of the two"),
            (
                {"method": Curious()},
                "Curious needs hessian, but a method can need only gradient, momentum, random",
            ),
            ({"overrides": {"w": {"method": Curious()}}}, r"overrides\['w'\]: Curious needs"),
        ],
    )
    def test_invalid_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(topkast.OptionError, match=message):
            topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, **options)

    def test_a_group_that_gets_both_options_later(self) -> None:
        layer = nn.Linear(10, 12, bias=False)
        group: Any = {"params": [("w", layer.weight)], "method": Leading()}
        opt = topkast.wrap_optimizer(torch.optim.SGD([group], 0.1), fwd=0.9, bwd=0.8)
        before = layer.weight.detach().clone()
        opt.param_groups[0]["explore"] = "random"
        layer.weight.grad = torch.ones(12, 10)
        with pytest.raises(topkast.OptionError, match="choose one of the two"):
            opt.step()
        assert torch.equal(layer.weight, before)

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "half"])
    def test_invalid_shares(self, share: Any) -> None:
        with pytest.raises(topkast.OptionError, match="by_magnitude is a share"):
            Mixed(share)
