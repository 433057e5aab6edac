"""Ranking, scope and options by name are the same in every framework."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library, host
from torch import nn

import topkast
from topkast import Masks
from topkast.reference import tie_words, top_k
from topkast.selection._random import make_key, random_draws, random_words
from topkast.testing import assert_same_support

SHAPE = (40, 50)


def masks_of(support: Any, shape: tuple[int, ...]) -> Masks:
    flags = np.zeros((2, int(np.prod(shape))), bool)
    flags[0, host(support.active)] = flags[1, host(support.indices)] = True
    return Masks(*(mask.reshape(shape) for mask in flags))


class TestTies:
    @pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0])
    def test_sets_of_a_constant_tensor_cover_its_rows_evenly(
        self, any_library: Library, value: float
    ) -> None:
        theta = np.full(SHAPE, value, np.float32)
        choose = any_library.compile(
            lambda array: topkast.select(array, fwd=0.9, bwd=0.8, name="head")
        )
        support = choose(any_library.asarray(theta))
        expected = topkast.select(theta, fwd=0.9, bwd=0.8, name="head")
        assert_same_support(support, expected)
        for mask, count in zip(masks_of(support, SHAPE), (200, 400), strict=True):
            assert mask.sum() == count
            for axis in (0, 1):
                counts = mask.sum(axis)
                mean = count / len(counts)
                assert counts.min() > 0
                assert abs(counts - mean).max() < 5 * np.sqrt(mean)

    @pytest.mark.parametrize("ties", [2, 300, 1024, 1025, 5000])
    def test_few_and_many_ties_rank_alike(self, any_library: Library, ties: int) -> None:
        rng = np.random.default_rng(0)
        theta = rng.permutation(np.linspace(1, 2, 8000, dtype=np.float32))
        theta[rng.choice(8000, ties, replace=False)] = np.float32(1.75)
        for fwd, bwd in [(0.75, 0.6), (0.8, 0.75), (0.9, 0.7)]:
            choose = any_library.compile(
                lambda array, fwd=fwd, bwd=bwd: topkast.select(array, fwd=fwd, bwd=bwd, name="long")
            )
            masks = masks_of(choose(any_library.asarray(theta)), (8000,))
            for mask, sparsity in zip(masks, (fwd, bwd), strict=True):
                np.testing.assert_array_equal(mask, top_k(theta, sparsity, name="long"))

    def test_a_threshold_among_ties_keeps_an_even_sample(self, library: Library) -> None:
        theta = np.repeat(np.asarray([2.0, 1.0, 0.5], np.float32), [100, 1800, 100])
        support = topkast.select(library.asarray(theta), fwd=0.8, bwd=0.5)
        forward, backward = masks_of(support, (2000,))
        assert forward[:100].all()
        assert not backward[1900:].any()
        halves = [mask[100:1900].reshape(2, -1).sum(1) for mask in (forward, backward)]
        for half in halves:
            assert abs(half[0] - half[1]) < 5 * np.sqrt(half.sum())

    def test_names_and_seeds_break_ties_differently(self) -> None:
        theta = np.ones(SHAPE, np.float32)
        masks = [
            masks_of(topkast.select(theta, fwd=0.9, bwd=0.8, seed=seed, name=name), SHAPE).backward
            for seed, name in ((0, "a"), (1, "a"), (0, "b"))
        ]
        for first in range(3):
            for second in range(first):
                overlap = (masks[first] & masks[second]).sum() / 400
                assert 0.1 < overlap < 0.3  # a fifth by chance

    def test_hash_equals_the_reference(self, library: Library) -> None:
        indices = library.asarray(np.arange(1000))
        words = host(random_words(indices, make_key(2**70 + 5, "layer.0", "ties"))).view(np.uint32)
        assert len(np.unique(words)) == 1000
        np.testing.assert_array_equal(words, tie_words(1000, 2**70 + 5, "layer.0"))

    def test_words_are_those_of_exact_integers(self, library: Library) -> None:
        """Also of keys at the ends of 32 bits, of repeated draws, and above 2³² entries."""
        keys = (0, 1 << 31, (1 << 32) - 1, (1 << 31) - 1), (1 << 31, 7, 0, 1)
        indices = [0, 1, (1 << 31) - 1]
        wide = [] if "jax" in library.name else [1 << 31, (1 << 32) - 1, (3 << 32) + 5, 1 << 40]
        for numbers, dtype in ((indices, np.int32), (wide, np.int64)):
            array = library.asarray(np.asarray(numbers, dtype))
            for key, draw in itertools.product(keys, (0, 1, 1 << 31, (1 << 32) - 1)):
                words = host(random_words(array, key, draw)).view(np.uint32).tolist()
                assert words == [exact_word(index, key, draw) for index in numbers]
            for key in keys:  # the first draw is number 0
                first = [exact_word(index, key, 0) for index in numbers]
                assert host(random_words(array, key)).view(np.uint32).tolist() == first
                draws = host(random_draws(array, key)).tolist()
                assert draws == [word >> 2 for word in first]

    def test_all_rows_of_a_zero_head_are_trained(self) -> None:
        """LoRA's B, adaLN-zero: if only the first rows were trained, the others never could be."""
        head = nn.Linear(32, 20, bias=False)
        nn.init.zeros_(head.weight)
        opt = topkast.wrap_optimizer(
            torch.optim.AdamW(head.named_parameters(), 0.01), fwd=0.9, bwd=0.8, refresh_every=10
        )
        touched = topkast.masks(opt)["weight"].backward.clone()
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            head.weight.grad = torch.randn(20, 32, generator=generator)
            opt.step()
            touched |= topkast.masks(opt)["weight"].backward
        assert int(touched.any(1).sum()) == 20


def exact_word(index: int, key: tuple[int, ...], draw: int) -> int:
    """The random word of an index, in integers that have no size."""

    def mix(word: int) -> int:
        word ^= word >> 16
        word = word * 0x7FEB352D % (1 << 32)
        word ^= word >> 15
        word = word * 0x846CA68B % (1 << 32)
        return word ^ word >> 16

    word = mix(index % (1 << 32) ^ key[0]) ^ index >> 32
    for part in key[1:]:
        word = mix(word ^ part)
    return mix(word ^ draw)


class TestSeeds:
    def row_counts(self, seed: int, explore: Any) -> np.ndarray[Any, Any]:
        theta = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        theta = theta if explore == "random" else np.ones_like(theta)
        support = topkast.select(theta, fwd=0.9, bwd=0.5, seed=seed, explore=explore)
        forward, backward = masks_of(support, (64, 64))
        # A, of 409 weights, does not depend on the seed; B∖A is drawn from the others.
        expected = (~forward).sum(1) * (2048 - 409) / (4096 - 409)
        return np.asarray((backward & ~forward).sum(1) - expected, dtype=float)

    @pytest.mark.parametrize("explore", ["random", "magnitude"])
    def test_seeds_draw_independent_samples(self, explore: Any) -> None:
        counts = np.stack([self.row_counts(seed, explore) for seed in range(64)])
        correlations = np.corrcoef(counts)[np.triu_indices(64, 1)]
        # Over 2,016 pairs of 64 independent rows; 0.95 if seeds only rearranged the draws.
        assert np.abs(correlations).max() < 0.55
        assert abs(correlations.mean()) < 0.02

    @given(seed=st.integers(0, 2**80), other=st.integers(0, 2**80), index=st.integers(0, 2**20))
    def test_no_seed_rearranges_another(self, seed: int, other: int, index: int) -> None:
        keys = make_key(seed, "", "draws"), make_key(other, "", "draws")
        words = [random_draws(np.arange(index, index + 64), key) for key in keys]
        if seed != other:
            assert len(np.intersect1d(*words)) < 8
        assert all(((word >= 0) & (word < 1 << 30)).all() for word in words)


class TestScope:
    """Tensors with fewer than two dimensions above one stay dense."""

    SHAPES: ClassVar = {
        "weight": (6, 8),
        "bias": (6,),
        "scale": (6, 1, 1),
        "token": (1, 1, 8),
        "length": (6, 1),
        "single": (1, 1),
        "kernel": (6, 3, 3, 3),
        "pointwise": (6, 8, 1, 1),
    }

    def test_in_torch(self) -> None:
        params = {name: nn.Parameter(torch.randn(shape)) for name, shape in self.SHAPES.items()}
        opt = topkast.wrap_optimizer(torch.optim.SGD(params.items(), 0.1), fwd=0.9, bwd=0.8)
        assert set(topkast.masks(opt)) == {"weight", "kernel", "pointwise"}

    def test_in_functional_form(self, library: Library) -> None:
        params = {
            name: library.asarray(np.ones(shape, np.float32)) for name, shape in self.SHAPES.items()
        }
        state = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8).init(params)
        assert set(state.supports) == {"weight", "kernel", "pointwise"}

    def test_nothing_left_is_an_error(self) -> None:
        norm = nn.LayerNorm(5)
        with pytest.raises(topkast.OptionError, match="nothing is left to sparsify of 2 tensors"):
            topkast.wrap_optimizer(torch.optim.SGD(norm.parameters(), 0.1), fwd=0.9, bwd=0.8)
        assert norm.weight.tolist() == [1.0] * 5
        for rule, asarray in ((topkast.SGD(0.1), np.asarray), (optax.sgd(0.1), jnp.asarray)):
            tx: Any = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8)
            with pytest.raises(topkast.OptionError, match="nothing is left to sparsify"):
                tx.init({"scale": asarray([1.0, 2.0])})
        topkast.wrap_optimizer(
            torch.optim.SGD(norm.parameters(), 0.1), fwd=0.9, bwd=0.8, dense=True
        )


STACKED = {"layers.w": (4, 12, 10), "layers.scale": (4, 12), "head": (12, 5)}


class TestStacked:
    """The first axis numbers layers, which are ranked separately."""

    def check(self, masks: Any, theta: dict[str, np.ndarray[Any, Any]]) -> None:
        assert set(masks) == {"layers.w", "head"}
        for layer in range(4):
            for mask, sparsity in zip(masks["layers.w"], (0.9, 0.8), strict=True):
                kept, weights = host(mask)[layer], np.abs(theta["layers.w"][layer])
                assert kept.sum() == top_k(weights, sparsity).sum()
                assert weights[kept].min() >= weights[~kept].max()

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        rng = np.random.default_rng(0)
        theta = {
            name: rng.standard_normal(shape).astype(np.float32) for name, shape in STACKED.items()
        }
        theta["layers.w"] *= np.asarray([1, 10, 100, 0.1], np.float32)[:, None, None]
        return theta

    def test_in_functional_form(self, any_library: Library) -> None:
        tx = topkast.wrap_optimizer(
            topkast.AdamW(0.1), fwd=0.9, bwd=0.8, stacked="layers.*", refresh_every=2
        )
        params = {name: any_library.asarray(theta) for name, theta in self.weights().items()}
        state = any_library.compile(tx.init)(params)
        self.check(topkast.masks(state, params), host(params))
        step = any_library.compile(tx.step)
        for _ in range(4):
            grads = {name: param * 0.5 for name, param in params.items()}
            params, state = step(grads, state, params)
        self.check(topkast.masks(state, params), host(params))

    def test_in_torch(self) -> None:
        params = {name: nn.Parameter(torch.from_numpy(w)) for name, w in self.weights().items()}
        opt = topkast.wrap_optimizer(
            torch.optim.Adam(params.items(), 0.1),
            fwd=0.9,
            bwd=0.8,
            stacked=["layers.*"],
            refresh_every=2,
        )
        self.check(topkast.masks(opt), host(topkast.dense_params(opt)))
        for _ in range(4):
            for param in params.values():
                param.grad = torch.ones_like(param)
            opt.step()
        self.check(topkast.masks(opt), host(topkast.dense_params(opt)))

    def test_equal_layers_are_ranked_separately(self) -> None:
        """Each layer keeps its share, and ties are broken differently in each."""
        ones = {"w": np.ones((8, 30, 20), np.float32)}
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, stacked="w")
        masks = topkast.masks(tx.init(ones), ones)["w"]
        assert masks.forward.sum((1, 2)).tolist() == [60] * 8
        assert not np.array_equal(masks.forward[0], masks.forward[1])

    def test_under_scan(self) -> None:
        tx = topkast.wrap_optimizer(optax.adam(0.01), fwd=0.9, bwd=0.8, stacked="w")
        params = {"w": jax.random.normal(jax.random.key(0), (4, 16, 16))}
        state = tx.init(params)

        def loss(alpha: Any) -> jax.Array:
            def layer(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
                return jnp.tanh(hidden @ weight), None

            return jnp.mean(jax.lax.scan(layer, jnp.ones((3, 16)), alpha["w"])[0] ** 2)

        @jax.jit
        def train(params: Any, state: Any) -> Any:
            grads = jax.grad(loss)(topkast.forward_params(params, state))
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(3):
            params, state = train(params, state)
        assert (topkast.forward_params(params, state)["w"] != 0).sum((1, 2)).tolist() == [26] * 4

    def test_not_under_a_global_ranking(self) -> None:
        tx = topkast.wrap_optimizer(
            topkast.SGD(0.1), fwd=0.9, bwd=0.8, stacked="w", distribution="global"
        )
        with pytest.raises(topkast.OptionError, match="layer by layer"):
            tx.init({"w": np.ones((2, 3, 4))})


OVERRIDES: dict[str, Any] = {
    "body.*": {"fwd": 0.5, "bwd": 0.25},
    "body.1": {"fwd": 0.6, "refresh_every": 1, "penalty": 0.0},
    "head": {"explore": "random"},
}


class TestOverrides:
    """Options of single tensors; if several globs match, the last one wins."""

    COUNTS: ClassVar = {"body.0": (100, 150), "body.1": (80, 150), "head": (20, 40)}

    def test_in_functional_form(self, any_library: Library) -> None:
        rng = np.random.default_rng(0)
        params = {
            name: any_library.asarray(rng.standard_normal((10, 20)).astype(np.float32))
            for name in self.COUNTS
        }
        tx = topkast.wrap_optimizer(
            topkast.SGD(0.1), fwd=0.9, bwd=0.8, refresh_every=100, overrides=OVERRIDES
        )
        state = any_library.compile(tx.init)(params)
        self.check(topkast.summary(state, params))
        step = any_library.compile(tx.step)
        for _ in range(2):
            grads = {
                name: any_library.asarray(rng.standard_normal((10, 20)).astype(np.float32))
                for name in params
            }
            before = state
            params, state = step(grads, state, params)
        for name in params:
            is_same = np.array_equal(
                host(before.supports[name].indices), host(state.supports[name].indices)
            )
            assert is_same == (name != "body.1")

    def test_in_torch(self) -> None:
        torch.manual_seed(0)
        params = {name: nn.Parameter(torch.randn(10, 20)) for name in self.COUNTS}
        opt = topkast.wrap_optimizer(
            torch.optim.SGD(params.items(), 1.0),
            fwd=0.9,
            bwd=0.8,
            refresh_every=100,
            overrides=OVERRIDES,
        )
        self.check(topkast.summary(opt))
        before = topkast.masks(opt)
        for param in params.values():
            param.grad = torch.randn(10, 20)
        opt.step()
        for name, masks in topkast.masks(opt).items():
            assert torch.equal(masks.backward, before[name].backward) == (name != "body.1")

    def test_in_optax(self) -> None:
        params = {"body": [jnp.ones((10, 20))] * 2, "head": jnp.ones((10, 20))}
        tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.9, bwd=0.8, overrides=OVERRIDES)
        self.check(topkast.summary(tx.init(params), params))

    def check(self, summary: Any) -> None:
        rows = {row.name: (row.forward, row.backward) for row in summary.tensors}
        assert rows == self.COUNTS

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"head": {"fwd": 0.1}}, r"overrides\['head'\]: bwd must not exceed fwd"),
            ({"head": {"density": 0.1}}, r"overrides\['head'\] sets density, .* expected fwd, bwd"),
            ({"head": {"distribution": "erk"}}, "sets distribution"),
            ({"head": {"penalty": -1}}, r"overrides\['head'\]: penalty"),
            ({"head": 0.5}, "must map names or globs to options"),
            ([("head", {})], "must map names or globs to options"),
        ],
    )
    def test_bad_overrides(self, overrides: Any, message: str) -> None:
        with pytest.raises(topkast.OptionError, match=message):
            topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, overrides=overrides)

    @pytest.mark.parametrize("option", ["dense", "stacked", "overrides"])
    def test_a_misspelt_name_gets_a_suggestion(self, option: str) -> None:
        params = {f"head.{n}.weight": np.ones((3, 3)) for n in range(300)}
        for name, hint in (("head", "did you mean 'head.*'"), ("head.0.wieght", "'head.0.weight'")):
            value: Any = {name: {"penalty": 0.0}} if option == "overrides" else name
            tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5, **{option: value})
            with pytest.raises(topkast.OptionError, match=hint) as caught:
                tx.init(params)
            assert len(str(caught.value)) < 400


class TestNumpyScalars:
    def test_they_become_python_numbers(self) -> None:
        layer = nn.Linear(20, 30)
        options: dict[str, Any] = {
            "fwd": np.float64(0.8),
            "bwd": np.float32(0.8),  # the same decimal
            "refresh_every": np.int64(5),
            "penalty": np.float64(1e-4),
            "explore_until": np.int32(7),
            "seed": np.int64(0),
        }
        opt = topkast.wrap_optimizer(torch.optim.SGD(layer.named_parameters(), 0.1), **options)
        for name, value in opt.param_groups[0].items():
            assert not isinstance(value, np.generic), name
        opt.param_groups[0]["penalty"] = np.float64(0.5)
        layer(torch.ones(1, 20)).sum().backward()
        opt.step()
        assert type(opt.param_groups[0]["penalty"]) is float

    def test_they_promote_nothing(self) -> None:
        params = {"w": np.ones((4, 4), np.float32)}
        rule = topkast.Adam(np.float64(0.1), betas=(np.float64(0.9), np.float64(0.99)))
        tx = topkast.wrap_optimizer(rule, fwd=0.5, bwd=0.5, penalty=np.float64(0.1))
        params, state = tx.step(params, tx.init(params), params)
        assert {params["w"].dtype, state.inner.mean["w"].dtype} == {np.dtype(np.float32)}
        half = {"w": jnp.ones((4, 4), jnp.bfloat16)}
        wrapped = topkast.wrap_optimizer(optax.adam(0.1), fwd=0.5, bwd=0.5, penalty=np.float64(0.1))
        updates, _ = wrapped.update(half, wrapped.init(half), half)
        assert updates["w"].dtype == jnp.bfloat16


class TestComplex:
    def test_adam_equals_torchs(self) -> None:
        rng = np.random.default_rng(0)
        theta = rng.standard_normal((4, 5)) + 1j * rng.standard_normal((4, 5))
        param = nn.Parameter(torch.from_numpy(theta.copy()))
        opt = torch.optim.Adam([param], 0.1)
        rule, params = topkast.Adam(0.1), {"w": theta}
        state = rule.init(params)
        for _ in range(4):
            grad = rng.standard_normal((4, 5)) + 1j * rng.standard_normal((4, 5))
            param.grad = torch.from_numpy(grad)
            opt.step()
            displacements, state = rule.update({"w": grad}, state, params)
            params = topkast.apply_updates(params, displacements)
        np.testing.assert_allclose(params["w"], param.detach().numpy(), rtol=1e-12)

    def test_a_gradient_of_one_i_moves_along_i(self) -> None:
        rule = topkast.Adam(0.1)
        params = {"w": np.zeros(1, np.complex128)}
        displacements, _ = rule.update({"w": np.asarray([1j])}, rule.init(params), params)
        assert displacements["w"][0] == pytest.approx(-0.1j)

    def test_moduli_do_not_overflow(self, any_library: Library) -> None:
        big = np.float32(3e38)
        theta = np.asarray([big + big * 1j, big, 1.0, 0.5 * big * (1 + 1j)], np.complex64)
        run = any_library.compile(lambda array: topkast.select(array, fwd=0.75, bwd=0.5))
        support = run(any_library.asarray(theta))
        assert host(support.indices).tolist() == [0, 1]
        assert support.forward == 1


class TestRules:
    def test_custom_rule(self) -> None:
        class Sign:
            def init(self, params: Any, /) -> Any:
                return ()

            def update(self, grads: Any, state: Any, params: Any, /) -> Any:
                return {name: -0.1 * np.sign(grad) for name, grad in grads.items()}, state

        tx = topkast.wrap_optimizer(Sign(), fwd=0.5, bwd=0.5, penalty=0.0)
        params = {"w": np.asarray([[4.0, 3.0], [2.0, 1.0]])}
        params, _ = tx.step({"w": np.ones((2, 2))}, tx.init(params), params)
        assert params["w"].tolist() == [[3.9, 2.9], [2.0, 1.0]]

    def test_rule_that_uses_rows_is_refused(self) -> None:
        class ByRow:
            def init(self, params: Any, /) -> Any:
                return ()

            def update(self, grads: Any, state: Any, params: Any, /) -> Any:
                return {name: -(g - g.mean(0)) for name, g in grads.items()}, state

        tx = topkast.wrap_optimizer(ByRow(), fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="ByRow does not treat"):
            tx.init({"w": np.ones((3, 3))})

    def test_objects_that_are_no_rules_are_refused(self) -> None:
        support = topkast.select(np.ones(4), fwd=0.5, bwd=0.5)
        wrapped = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.AdapterNotFoundError, match=r"init\(params\) and update"):
            topkast.wrap_optimizer(support, fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="wrapped already"):
            topkast.wrap_optimizer(wrapped, fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.AdapterNotFoundError, match=r"the function adamw: call it"):
            topkast.wrap_optimizer(optax.adamw, fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.OptionError, match="dense was given a Linear"):
            topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5, dense=nn.Linear(2, 2))


@pytest.mark.parametrize("pattern", ["b", "a*", "[bc]"])
def test_overrides_of_one_of_several_tensors_ranked_together_are_refused(pattern: str) -> None:
    params = {name: np.ones((4, 5)) for name in ("a", "b", "c")}
    options: Any = {"fwd": 0.9, "bwd": 0.8, "distribution": "global"}
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), overrides={pattern: {"penalty": 0.5}}, **options)
    with pytest.raises(topkast.OptionError, match="ranks and trains all tensors as one"):
        tx.init(params)
    topkast.wrap_optimizer(topkast.SGD(0.1), overrides={"*": {"penalty": 0.5}}, **options).init(
        params
    )
