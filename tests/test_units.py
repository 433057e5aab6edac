"""Units: every framework ranks, keeps, moves and saves whole blocks of weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from libraries import LIBRARIES, Library, host
from rules import RULES
from test_trajectories import assert_same, by_reference, by_torch, by_transform, changes
from torch import nn

import topkast
from topkast import Blocks, Masks, Support
from topkast.methods import Method, Mixed, Random, Static, TopKAST, View
from topkast.reference import top_k, unit_scores
from topkast.selection._units import modulus
from topkast.testing import (
    assert_counts,
    assert_masks,
    assert_same_support,
    assert_survivors_unchanged,
    sparsities,
    to_numpy,
)

Tensor = np.ndarray[Any, Any]
Block = tuple[int, int]
NUMPY, TORCH, JITTED = (
    next(library for library in LIBRARIES if library.name == name)
    for name in ("numpy", "torch", "jax-jit")
)
SCORES: list[Any] = ["sum", "max"]


@st.composite
def matrices_and_blocks(draw: st.DrawFn) -> tuple[Tensor, Block]:
    """Matrices and a block that divides them, with ties, zeros of both signs and huge ratios."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    shape = rows * draw(st.integers(1, 4)), columns * draw(st.integers(1, 4))
    tied = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-30, 1e-42])
    entries = tied | st.floats(-1e6, 1e6, width=32)
    return draw(stnp.arrays(np.float32, shape, elements=entries)), (rows, columns)


def masks_of(support: Support, theta: Tensor) -> Masks:
    flags = np.zeros((2, theta.size), dtype=bool)
    flags[0, to_numpy(support.active_entries)] = True
    flags[1, to_numpy(support.entries)] = True
    return Masks(*flags.reshape(2, *theta.shape))


@given(matrices_and_blocks())
def test_entries_of_blocks_are_ordered_unit_by_unit(
    library: Library, problem: tuple[Tensor, Block]
) -> None:
    theta, (rows, columns) = problem
    height, width = theta.shape
    blocks = Blocks(rows, columns, height, width)
    numbers = np.arange(theta.size).reshape(height // rows, rows, width // columns, columns)
    expected = numbers.transpose(0, 2, 1, 3).reshape(blocks.count, blocks.size)
    units = np.random.default_rng(0).permutation(blocks.count)[: blocks.count // 2 + 1]
    entries = blocks.entries(library.asarray(units.astype(np.int32)))
    np.testing.assert_array_equal(to_numpy(entries), expected[units].ravel())
    assert to_numpy(entries).dtype == np.int32


@given(matrices_and_blocks())
def test_ranks_sort_the_entries_of_ascending_blocks(
    library: Library, problem: tuple[Tensor, Block]
) -> None:
    theta, block = problem
    blocks = Blocks(*block, *theta.shape)
    chosen = np.random.default_rng(theta.size).permutation(blocks.count)[: blocks.count // 2 + 1]
    units = library.asarray(np.sort(chosen).astype(np.int32))
    entries, ranks = to_numpy(blocks.entries(units)), to_numpy(blocks.ranks(units))
    np.testing.assert_array_equal(np.argsort(np.argsort(entries)), ranks)
    assert ranks.dtype == np.int32
    support = Support(units, len(chosen) // 2, blocks)
    for ascending, expected in zip(
        support.ascending_entries(),
        (support.active_entries, support.exploring_entries),
        strict=True,
    ):
        np.testing.assert_array_equal(to_numpy(ascending), np.sort(to_numpy(expected)))


def test_entries_that_were_computed_are_counted() -> None:
    support = topkast.select(np.arange(24.0).reshape(4, 6), fwd=0.5, bwd=0.5, block=(2, 3))
    assert support.cached_bytes == 0
    assert support.entries.nbytes == support.cached_bytes == 4 * 12
    assert topkast.select(np.arange(24.0), fwd=0.5, bwd=0.5).cached_bytes == 0


def test_entries_of_a_tensor_of_2_to_the_31_are_wide() -> None:
    blocks = Blocks(4, 4, 1 << 16, 1 << 16)
    entries = blocks.entries(np.asarray([blocks.count - 1], np.int32))
    assert entries.dtype == np.int64
    assert entries[-1] == (1 << 32) - 1
    assert blocks.ranks(np.asarray([blocks.count - 1], np.int32)).dtype == np.int64


@pytest.mark.parametrize("score", SCORES)
@given(problem=matrices_and_blocks(), pair=sparsities())
def test_laws(
    library: Library, score: Any, problem: tuple[Tensor, Block], pair: tuple[float, float]
) -> None:
    """Whole units, exact and nested counts, ranked by score, ties broken by hash."""
    theta, block = problem
    fwd, bwd = pair
    support = topkast.select(
        library.asarray(theta), fwd=fwd, bwd=bwd, block=block, block_score=score, name="w"
    )
    masks = masks_of(support, theta)
    assert_masks(theta, masks, fwd=fwd, bwd=bwd, block=block, block_score=score, name="w")
    for units in (support.active, support.exploring):
        assert (np.diff(to_numpy(units)) > 0).all()
    for mask, sparsity in zip(masks, pair, strict=True):
        expected = top_k(theta, sparsity, block=block, block_score=score, name="w")
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("block", "score"), [((2, 3), "sum"), ((5, 1), "max"), ((1, 6), "sum"), ((10, 18), "max")]
)
def test_sets_are_the_same_in_every_library(
    any_library: Library, rng: np.random.Generator, score: Any, block: Block
) -> None:
    theta = rng.standard_normal((30, 36)).astype(np.float32)
    theta[:10] = np.round(theta[:10])  # ties
    for explore in ("magnitude", "random"):
        options: Any = {"fwd": 0.9, "bwd": 0.6, "explore": explore, "seed": 3}
        options |= {"block": block, "block_score": score}
        choose = any_library.compile(
            lambda array, options=options: topkast.select(array, **options)
        )
        support = choose(any_library.asarray(theta))
        assert_same_support(support, topkast.select(theta, **options))


def test_scores_against_loops(rng: np.random.Generator) -> None:
    theta = rng.integers(-9, 9, (6, 20)).astype(np.float32)
    for score, reduce in (("sum", np.sum), ("max", np.max)):
        expected = [
            [reduce(np.abs(theta[i : i + 3, j : j + 4])) for j in range(0, 20, 4)]
            for i in range(0, 6, 3)
        ]
        np.testing.assert_array_equal(unit_scores(theta, (3, 4), score), expected)
        best = top_k(theta, 0.9, block=(3, 4), block_score=score)
        support = topkast.select(theta, fwd=0.9, bwd=0.9, block=(3, 4), block_score=score)  # type: ignore[arg-type]
        np.testing.assert_array_equal(masks_of(support, theta).forward, best)
        assert np.ravel(expected)[support.active] == np.max(expected)


def test_sum_and_maximum_differ() -> None:
    theta = np.asarray([[3.0, 0, 2, 2], [0, 0, 2, 2]])
    by_sum, by_max = (
        topkast.select(theta, fwd=0.5, bwd=0.5, block=(2, 2), block_score=score) for score in SCORES
    )
    assert by_sum.active.tolist() == [1]
    assert by_max.active.tolist() == [0]


def test_sums_that_overflow_still_rank(any_library: Library) -> None:
    theta = np.full((4, 4), 2e38, np.float32)
    theta[:2, 2:] = 2.5e38
    choose = any_library.compile(
        lambda array: topkast.select(array, fwd=0.7, bwd=0.7, block=(2, 2))
    )
    assert 1 in to_numpy(choose(any_library.asarray(theta)).active)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_tensors_have_empty_sets(library: Library, shape: tuple[int, int]) -> None:
    theta = library.asarray(np.zeros(shape, np.float32))
    for score in SCORES:
        support = topkast.select(theta, fwd=0.5, bwd=0.5, block=(2, 2), block_score=score)
        assert (support.forward, support.backward_size) == (0, 0)
        assert topkast.gather(theta, support).shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_errors_count_weights(any_library: Library, bad: float) -> None:
    theta = np.ones((4, 6), np.float32)
    theta[:2, :2] = bad
    choose = any_library.compile(
        lambda array: topkast.select(array, fwd=0.7, bwd=0.5, block=(2, 2))
    )
    if any_library.traces:
        support = choose(any_library.asarray(theta))
        assert (0 in to_numpy(support.indices)) == np.isinf(bad)  # NaN ranks last
        return
    with pytest.raises(topkast.NonFiniteError, match="4 of 24 entries are NaN or infinite"):
        choose(any_library.asarray(theta))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sums_in_float32(dtype: str) -> None:
    # 2048 + 1 is 2048 in float16, and 256 + 1 is 256 in bfloat16: the blocks would tie.
    large = {"float16": 2048, "bfloat16": 256}[dtype]
    theta = np.asarray([[large, 1, large, 0, large, 0]], np.float32)
    half = torch.asarray(theta).to(getattr(torch, dtype))
    arrays: list[Any] = [half, jnp.asarray(theta, dtype=dtype)]
    for array in arrays:
        support = topkast.select(array, fwd=0.6, bwd=0.6, block=(1, 2))
        assert support.active.tolist() == [0, *[i for i in support.active.tolist() if i]]
        assert support.forward == 2
    choose = jax.jit(lambda array: topkast.select(array, fwd=0.6, bwd=0.6, block=(1, 2)))
    assert 0 in choose(arrays[1]).active.tolist()


def test_complex_weights(any_library: Library) -> None:
    theta = np.asarray([[3 + 4j, 0, 3, 3j]], np.complex64)
    for score, best in (("sum", 1), ("max", 0)):
        choose = any_library.compile(
            lambda array, score=score: topkast.select(
                array, fwd=0.5, bwd=0.5, block=(1, 2), block_score=score
            )
        )
        assert to_numpy(choose(any_library.asarray(theta)).active).tolist() == [best]


def test_moduli_are_scaled_only_if_a_finite_one_overflows(any_library: Library) -> None:
    run = any_library.compile(modulus)
    for theta, expected in (
        ([3 + 4j, 0, -1j], [5, 0, 1]),
        ([3 + 4j, complex(np.inf, 1), complex(1, -np.inf)], [5, np.inf, np.inf]),
        ([3 + 4j, 3e38 + 3e38j], [1.25, 0.75e38 * np.sqrt(2)]),
    ):
        moduli = to_numpy(run(any_library.asarray(np.asarray(theta, np.complex64))))
        np.testing.assert_allclose(moduli, np.asarray(expected, np.float32), rtol=1e-6)


class Last(Method):
    """A method that chooses the last units and ignores blocks."""

    def __repr__(self) -> str:
        return "Last()"

    def choose(self, view: View, /) -> Support:
        last = np.arange(len(view.weights))[-view.backward :]
        return Support(last, view.forward)


@pytest.mark.parametrize(
    "method",
    [TopKAST(), Random(), Mixed(0.5), Static(), Last()],
    ids=lambda method: type(method).__name__,
)
def test_methods_choose_units(method: Method) -> None:
    theta = np.random.default_rng(0).standard_normal((12, 20)).astype(np.float32)
    options: dict[str, Any] = {"fwd": 0.8, "bwd": 0.5, "block": (3, 5), "method": method}
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), **options)
    masks = topkast.masks(tx.init({"w": theta}), {"w": theta})["w"]
    assert_counts(masks, fwd=0.8, bwd=0.5, block=(3, 5))
    if isinstance(method, Last):
        assert masks.forward.ravel()[-1] == 0
        assert masks.backward.ravel()[-1] == 1
        return
    params = {"w": nn.Parameter(torch.from_numpy(theta.copy()))}
    opt = topkast.wrap_optimizer(torch.optim.SGD(params.items(), 0.1), **options)
    state = topkast.wrap_optimizer(optax.sgd(0.1), **options).init({"w": jnp.asarray(theta)})
    for by_name in (topkast.masks(opt), topkast.masks(state, {"w": jnp.asarray(theta)})):
        for mask, expected in zip(host(by_name["w"]), masks, strict=True):
            np.testing.assert_array_equal(mask, expected)


# Trajectories ------------------------------------------------------------------------------------

TRAINED: list[dict[str, Any]] = [
    {"fwd": 0.8, "bwd": 0.5, "penalty": 1e-2, "block": (2, 2)},
    {"fwd": 0.7, "bwd": 0.4, "penalty": 1e-2, "block": (1, 2), "block_score": "max"},
]


@pytest.mark.parametrize("options", TRAINED, ids=["sum", "max"])
class TestTrajectories:
    @pytest.mark.parametrize("library", LIBRARIES[:4], ids=str)
    def test_library_follows_the_reference(self, library: Library, options: Any) -> None:
        expected = by_reference("adamw-decay", options, np.float64)
        assert changes(expected) > 0
        actual = by_transform(library, RULES["adamw-decay"].arrays(), options, np.float64)
        assert_same(expected, actual)

    def test_fused_step_follows_the_reference(self, options: Any) -> None:
        expected = by_reference("sgd-momentum", options, np.float64)
        inner = RULES["sgd-momentum"].arrays()
        assert_same(expected, by_transform(NUMPY, inner, options, np.float64, fused=True))

    @pytest.mark.parametrize("rule", ["sgd-momentum", "adamw-decay"])
    def test_torch_follows_the_reference(self, rule: str, options: Any) -> None:
        expected = by_reference(rule, options, np.float64)
        assert_same(expected, by_torch(rule, options, np.float64))

    @pytest.mark.slow
    @pytest.mark.parametrize("fused", [False, True], ids=["update", "step"])
    def test_optax_follows_the_reference(self, x64: None, fused: bool, options: Any) -> None:
        expected = by_reference("adamw-decay", options, np.float64)
        inner = RULES["adamw-decay"].optax()
        assert_same(expected, by_transform(JITTED, inner, options, np.float64, fused=fused))


def test_fused_optax_follows_the_reference(x64: None) -> None:
    expected = by_reference("adamw-decay", TRAINED[0], np.float64)
    actual = by_transform(JITTED, RULES["adamw-decay"].optax(), TRAINED[0], np.float64, fused=True)
    assert_same(expected, actual)


def test_other_options_agree_between_libraries() -> None:
    options = TRAINED[0] | {"explore": "random", "explore_until": 40, "distribution": "erk"}
    options["penalty_kind"] = "l1"
    expected = by_torch("adamw-decay", options, np.float64)
    for library in (NUMPY, TORCH):
        actual = by_transform(library, RULES["adamw-decay"].arrays(), options, np.float64)
        assert_same(expected, actual)


def _by_arrays(options: dict[str, Any]) -> Any:
    return by_transform(NUMPY, RULES["adamw-decay"].arrays(), options, np.float32)


def _by_optax(options: dict[str, Any]) -> Any:
    return by_transform(JITTED, RULES["adamw-decay"].optax(), options, np.float32, fused=True)


def _by_torch(options: dict[str, Any]) -> Any:
    return by_torch("adamw-decay", options, np.float32)


@pytest.mark.parametrize(
    "run", [_by_arrays, _by_torch, pytest.param(_by_optax, marks=pytest.mark.slow)]
)
def test_blocks_of_one_weight_are_weights(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[dict[str, Any]], Any]
) -> None:
    """The option block=(1, 1) equals no blocks, and so do actual blocks of one weight."""
    options: dict[str, Any] = {"fwd": 0.9, "bwd": 0.8, "penalty": 1e-2}
    expected, by_option = run(options), run(options | {"block": (1, 1)})
    monkeypatch.setattr(
        "topkast._tensors.blocks_of", lambda name, shape, block, stacked: Blocks(1, 1, *shape)
    )
    by_blocks = run(options)
    assert_same(expected, by_blocks)  # XLA compiles a different program, which rounds differently
    for actual in (by_option, by_blocks) if run is not _by_optax else (by_option,):
        for (_, theta), (_, other) in zip(expected, actual, strict=True):
            for name in theta:
                assert theta[name].tobytes() == other[name].tobytes()


# The functional state ----------------------------------------------------------------------------


def test_migration_keeps_bits(any_library: Library, rng: np.random.Generator) -> None:
    theta, other = rng.standard_normal((2, 12, 20)).astype(np.float32)

    def choose(array: Any) -> Support:
        return topkast.select(array, fwd=0.8, bwd=0.5, block=(3, 4))

    def migrate(first: Any, second: Any) -> Any:
        before = topkast.gather(first, choose(first))
        old, new = choose(first), choose(second)
        return before, topkast.migrate(before, old, new), topkast.gather(second, new)

    arrays = any_library.asarray(theta), any_library.asarray(other)
    before, after, _ = any_library.compile(migrate)(*arrays)
    assert_survivors_unchanged(before, after, choose(theta), choose(other))


def test_migration_between_different_units_is_refused() -> None:
    theta = np.arange(24.0).reshape(4, 6)
    old, new = (topkast.select(theta, fwd=0.5, bwd=0.5, block=block) for block in ((2, 3), (2, 1)))
    with pytest.raises(topkast.MismatchError, match="units changed"):
        topkast.migrate(topkast.gather(theta, old), old, new)


def test_blocks_belong_to_the_structure_of_a_state() -> None:
    params = {"w": jnp.arange(24.0).reshape(4, 6)}
    tx = topkast.wrap_optimizer(optax.adam(0.1), fwd=0.7, bwd=0.5, block=(2, 3), refresh_every=2)
    state = tx.init(params)
    leaves = jax.tree.leaves(state)
    structure: Any = jax.tree.structure(state)
    assert jax.tree.unflatten(structure, leaves).supports["w"].blocks == Blocks(2, 3, 4, 6)
    other = topkast.wrap_optimizer(optax.adam(0.1), fwd=0.7, bwd=0.5, block=(2, 2))
    assert structure != jax.tree.structure(other.init(params))
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_same_support(copied.supports["w"], state.supports["w"])
    support = topkast.select(np.ones((4, 6)), fwd=0.7, bwd=0.5, block=(2, 3))
    entries = support.entries
    assert support.entries is entries  # computed once
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(support)).entries, entries)


def test_under_scan() -> None:
    tx = topkast.wrap_optimizer(optax.adam(0.05), fwd=0.7, bwd=0.5, block=(2, 3), refresh_every=2)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 12))}

    def body(carry: Any, _: None) -> Any:
        params, state = carry
        grads = jax.tree.map(lambda a: a - 0.1, topkast.forward_params(params, state))
        return tx.step(grads, state, params), None

    @jax.jit
    def train(params: Any, state: Any) -> Any:
        return jax.lax.scan(body, (params, state), None, length=4)[0]

    moved, state = train(params, tx.init(params))
    masks = topkast.masks(state, moved)["w"]
    assert_masks(moved["w"], masks, fwd=0.7, bwd=0.5, block=(2, 3), name="w")
    assert int(state.entered_active["w"][0]) % 6 == 0


@pytest.mark.slow
def test_under_vmap() -> None:
    tx = topkast.wrap_optimizer(optax.adam(0.05), fwd=0.7, bwd=0.5, block=(2, 3), refresh_every=2)
    params = {"w": jax.random.normal(jax.random.key(0), (2, 8, 12))}

    def train(params: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state = carry
            grads = jax.tree.map(lambda a: a - 0.1, topkast.forward_params(params, state))
            return tx.step(grads, state, params), None

        return jax.lax.scan(body, (params, tx.init(params)), None, length=5)[0]

    batched, _ = jax.jit(jax.vmap(train))(params)
    for number in range(2):
        alone, state = jax.jit(train)(jax.tree.map(lambda leaf, n=number: leaf[n], params))
        np.testing.assert_allclose(batched["w"][number], alone["w"], rtol=1e-6)
        assert_counts(topkast.masks(state, alone)["w"], fwd=0.7, bwd=0.5, block=(2, 3))


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_sharded_over_devices() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    tx = topkast.wrap_optimizer(optax.adam(0.05), fwd=0.75, bwd=0.5, block=(2, 3), refresh_every=2)
    step = jax.jit(tx.step)
    results = []
    placements: list[Any] = [lambda leaf: leaf, lambda leaf: jax.device_put(leaf, rows)]
    for place in placements:
        params = {"w": place(jax.random.normal(jax.random.key(0), (32, 12)))}
        state = tx.init(params)
        for _ in range(3):
            params, state = step({"w": params["w"] - 0.1}, state, params)
        results.append((params, state))
    (alone, _), (sharded, state) = results
    np.testing.assert_allclose(alone["w"], sharded["w"], rtol=1e-6)
    assert len({str(shard.index) for shard in state.ages["w"].addressable_shards}) == 8


def test_a_state_of_different_units_is_refused() -> None:
    params = {"w": np.arange(24.0).reshape(4, 6)}
    first, second = (
        topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5, block=block)
        for block in ((2, 3), (1, 6))
    )
    with pytest.raises(topkast.MismatchError, match="wrap with the `block`"):
        second.step(params, first.init(params), params)
