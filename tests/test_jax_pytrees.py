"""A wrapped optax transformation trains any pytree of weights, and refuses other pytrees."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax_training import ADAMW, Pytree, assert_equal, avals, make_params, structure, wrap

import topkast


class Pair(NamedTuple):
    first: Any
    second: Any


class Reversed(eqx.Module):
    """Attributes that are not in the order of their names."""

    second: Any
    first: Any


class TestPytrees:
    def test_names_are_key_paths(self) -> None:
        params = (Pair({"w": jnp.ones((4, 5))}, None), [jnp.ones((4, 5)), jnp.arange(4)])
        tx = wrap(dense="1.*")
        state = tx.init(params)
        assert list(state.supports) == ["0.first.w"]
        assert set(topkast.dense_params(state, params)) == {"0.first.w", "1.0"}
        grads = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(grads, state, params)
        assert structure(updates) == structure(params)
        assert_equal(updates[1][1], jnp.zeros(4, jnp.int32))

    def test_bare_array(self) -> None:
        params = jnp.arange(20.0).reshape(4, 5) + 1
        tx = wrap()
        state = tx.init(params)
        updates, state = tx.update(jnp.ones((4, 5)), state, params)
        assert int(jnp.sum(updates != 0)) == 6
        assert topkast.summary(state, params).tensors[0].backward == 6

    def test_integer_leaves_stay(self) -> None:
        params = {"w": make_params()["head"]["w"], "n": jnp.arange(3), "flag": jnp.asarray(True)}
        tx = wrap()

        def squares(alpha: Pytree) -> jax.Array:
            return jnp.sum(alpha["w"] ** 2)

        grads = jax.grad(squares, allow_int=True)(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        updated = optax.apply_updates(params, updates)
        assert_equal((updated["n"], updated["flag"]), (params["n"], params["flag"]))
        assert avals(updated) == avals(params)

    def test_equinox(self) -> None:
        model = eqx.nn.MLP(6, 2, 16, 2, key=jax.random.key(0))
        tx = wrap(dense="layers.2.*")
        params, static = eqx.partition(model, eqx.is_inexact_array)
        state = tx.init(params)
        assert list(state.supports) == ["layers.0.weight", "layers.1.weight"]

        @eqx.filter_jit
        def train(params: Any, state: Any) -> Any:
            def objective(alpha: Any) -> jax.Array:
                outputs = jax.vmap(eqx.combine(alpha, static))(jnp.ones((4, 6)))
                return jnp.mean((outputs - 1) ** 2)

            value, grads = eqx.filter_value_and_grad(objective)(
                topkast.forward_params(params, state)
            )
            updates, state = tx.update(grads, state, params)
            return eqx.apply_updates(params, updates), state, value

        values = []
        for _ in range(20):
            params, state, value = train(params, state)
            values.append(float(value))
        assert values[-1] < values[0] / 2
        alpha: Any = topkast.forward_params(params, state)
        assert int(jnp.sum(alpha.layers[1].weight != 0)) == 26

    def test_flax_nnx_optimizer(self) -> None:
        pytest.importorskip("flax", reason="needs Flax, which asks for a newer JAX")
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                self.hidden = nnx.Linear(6, 16, rngs=rngs)
                self.out = nnx.Linear(16, 2, rngs=rngs)

            def __call__(self, inputs: Any) -> Any:
                return self.out(nnx.tanh(self.hidden(inputs)))

        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, wrap(dense="out.*"), wrt=nnx.Param)

        @nnx.jit
        def train(model: Any, optimizer: Any) -> Any:
            graph, theta = nnx.split(model, nnx.Param)
            alpha = topkast.forward_params(theta, nnx.as_pure(optimizer.opt_state))

            def objective(alpha: Any) -> jax.Array:
                return jnp.mean((nnx.merge(graph, alpha)(jnp.ones((4, 6))) - 1) ** 2)

            value, grads = nnx.value_and_grad(objective)(alpha)
            optimizer.update(model, grads)
            return value

        values = [float(train(model, optimizer)) for _ in range(20)]
        assert values[-1] < values[0] / 2
        masks = topkast.masks(optimizer, nnx.state(model, nnx.Param))
        assert list(masks) == ["hidden.kernel"]
        assert int(masks["hidden.kernel"].backward.sum()) == 29
        table = topkast.summary(nnx.as_pure(optimizer.opt_state), nnx.state(model, nnx.Param))
        assert table.tensors[1].name == "hidden.kernel"
        assert table.tensors[1].held_bytes == 29 * (4 + 2 + 4 + 4)  # index, age, moments

    def test_attributes_called_value(self) -> None:
        class Attention(eqx.Module):
            query: Any
            value: Any

        theta = make_params()["body"][0]["w"]
        for params in (Attention(theta, theta + 1), {"attention": Attention(theta, theta + 1)}):
            tx = wrap(dense="*query")
            state = tx.init(params)
            (name,) = state.supports
            assert name.endswith("value")
            assert topkast.summary(state, params).tensors[1].held_bytes == 72 * 14
            _, state = tx.update(params, state, params)
            assert state.updates == 1

    def test_the_transformation_is_a_pytree(self) -> None:
        tx, params = wrap(), make_params()
        rebuilt = jax.tree.map(lambda leaf: leaf, tx)
        assert_equal(rebuilt.init(params).supports, tx.init(params).supports)
        assert "scale_by_adam" in repr(rebuilt)
        step = eqx.filter_jit(lambda tx, state: tx.step(params, state, params))
        assert step(tx, tx.init(params))[1].updates == 1


class Layer(eqx.Module):
    weight: Any


class Encoder(eqx.Module):
    """A model whose attributes have the names of the state of Adam, as in variational encoders."""

    weight: Any
    mu: Layer
    nu: Layer
    log: Any


@pytest.mark.parametrize(
    ("inner", "options", "second"),
    [
        (optax.adam(0.1), {}, (8, 12)),
        (optax.adam(0.1), {}, (9, 12)),
        pytest.param(
            optax.masked(optax.trace(0.9), Encoder(True, Layer(False), Layer(False), False)),
            {},
            (8, 12),
            marks=pytest.mark.slow,
        ),
        pytest.param(optax.adam(0.1), {"distribution": "global"}, (8, 12), marks=pytest.mark.slow),
        pytest.param(optax.adam(0.1), {"dense": "*mu*"}, (9, 12), marks=pytest.mark.slow),
    ],
    ids=["one shape", "two shapes", "masked", "global", "dense"],
)
def test_attributes_with_the_names_of_the_state(inner: Any, options: Any, second: Any) -> None:
    """An entry ``mu.weight`` of a state is of ``weight``, or of ``mu.weight`` of the model."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes, scalar = [(8, 12), second, (8, 12)], jnp.float32(0.5)
    theta = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]

    def nested(leaves: Any) -> Any:
        first, second, third = leaves
        return Encoder(first, Layer(second), Layer(third), scalar)

    def flat(leaves: Any) -> Any:
        return dict(zip("abcd", [*leaves, scalar], strict=True))

    results = []
    for build in (nested, flat):
        transformation = inner
        if build is flat and isinstance(inner.init(nested(theta)), optax.MaskedState):
            mask = {"a": True, "b": False, "c": False, "d": False}
            transformation = optax.masked(optax.trace(0.9), mask)
        dense = options.get("dense") and ("*mu*" if build is nested else "b")
        all_options = {"fwd": 0.8, "bwd": 0.6, "refresh_every": 1, **options, "dense": dense}
        tx = topkast.wrap_optimizer(transformation, **all_options)
        step, params = jax.jit(tx.step), build(theta)
        state = tx.init(params)
        for key in keys:
            grads = build([jax.random.normal(key, shape) for shape in shapes])
            params, state = step(grads, state, params)
        results.append((params, [row.held_bytes for row in topkast.summary(state, params).tensors]))
    (params, held), (expected, expected_held) = results
    assert_equal(jax.tree.leaves(params), jax.tree.leaves(expected))
    assert held == expected_held


@jax.tree_util.register_pytree_node_class
class Labelled:
    """A node whose static content is a list, which has no hash."""

    def __init__(self, weight: Any, labels: list[str]) -> None:
        self.weight, self.labels = weight, labels

    def tree_flatten(self) -> tuple[tuple[Any], list[str]]:
        return (self.weight,), self.labels

    @classmethod
    def tree_unflatten(cls, labels: list[str], children: tuple[Any]) -> Labelled:
        return cls(*children, labels)


def test_static_content_without_hash() -> None:
    """Plans are kept by the hash of the tree; of such a tree, they are made again."""
    weight, tx = jax.random.normal(jax.random.key(0), (20, 30)), wrap(optax.sgd(0.1))
    expected, _ = tx.step({"w": weight}, tx.init({"w": weight}), {"w": weight})
    params = Labelled(weight, ["input", "output"])
    params, state = tx.step(params, tx.init(params), params)
    assert (state.updates, params.labels) == (1, ["input", "output"])
    assert_equal(params.weight, expected["w"])


def test_models_that_differ_in_static_content_keep_their_own() -> None:
    """JAX hashes trees without their static content, so that a hash does not identify a tree."""
    tx = wrap()
    for labels in (["first"], ["second"], ["first"]):
        params = Labelled(jax.random.normal(jax.random.key(0), (20, 30)), labels)
        state = tx.init(params)
        assert structure(optax.tree.get(state, "mu")) == structure(params)


def test_models_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from topkast_jax import _transform

    monkeypatch.setattr(_transform, "_MAX_TREES", 2)
    tx, weight = wrap(optax.sgd(0.1)), jnp.ones((4, 5))
    for number in range(5):
        params = Labelled(weight, [str(number)])
        _, state = tx.step(params, tx.init(params), params)
        assert state.updates == 1


def test_the_order_of_attributes_in_a_global_ranking() -> None:
    """Compiled functions sort names, but the joint vector keeps the order of the model."""
    weights = jax.random.normal(jax.random.key(0), (2, 12, 20))
    options: Any = {"distribution": "global", "refresh_every": 2, "bwd": 0.0}
    results = []
    for params in ({"a": weights[0], "b": weights[1]}, Reversed(*weights)):
        tx = wrap(optax.adam(0.1), **options)
        state, step = tx.init(params), jax.jit(tx.step)
        for _ in range(3):
            params, state = step(params, state, params)
        results.append(jax.tree.leaves(params))
    assert [*state.supports] == ["second + first"]
    assert_equal(*results)


def test_numbers_among_the_gradients() -> None:
    """Params may contain floats, and so may gradients."""
    params = {"w": jnp.ones((4, 5)), "scale": 0.5}
    tx = wrap(optax.sgd(0.1), penalty=0.0)
    moved, _ = tx.step({"w": jnp.ones((4, 5)), "scale": 1.0}, tx.init(params), params)
    assert moved["scale"] == pytest.approx(0.4)


class TestErrors:
    def test_inspecting_with_other_params(self) -> None:
        tx, params = wrap(), make_params()
        state = tx.init(params)
        fewer = {"body": params["body"]}
        smaller = {**params, "head": {"w": jnp.ones((2, 3))}}
        for inspect in (
            lambda params: topkast.forward_params(params, state),
            lambda params: topkast.masks(state, params),
            lambda params: topkast.summary(state, params),
        ):
            with pytest.raises(topkast.MismatchError, match=r"has the sets of head\.w, but params"):
                inspect(fewer)
            with pytest.raises(
                topkast.MismatchError, match=r"head\.w has 6 entries in params, but"
            ):
                inspect(smaller)

    def test_leaves_of_one_name(self) -> None:
        """Options and checkpoints name tensors: two of one name could not be told apart."""
        params = {"a.b": jnp.ones((4, 4)), "a": {"b": jnp.ones((4, 4))}}
        with pytest.raises(topkast.MismatchError, match=r"one name: \['a\.b'\]; rename them"):
            wrap().init(params)

    def test_update_without_params(self) -> None:
        tx, params = wrap(), make_params()
        with pytest.raises(topkast.MismatchError, match="update needs params"):
            tx.update(params, tx.init(params))

    @pytest.mark.parametrize("jit", [False, True])
    def test_params_of_a_different_tree(self, jit: bool) -> None:
        tx, params = wrap(), make_params()
        state = tx.init(params)
        update = jax.jit(tx.update) if jit else tx.update
        others = [
            {"head": params["head"]},
            {**params, "more": params["head"]},
            {**params, "more": jnp.zeros(3)},
            {**params, "head": {"w": jnp.ones((16, 5))}},
            {**params, "body": [{**layer, "b": jnp.zeros(3)} for layer in params["body"]]},
        ]
        for other in others:
            with pytest.raises(topkast.MismatchError, match="differ from those given to init"):
                update(other, state, other)

    def test_grads_of_a_different_tree(self) -> None:
        tx, params = wrap(), make_params()
        state = tx.init(params)
        for grads in ({"head": params["head"]}, {**params, "head": {"w": None}}, [1.0]):
            with pytest.raises(topkast.MismatchError, match="grads"):
                tx.update(grads, state, params)

    @pytest.mark.parametrize("jit", [False, True])
    def test_grads_of_a_different_dtype_or_shape(self, jit: bool) -> None:
        tx, params = wrap(), make_params()
        state = tx.init(params)
        update = jax.jit(tx.update) if jit else tx.update
        for gradient in (jnp.ones((16, 4), jnp.complex64), jnp.ones((4, 16))):
            with pytest.raises(topkast.MismatchError, match=r"head\.w: the gradient is .*, but"):
                update({**params, "head": {"w": gradient}}, state, params)

    def test_functions_among_the_leaves(self) -> None:
        model = eqx.nn.MLP(6, 2, 16, 2, key=jax.random.key(0))
        with pytest.raises(topkast.UnsupportedTensorError, match=r"activation: .*eqx|equinox\.fil"):
            wrap().init(model)

    def test_nothing_to_train(self) -> None:
        with pytest.raises(topkast.MismatchError, match="no floating-point leaf"):
            wrap().init({"n": jnp.arange(3)})

    def test_two_leaves_with_the_same_name(self) -> None:
        with pytest.raises(topkast.MismatchError, match=r"one name: \['a\.b'\]"):
            wrap().init({"a.b": jnp.ones((3, 3)), "a": {"b": jnp.ones((3, 3))}})

    def test_inspecting_without_params(self) -> None:
        with pytest.raises(topkast.MismatchError, match="pass params too"):
            topkast.masks(wrap().init(make_params()))

    def test_inspecting_the_state_of_a_plain_transformation(self) -> None:
        with pytest.raises(topkast.MismatchError, match="got tuple: it contains no such state"):
            topkast.forward_params(make_params(), ADAMW.init(make_params()))
