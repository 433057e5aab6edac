"""Sparse execution in JAX trains exactly like masked execution, and compiles once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import topkast_jax
from topkast_jax import sparse_linear
from topkast_jax.sparse import _targets

import topkast

ADAMW = optax.adamw(1e-2)
COMPILATIONS = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True)
def _doubles() -> Any:
    with jax.enable_x64(True):
        yield


def make_params(dtype: Any = jnp.float64, seed: int = 0) -> Any:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "body": [
            {"w": jax.random.normal(keys[0], (12, 40), dtype) / 3, "b": jnp.zeros(40, dtype)},
            {"w": jax.random.normal(keys[1], (40, 30), dtype) / 6, "b": jnp.zeros(30, dtype)},
        ],
        "head": {"w": jax.random.normal(keys[2], (30, 4), dtype) / 5},
    }


def loss(alpha: Any, structures: Any, inputs: Any) -> Any:
    hidden = inputs
    for number, layer in enumerate(alpha["body"]):
        structure = structures.get(f"body.{number}.w")
        hidden = jnp.tanh(sparse_linear(layer["w"], structure, hidden, layer["b"]))
    output = sparse_linear(alpha["head"]["w"], structures.get("head.w"), hidden)
    return jnp.mean((output - 1) ** 2)


def inputs_of(step: Any, dtype: Any = jnp.float64) -> Any:
    return jax.random.normal(jax.random.fold_in(jax.random.key(100), step), (8, 12), dtype)


def wrap(inner: Any = ADAMW, **options: Any) -> Any:
    return topkast.wrap_optimizer(
        inner, **{"fwd": 0.9, "bwd": 0.7, "refresh_every": 4, "dense": "head.*", **options}
    )


def make_step(tx: Any, *, fused: bool = True, **jit_options: Any) -> Any:
    def train(params: Any, state: Any, inputs: Any) -> Any:
        grads = jax.grad(loss)(topkast.forward_params(params, state), state.structures, inputs)
        if fused:
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(train, **jit_options)


def train(
    tx: Any, params: Any, steps: int, *, sparse: bool, step: Any = None, **options: Any
) -> Any:
    state = tx.init(params)
    if sparse:
        state = topkast_jax.sparsify(params, state)
    step = step or make_step(tx, **options)
    for number in range(steps):
        params, state = step(params, state, inputs_of(number, params["head"]["w"].dtype))
    return params, state


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (actual, expected)]
    assert structures[0] == structures[1]
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=tolerance, atol=tolerance)


def assert_same_training(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal sets; equal weights and moments up to rounding."""
    (params, state), (masked_params, masked_state) = actual, expected
    assert state.layouts
    for name, support in masked_state.supports.items():
        np.testing.assert_array_equal(state.supports[name].indices, support.indices)
    assert_close(topkast_jax.densify(state).core, masked_state.core, tolerance)
    assert_close(params, masked_params, tolerance)


@pytest.mark.parametrize("fused", [True, False])
def test_fifty_steps_with_refreshes_agree_with_masked_execution(fused: bool) -> None:
    tx, params = wrap(), make_params()
    masked = train(tx, params, 50, sparse=False, fused=fused)
    sparse = train(tx, params, 50, sparse=True, fused=fused)
    assert_same_training(sparse, masked)
    assert int(sparse[1].stale_refreshes) == 0
    assert int(sparse[1].entered_active["body.0.w"][0]) > 0


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        (optax.sgd(0.1, momentum=0.9), {"penalty_kind": "l1", "explore_until": 10}),
        (ADAMW, {"power": 2.0}),
        (ADAMW, {"bwd": 0.9, "method": topkast.methods.SET()}),
        (optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)), {"refresh_every": 3}),
        (ADAMW, {"overrides": {"body.0.w": {"fwd": 0.5, "bwd": 0.5, "refresh_every": 6}}}),
        (ADAMW, {"fwd": 0.5, "bwd": 0.0, "pattern": (1, 2)}),
    ],
    ids=["sgd, l1, explore_until", "power", "SET", "clip", "overrides", "pattern"],
)
def test_other_optimizers_options_and_methods_agree(inner: Any, options: dict[str, Any]) -> None:
    tx, params = wrap(inner, **options), make_params()
    masked = train(tx, params, 13, sparse=False)
    assert_same_training(train(tx, params, 13, sparse=True), masked)


def test_single_precision_agrees_to_rounding() -> None:
    tx, params = wrap(optax.sgd(0.1)), make_params(jnp.float32)
    masked = train(tx, params, 12, sparse=False)
    assert_same_training(train(tx, params, 12, sparse=True), masked, 1e-5)


def test_a_refresh_recompiles_nothing() -> None:
    """One compilation for 30 steps with 7 refreshes, counted by JAX itself."""
    tx, params = wrap(), make_params()
    state = topkast_jax.sparsify(params, tx.init(params))
    batches = [inputs_of(number) for number in range(30)]
    durations: list[str] = []

    def count(event: str, duration_secs: float, **_: Any) -> None:
        durations.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        step = make_step(tx, donate_argnums=(0, 1))
        vectors = []
        for batch in batches:
            params, state = step(params, state, batch)
            vectors.append(state.layouts["body.1.w"].vector.sum().item())
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert step._cache_size() == 1
    assert len({*vectors}) > 5  # the layouts did change
    # The step, and the sum of this test.
    assert durations.count(COMPILATIONS) <= 3


def test_sparsify_in_the_middle_and_densify() -> None:
    tx, params = wrap(), make_params()
    step = make_step(tx)
    masked = train(tx, params, 12, sparse=False, step=step)
    state = tx.init(params)
    for number in range(12):
        if number == 5:
            state = topkast_jax.sparsify(params, state)
            alpha = topkast.forward_params(params, state)
            assert alpha["body"][0]["w"].shape == (1, 144)
            assert alpha["head"]["w"].shape == (30, 4)
        if number == 9:
            state = topkast_jax.densify(state)
        params, state = step(params, state, inputs_of(number))
    assert_close((params, state.core), (masked[0], masked[1].core), 1e-9)


def test_scan_and_donation() -> None:
    tx, params = wrap(), make_params()
    expected = train(tx, params, 10, sparse=True)
    state = topkast_jax.sparsify(params, tx.init(params))
    step = make_step(tx)

    def run(params: Any, state: Any) -> Any:
        def body(carry: Any, number: Any) -> Any:
            return step(*carry, inputs_of(number)), None

        return jax.lax.scan(body, (params, state), jnp.arange(10))[0]

    actual = jax.jit(run, donate_argnums=(0, 1))(jax.tree.map(jnp.array, params), state)
    # XLA may round the last bit otherwise inside of a loop: checksums of weights differ then.
    same_bits = {"weights_checksum": expected[1].weights_checksum}
    assert_close((actual[0], actual[1]._replace(**same_bits)), expected, 1e-12)


@pytest.mark.slow
def test_seeds_under_vmap() -> None:
    tx = wrap()
    seeds = [make_params(seed=seed) for seed in (0, 1)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    states = [topkast_jax.sparsify(one, tx.init(one)) for one in seeds]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    step, single = make_step(tx), make_step(tx)
    batched = jax.jit(jax.vmap(step, (0, 0, None)))
    for number in range(5):
        params, state = batched(params, state, inputs_of(number))
    for index, one in enumerate(seeds):
        expected, expected_state = train(tx, one, 5, sparse=True, step=single)
        actual, core = jax.tree.map(lambda leaf: leaf[index], (params, state.core))  # noqa: B023
        assert_close((actual, core), (expected, expected_state.core), 1e-9)


@pytest.mark.slow
def test_a_learning_rate_can_be_learned_through_a_step() -> None:
    """The derivative of an update, in which values are read and written by kernels."""
    params = make_params()

    def after_step(rate: Any, sparse: bool) -> Any:
        tx = wrap(optax.sgd(rate), probe=False)
        state = tx.init(params)
        if sparse:
            state = topkast_jax.sparsify(params, state)
        grads = jax.grad(loss)(
            topkast.forward_params(params, state), state.structures, inputs_of(0)
        )
        moved, state = tx.step(grads, state, params)
        return loss(topkast.forward_params(moved, state), state.structures, inputs_of(1))

    for derivative in (jax.grad, jax.jacfwd):
        sparse, masked = (derivative(after_step)(0.1, sparse) for sparse in (True, False))
        assert masked != 0
        np.testing.assert_allclose(sparse, masked, rtol=1e-9)


def test_second_derivatives_are_those_of_masked_execution() -> None:
    """The forward view does not depend on B∖A, in none of the orders of differentiation."""
    params = {"w": jax.random.normal(jax.random.key(0), (12, 30), jnp.float64)}
    direction = {"w": jax.random.normal(jax.random.key(1), (12, 30), jnp.float64)}
    masked = wrap(dense=None).init(params)
    forward = np.asarray(topkast.masks(masked, params)["w"].forward)
    results = []
    for state in (masked, topkast_jax.sparsify(params, masked)):

        def error(params: Any, state: Any = state) -> Any:
            weight = topkast.forward_params(params, state)["w"]
            output = sparse_linear(weight, state.structures.get("w"), inputs_of(0))
            return jnp.mean((output - 1) ** 2)

        def along(params: Any, error: Any = error) -> Any:
            return jax.jvp(error, (params,), (direction,))[1]

        def dot(params: Any, error: Any = error) -> Any:
            return jnp.vdot(jax.grad(error)(params)["w"], direction["w"])

        products = jax.jvp(jax.grad(error), (params,), (direction,))[1]
        results.append([products["w"], jax.grad(along)(params)["w"], jax.grad(dot)(params)["w"]])
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(expected, results[0][0], rtol=1e-9, atol=1e-12)
        assert np.count_nonzero(expected) == forward.sum()


def test_a_state_resumes_from_plain_arrays() -> None:
    tx, params = wrap(), make_params()
    step = make_step(tx)
    expected = train(tx, params, 9, sparse=True, step=step)
    params, state = train(tx, params, 5, sparse=True, step=step)
    leaves, tree = jax.tree.flatten((params, state))
    params, state = jax.tree.unflatten(tree, [jnp.asarray(np.array(leaf)) for leaf in leaves])
    for number in range(5, 9):
        params, state = step(params, state, inputs_of(number))
    assert_close((params, state), expected, 0.0)


def test_layouts_of_another_machine_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from topkast_jax.sparse import _structure

    from topkast.backends import _threads
    from topkast.kernels.xla import _structure as structures

    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.5, bwd=0.25, refresh_every=1)
    state = topkast_jax.sparsify(params, tx.init(params))
    others = 1 if _threads.CORES > 4 else 16 * _threads.CORES  # with chunks of another size
    monkeypatch.setattr(structures, "CORES", others)
    _structure.plan_of.cache_clear()
    try:
        grads = topkast.forward_params(params, state)
        with pytest.raises(topkast.MismatchError, match="number of cores"):
            tx.step(grads, state, params)
        state = topkast_jax.sparsify(params, topkast_jax.densify(state))
        tx.step(grads, state, params)
    finally:
        _structure.plan_of.cache_clear()


def test_only_the_step_writes_into_donated_weights() -> None:
    """Between refreshes a step forms no array of the weight's size beside the weight itself."""
    tx, params = wrap(refresh_every=100), make_params(jnp.float32)
    state = topkast_jax.sparsify(params, tx.init(params))
    step = make_step(tx, donate_argnums=(0, 1))
    inputs = inputs_of(0, jnp.float32)
    text = step.lower(params, state, inputs).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    made = [line for line in entry.splitlines() if " = f32[40,30]" in line]
    names = ("parameter(", "topkast_put", "get-tuple-element(", "bitcast(")
    assert made
    assert all(any(name in line for name in names) for line in made), made


def test_summary_counts_layouts() -> None:
    tx, params = wrap(), make_params(jnp.float32)
    state = tx.init(params)
    masked = topkast.summary(state, params)
    sparse = topkast.summary(topkast_jax.sparsify(params, state), params)
    vector = topkast_jax.sparsify(params, state).layouts["body.1.w"].vector
    assert sparse.tensors[3].name == "body.1.w"
    assert sparse.tensors[3].held_parts["layouts"] == vector.nbytes
    # The gradient and the forward view hold |B| = 144 and 360 weights of 480 and 1200.
    assert masked.model_bytes - sparse.model_bytes == 2 * 4 * (480 - 144 + 1200 - 360)


def test_what_has_no_kernel_stays_masked_and_is_named() -> None:
    params = {
        "conv": jax.random.normal(jax.random.key(0), (3, 3, 4, 8)),
        "half": jnp.ones((8, 8), jnp.bfloat16).at[0].set(2),
        "blocked": jax.random.normal(jax.random.key(1), (8, 8)),
        "w": jax.random.normal(jax.random.key(2), (8, 8)),
    }
    tx = topkast.wrap_optimizer(
        optax.sgd(0.1), fwd=0.5, bwd=0.25, overrides={"blocked": {"block": (2, 2)}}
    )
    state = tx.init(params)
    assert topkast_jax.find_obstacles(params, state) == {
        "conv": "it has 4 dimensions, and kernels serve matrices",
        "half": "it is bfloat16, and kernels serve float32 and float64",
        "blocked": "its units are blocks of weights",
    }
    sparse = topkast_jax.sparsify(params, state)
    assert [*sparse.structures] == ["w"]
    alpha = topkast.forward_params(params, sparse)
    assert alpha["blocked"].shape == (8, 8)
    assert alpha["w"].shape == (1, 48)
    assert not topkast_jax.sparsify(params, state, only="w").layouts.keys() ^ {"w"}
    with pytest.raises(topkast.UnsupportedTensorError, match="conv has no kernel"):
        topkast_jax.sparsify(params, state, only=["conv", "w"])
    with pytest.raises(topkast.OptionError, match="nothing"):
        topkast_jax.sparsify(params, state, only="nothing")
    ranked = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.5, bwd=0.25, distribution="global")
    weights = {"a": params["w"], "b": params["blocked"]}
    obstacles = topkast_jax.find_obstacles(weights, ranked.init(weights))
    assert [*obstacles.values()] == ["it is ranked with others: distribution='global'"]


def test_arguments_like_gradients_reach_the_inner_transformation_on_b() -> None:
    """Some tensors are sparse and others masked: their gradients have two forms."""
    received: dict[str, Any] = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        received.update(extra, updates=updates)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, params = wrap(inner, penalty=0.0, probe=False), make_params()
    state = topkast_jax.sparsify(params, tx.init(params), only="body.0.*")
    grads = jax.tree.map(lambda leaf: 2 * leaf, topkast.forward_params(params, state))
    assert grads["body"][0]["w"].shape != params["body"][0]["w"].shape
    tx.step(grads, state, params, grad=grads, at=params, value=1.0)
    assert_close(received["grad"], received["updates"], 0.0)
    assert jax.tree.map(jnp.shape, received["at"]) == jax.tree.map(jnp.shape, received["grad"])
    assert received["value"] == 1.0


def test_params_of_another_model_are_refused_by_name() -> None:
    tx, params = wrap(), make_params()
    state = topkast_jax.sparsify(params, tx.init(params))
    for other in (topkast.forward_params(params, state), {"body": params["body"][:1]}):
        with pytest.raises(topkast.MismatchError, match=r"body\.[01]\.w is .* in params, but"):
            topkast.forward_params(other, state)


def test_errors_name_the_remedy() -> None:
    params = {"w": jax.random.normal(jax.random.key(2), (8, 8))}
    tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.5, bwd=0.25)
    state = topkast_jax.sparsify(params, tx.init(params))
    with pytest.raises(topkast.MismatchError, match="w has sparse execution, so its gradient has"):
        tx.step(params, state, params)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tx.init(params))
    with pytest.raises(topkast.MismatchError, match="batch of 3"):
        topkast_jax.sparsify(params, batch)
    with pytest.raises(topkast.MismatchError, match="without MultiSteps"):
        topkast_jax.sparsify(params, optax.MultiSteps(tx, 2).init(params))
    rigl = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.5, bwd=0.5, method=topkast.methods.RigL())
    state = topkast_jax.sparsify(params, rigl.init(params))
    grads = topkast.forward_params(params, state)
    with pytest.raises(topkast.UnsupportedTensorError, match="RigL needs the gradient outside B"):
        rigl.step(grads, state, params)


# The foreign function interface


def header_text() -> str:
    return (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("int64_t* dims;", "int64_t extra; int64_t* dims;", "XLA_FFI_Buffer is"),
        ("void** rets;", "void* rets;", "XLA_FFI_Rets is"),
        ("XLA_FFI_ExecutionStage stage;", "", "XLA_FFI_CallFrame is"),
        ("(XLA_FFI_State_Set);", "(XLA_FFI_Other);", "XLA_FFI_Api is"),
        ("XLA_FFI_DataType_F64 = 12", "XLA_FFI_DataType_F64 = 13", "XLA_FFI_DataType_F64 is 13"),
        ("XLA_FFI_API_MAJOR 0", "XLA_FFI_API_MAJOR 1", "XLA_FFI_API_MAJOR is 1"),
        ("int64_t* num_threads;", "int32_t* num_threads;", "XLA_FFI_ThreadPool_NumThreads_Args is"),
        ("XLA_FFI_Metadata* metadata;", "", "XLA_FFI_Metadata_Extension is"),
    ],
)
def test_a_header_with_other_structures_is_refused(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = header_text()
    assert old in text
    path = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    path.parent.mkdir(parents=True)
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(topkast.UnsupportedTensorError, match=message) as caught:
        _targets.register.__wrapped__()
    assert "Train masked: leave out topkast_jax.sparsify" in str(caught.value)


NAMES_OF_JAXLIB_0_11 = [
    ("XLA_FFI_Extension_Base", "XLA_FFI_InternalExtension"),
    ("XLA_FFI_Extension_Type", "XLA_FFI_InternalExtension_Type"),
    ("XLA_FFI_ExecutionContext", "XLA_FFI_InvokeContext"),
    ("XLA_FFI_Error_GetMessage", "XLA_FFI_Error_GetDetails"),
]


def test_the_header_of_jaxlib_is_accepted_under_old_and_new_names() -> None:
    from topkast.kernels.xla import check_header

    text = header_text()
    major, minor = check_header(text)
    assert major == 0
    for earlier, later in NAMES_OF_JAXLIB_0_11:
        text = text.replace(earlier, later)
    assert check_header(text) == (major, minor)
    assert minor >= 1
