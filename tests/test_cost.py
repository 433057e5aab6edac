"""Costs of methods, compared with numbers computed by hand and with published ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import topkast
from topkast import methods
from topkast.analysis import Layer
from topkast.analysis.costs._formulas import FORMULAS

ONE = {"w": (10, 100)}  # at 0.9/0.8: |A| = 100, |B| = 200; f_A = 200, f_B = 400, f_D = 2,000 FLOPs
PRUNING: Any = {"steps": 100, "window": (20, 60), "refresh_every": 20}
# GMP to 0.8: 40 steps at density 1, 20 at 1 - 0.8 · (1 - 1/8) = 0.3, 40 at 0.2. Mean 0.54.
# GraNet from 0.5 to 0.8: 40 at 0.5, 20 at 1 - (0.8 - 0.3 / 8) = 0.2375 (of 1,000: 238), 40 at 0.2.
GRANET = 2 * (0.4 * 500 + 0.2 * 238 + 0.4 * 200)


def cost_of_one(method: str, **options: Any) -> topkast.Cost:
    sparsity: Any = {} if method == "dense" else {"fwd": 0.9}
    return topkast.cost(ONE, method=method, **sparsity | options)


@pytest.mark.parametrize(
    ("method", "options", "flops"),
    [
        ("dense", {}, 3 * 2000),
        ("topkast", {"bwd": 0.8}, 2 * 200 + 400),
        ("topkast", {"bwd": 0}, 2 * 200 + 2000),
        ("static", {"bwd": 0.8}, 2 * 200 + 400),
        *(
            (name, {}, 3 * 200)
            for name in ("static", "set", "deepr", "dsr", "snip", "mest", "smet")
        ),
        ("rigl", {}, (600 * 100 + 400 + 2000) / 101),
        ("srigl", {"refresh_every": 10}, (600 * 10 + 400 + 2000) / 11),
        ("granet", {"fwd": 0.8} | PRUNING, (3 * GRANET * 20 + 2 * GRANET + 2000) / 21),
        ("gse", {}, 600 + 200 / 1000),
        ("gse", {"sample_ratio": 2.5, "refresh_every": 100}, 600 + 2.5 * 200 / 100),
        *((name, {}, 2 * 200 + 2000) for name in ("snfs", "dnw", "iht")),
        ("acdc", {}, 3 * (2000 + 200) / 2),
        ("acdc", {"dense_share": 0.25}, 3 * (2000 + 3 * 200) / 4),
        ("gmp", {"fwd": 0.8} | PRUNING, 3 * 0.54 * 2000),
        ("gmp_dense_gradient", {"fwd": 0.8} | PRUNING, 2 * 0.54 * 2000 + 2000),
    ],
)
def test_training_flops_by_hand(method: str, options: dict[str, Any], flops: float) -> None:
    result = cost_of_one(method, **options)
    assert result.training_flops == pytest.approx(flops, rel=1e-12)
    assert result.fraction == pytest.approx(flops / 6000, rel=1e-12)


def test_a_fixed_mask_has_the_sets_that_it_is_wrapped_with() -> None:
    shapes = {"v": (20, 30), "w": (30, 40)}
    given: list[dict[str, Any]] = [{"bwd": 0.8}, {"bwd": 0.9}]
    given.append({"bwd": 0.9, "overrides": {"v": {"bwd": 0.5}}})
    given.append({"bwd": 0.9, "overrides": {"v": {"fwd": 0.95}}})  # B of v is larger than A
    method = methods.Static()
    for options in given:
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, method=method, **options)
        params = {name: np.ones(shape) for name, shape in shapes.items()}
        state = tx.init(params)
        rows = topkast.summary(state, params).tensors
        result = topkast.cost(shapes, fwd=0.9, method=method, **options)
        for row, layer in zip(rows, result.layers, strict=True):
            assert (row.forward, row.backward) == (layer.forward, layer.backward)
            assert layer.training_flops == 2 * (2 * row.forward + row.backward)
        overrides = options.get("overrides")
        if options["bwd"] == 0.9 and "fwd" not in (overrides or {}).get("v", {}):
            # bwd is that of A, unless an override says something else.
            assert topkast.cost(shapes, fwd=0.9, method=method, overrides=overrides) == result


def test_every_formula_has_a_text_and_a_cost() -> None:
    for method, formula in FORMULAS.items():
        scheduled = {"steps": 100_000} if formula.initial is not None else {}
        both = {"bwd": 0.8} if formula.trains == "B" else {}
        result = cost_of_one(method, **scheduled, **both)
        assert result.formula == formula.text
        assert 0.1 <= result.fraction <= 1


def test_topkast_by_hand_with_dense_first_and_last_layers() -> None:
    """Fraction (2 · 0.1 + 0.2) / 3 of the middle layer, 1 of the others."""
    shapes = {"first": (100, 10), "middle": (100, 100), "last": (10, 100), "bias": (100,)}
    alone = topkast.cost({"middle": (100, 100)}, fwd=0.9, bwd=0.8)
    assert alone.fraction == pytest.approx(0.4 / 3, rel=1e-12)
    result = topkast.cost(shapes, fwd=0.9, bwd=0.8, dense=["first", "last"])
    assert result.fraction == pytest.approx((10_000 * 0.4 / 3 + 2000) / 12_000, rel=1e-12)
    assert result.forward_flops == 2 * (1000 + 1000 + 1000)
    assert result.dense_training_flops == 6 * 12_000
    assert [layer.forward for layer in result.layers] == [1000, 1000, 1000, 100]
    assert [layer.backward for layer in result.layers] == [1000, 2000, 1000, 100]


def test_scheduled_methods_report_the_final_forward_pass() -> None:
    result = cost_of_one("gmp", fwd=0.8, **PRUNING)
    assert result.forward_fraction == pytest.approx(0.2)
    assert result.layers[0].forward == 200
    half = cost_of_one("gmp", fwd=0.8, steps=64, refresh_every=1)  # from step 20 to step 50
    early = cost_of_one("gmp", fwd=0.8, steps=64, refresh_every=1, window=(0, 30))
    assert early.fraction < half.fraction < 1


def test_positions_multiply_flops_but_no_bytes() -> None:
    shape = (64, 32, 3, 3)
    many, one = (
        topkast.cost({"conv": Layer(shape, positions=count)}, fwd=0.9, bwd=0.8) for count in (49, 1)
    )
    assert one.dense_forward_flops == 2 * 64 * 32 * 9
    assert many.training_flops == pytest.approx(49 * one.training_flops)
    assert many.bytes == one.bytes
    table = topkast.cost({"table": Layer((50, 8), positions=0)}, fwd=0.9, bwd=0.8)
    assert (table.training_flops, table.fraction) == (0, 1)
    assert table.uncounted == ("table",)
    assert "no product counted: table" in str(table)


def resnet50() -> dict[str, Layer]:
    """Convolutions and the last layer of ResNet-50 for images of 224 × 224."""
    layers = {"conv1": Layer((64, 3, 7, 7), positions=112**2)}
    channels = 64
    stages = ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7))
    for stage, (blocks, width, side) in enumerate(stages, 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            # The 3 × 3 convolution of a stage's first block has the stride.
            before = 2 * side if stage > 1 and block == 0 else side
            layers[f"{name}.conv1"] = Layer((width, channels, 1, 1), positions=before**2)
            layers[f"{name}.conv2"] = Layer((width, width, 3, 3), positions=side**2)
            layers[f"{name}.conv3"] = Layer((4 * width, width, 1, 1), positions=side**2)
            if block == 0:
                layers[f"{name}.shortcut"] = Layer((4 * width, channels, 1, 1), positions=side**2)
            channels = 4 * width
    return layers | {"fc": Layer((1000, 2048))}


def test_resnet50_has_its_known_size() -> None:
    layers = resnet50()
    assert len(layers) == 54
    assert sum(layer.size for layer in layers.values()) == 25_502_912  # 25.56 M with BN and bias
    dense = topkast.cost(layers, method="dense")
    assert dense.forward_flops == pytest.approx(2 * 4.089e9, rel=1e-3)
    assert dense.fraction == dense.forward_fraction == 1


@pytest.mark.parametrize(
    ("sparsity", "uniform", "erk"), [(0.8, "0.23", "0.42"), (0.9, "0.13", "0.24")]
)
def test_resnet50_costs_what_rigl_published(sparsity: float, uniform: str, erk: str) -> None:
    """README of google-research/rigl: fractions of dense training FLOPs, refresh at every 100th.

    Uniform keeps the first convolution dense. The numbers need 3 f_D of the first layer, whose
    input gradient nobody computes: without it, 0.9 would give 0.12.
    """
    layers = resnet50()
    first_dense = topkast.cost(layers, method="rigl", fwd=sparsity, dense="conv1")
    assert f"{first_dense.fraction:.2f}" == uniform
    kernels = topkast.cost(layers, method="rigl", fwd=sparsity, distribution="erk")
    assert f"{kernels.fraction:.2f}" == erk
    kept = sum(layer.forward for layer in kernels.layers)
    assert kept == pytest.approx((1 - sparsity) * 25_502_912, abs=54)


def test_resnet50_costs_what_was_published_of_snfs() -> None:
    """SNFS at 80 %, ERK: 0.61 of the dense training FLOPs, in the README of Chase."""
    result = topkast.cost(resnet50(), method="snfs", fwd=0.8, distribution="erk")
    assert f"{result.fraction:.2f}" == "0.61"


@pytest.mark.parametrize(
    "options",
    [
        {"distribution": "erk"},
        {"dense": "thin"},
        {"dense": lambda name, tensor: tensor.ndim == 3},
        {"block": (2, 5), "overrides": {"thin": {"block": None}, "stack": {"block": (1, 1)}}},
        {"stacked": "stack", "distribution": "erk"},
        {"overrides": {"t*": {"fwd": 0.5, "bwd": 0.25}}},
        {"dense": False},
    ],
)
def test_sets_are_those_of_the_wrapped_optimizer(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    shapes = {"wide": (30, 40), "thin": (3, 57), "stack": (4, 10, 15), "bias": (30,), "scale": (1,)}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.77, **options)
    summary = topkast.summary(tx.init(params), params)
    result = topkast.cost(shapes, fwd=0.9, bwd=0.77, **options)
    assert [(row.name, row.forward, row.backward) for row in result.layers] == [
        (row.name, row.forward, row.backward) for row in summary.tensors
    ]


def test_overrides_of_methods_with_one_set() -> None:
    shapes = {"a": (10, 100), "b": (10, 100)}
    result = topkast.cost(shapes, method="rigl", fwd=0.9, overrides={"b": {"fwd": 0.5}})
    assert [(row.forward, row.backward) for row in result.layers] == [(100, 100), (500, 500)]
    pruned = topkast.cost(
        shapes, method="gmp", fwd=0.8, overrides={"b": {"fwd": 0.4}}, execution="masked", **PRUNING
    )
    # At density 1 for 40 steps, at 1 - 0.4 · 7/8 = 0.65 for 20 and at 0.6 for 40.
    assert pruned.layers[1].training_flops == pytest.approx(6000 * (0.4 + 0.13 + 0.24))


def test_sets_that_are_known() -> None:
    layers = {"w": Layer((10, 100), sets=(70, 300)), "v": (10, 100)}
    for method, trained in {"topkast": 300, "rigl": 70, "dnw": 1000}.items():
        both: Any = {"bwd": 0.8} if method == "topkast" else {}
        row = topkast.cost(layers, method=method, fwd=0.9, **both).layers[0]
        assert (row.forward, row.backward) == (70, trained)
    assert topkast.cost(layers, method="dense").fraction == 1


N, A, B = 100_000, 10_000, 20_000  # of a matrix of 200 × 500 at 0.9/0.8


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("dense", {}, {"values": 4 * N, "gradient": 4 * N, "state": 8 * N}),
        ("dense", {"optimizer": "sgd"}, {"values": 4 * N, "gradient": 4 * N}),
        (
            "topkast",
            {"bwd": 0.8},
            {
                "values": 4 * B,
                "gradient": 4 * B,
                "state": 8 * B,
                "indices": 4 * B,
                "layouts": 7 * A,
                "ages": 2 * B,
                "reserve": 8 * B // 8,
                "reservoir": 4 * N,
            },
        ),
        (
            "topkast",
            {"bwd": 0.8, "optimizer": "momentum", "execution": "masked", "reservoir": "seeded"},
            {
                "values": 4 * B,
                "gradient": 4 * B,
                "state": 4 * B,
                "indices": 4 * B,
                "reserve": 8 * B // 8,
                "model": 8 * N,
            },
        ),
        (
            "rigl",  # forgets what it drops
            {"reservoir": "host"},
            {
                "values": 4 * A,
                "gradient": 4 * A,
                "state": 8 * A,
                "indices": 4 * A,
                "layouts": 7 * A,
                "ages": 2 * A,
            },
        ),
        (
            "iht",
            {"optimizer": "sgd", "execution": "masked"},
            {"values": 4 * N, "gradient": 4 * N, "indices": 4 * N, "model": 8 * N},
        ),
        (
            "gmp",  # starts dense
            {"optimizer": "sgd", "execution": "masked", "steps": 10_000},
            {
                "values": 4 * N,
                "gradient": 4 * N,
                "indices": 4 * N,
                "reservoir": 4 * N,
                "model": 8 * N,
            },
        ),
        (
            "granet",  # starts at one half, and holds all weights
            {"optimizer": "sgd", "steps": 100_000},
            {
                "values": 4 * N,
                "gradient": 4 * N,
                "indices": 4 * N,
                "layouts": 7 * N // 2,
            },
        ),
        (
            "snfs",  # one set, and the momentum of all weights
            {"optimizer": "sgd", "execution": "masked"},
            {
                "values": 4 * A,
                "gradient": 4 * A,
                "indices": 4 * A,
                "momentum": 4 * N,
                "model": 8 * N,
            },
        ),
        (
            "acdc",
            {"optimizer": "sgd", "execution": "masked"},
            {"values": 4 * N, "gradient": 4 * N, "indices": 4 * N, "model": 8 * N},
        ),
    ],
)
def test_bytes_by_hand(method: str, options: dict[str, Any], expected: dict[str, int]) -> None:
    sparsity: Any = {} if method == "dense" else {"fwd": 0.9}
    result = topkast.cost({"w": (200, 500)}, method=method, **sparsity, **options)
    assert {part: count for part, count in result.bytes.items() if count} == expected
    assert result.total_bytes == sum(expected.values())
    entries = {"sgd": 0, "momentum": 1, "adam": 2}[result.optimizer]
    assert result.dense_bytes == (2 + entries) * 4 * N


def test_bytes_of_other_numbers_blocks_and_large_tensors() -> None:
    half = topkast.cost({"w": Layer((200, 500), itemsize=2)}, fwd=0.9, bwd=0.8)
    assert half.bytes["values"] == 2 * B
    assert half.bytes["indices"] == 4 * B
    assert half.bytes["reserve"] == 0  # chosen among all weights
    blocks = topkast.cost({"w": (200, 500)}, fwd=0.9, bwd=0.8, block=(4, 5), execution="masked")
    assert blocks.bytes["indices"] == 4 * B // 20  # one for each block
    assert blocks.bytes["reserve"] == (4 + 4) * 1024  # scores of blocks
    large = topkast.cost({"w": (1 << 16, 1 << 15)}, fwd=0.5, bwd=0.5)
    assert large.bytes["indices"] == 8 * (1 << 30)
    some = topkast.cost(
        {"a": (200, 500), "b": (200, 500)},
        fwd=0.9,
        bwd=0.8,
        reservoir="disk",
        overrides={"b": {"reservoir": "host"}},
    )
    assert [row.bytes["reservoir"] for row in some.layers] == [0, 4 * N]


def test_costs_print_and_convert() -> None:
    result = topkast.cost({"w": (10, 100), "b": (10,)}, method="rigl", fwd=0.9, optimizer="sgd")
    assert str(result).splitlines() == [
        "layer   shape   positions  |A|  |B|  forward  training  of dense",
        "w       10×100          1  100  100      200       618    0.1030",
        "in all                     110  110      200       618    0.1030",
        "rigl, (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1): 0.1030 of the training FLOPs of dense "
        "training, 0.1000 of the forward FLOPs",
        "bytes: values 440, gradient 440, indices 400, layouts 700; 1,980 in all, dense 8,080 "
        "(0.25 ×), sgd",
    ]
    converted = json.loads(json.dumps(result.to_dict()))
    assert converted["fraction"] == result.fraction
    assert converted["layers"][1]["name"] == "b"
    assert converted["bytes"]["layouts"] == 700


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "RigL", "fwd": 0.9}, r"method='RigL' has no formula.*'snfs'.*mean 'rigl'\?"),
        ({"method": 3, "fwd": 0.9}, "method=3 has no formula"),
        ({"method": "rigl"}, "method='rigl' needs fwd"),
        ({"fwd": 0.9}, "method='topkast' needs bwd"),
        ({"fwd": 0.8, "bwd": 0.9}, "bwd must not exceed fwd"),
        ({"fwd": 1.2, "bwd": 0.9}, "fwd is a sparsity"),
        ({"method": "rigl", "fwd": 0.9, "bwd": 0.8}, "trains the weights of A alone"),
        ({"method": "dnw", "fwd": 0.9, "bwd": 0.8}, "trains all weights"),
        ({"method": "dense", "fwd": 0.9}, "method='dense' has no sparsity"),
        (
            {"method": "set", "fwd": 0.9, "overrides": {"w": {"bwd": 0.8}}},
            r"overrides\['w'\] sets bwd=0.8, but method='set'",
        ),
        ({"method": "set", "fwd": 0.9, "overrides": {"w": 3}}, "overrides must map"),
        ({"method": "set", "fwd": 0.9, "overrides": {"u": {"fwd": 0.8}}}, "matches none of"),
        ({"method": "set", "fwd": 0.9, "dense": "w*"}, "nothing is left to sparsify"),
        ({"method": "set", "fwd": 0.9, "distribution": "global"}, "only in total"),
        ({"fwd": 0.9, "bwd": 0.8, "steps": 0}, "steps must be a positive integer, got 0"),
        (
            {"method": "gmp", "fwd": 0.9, "steps": 1.5},
            r"steps must be a positive integer, got 1\.5",
        ),
        ({"method": "gmp", "fwd": 0.9}, "pass steps, a positive integer, got None"),
        ({"method": "set", "fwd": 0.9, "window": (0, 9)}, r"window=\(0, 9\) is of a sparsity"),
        ({"method": "set", "fwd": 0.9, "initial": 0.5}, "initial=0.5 is of a sparsity schedule"),
        ({"method": "gmp", "fwd": 0.9, "steps": 9, "window": (3, 12)}, "within 9 steps"),
        ({"method": "gmp", "fwd": 0.9, "steps": 9, "window": 3}, "window must be two steps"),
        ({"method": "gmp", "fwd": 0.9, "steps": 900}, "refresh_every=1000 is longer than the 422"),
        ({"method": "gmp", "fwd": 0.4, "steps": 9000, "initial": 0.5}, "must lie in"),
        ({"method": "rigl", "fwd": 0.9, "refresh_every": 0}, "refresh_every must be an integer"),
        ({"method": "gse", "fwd": 0.9, "sample_ratio": -1}, "sample_ratio must be a finite"),
        ({"method": "acdc", "fwd": 0.9, "dense_share": 1.5}, "dense_share .* at most 1, got 1.5"),
        ({"method": "set", "fwd": 0.9, "optimizer": "lion"}, "'momentum', 'adam', 'adamw', got"),
        ({"method": "set", "fwd": 0.9, "execution": "fast"}, "'sparse', 'masked', got 'fast'"),
        ({"method": "set", "fwd": 0.9, "reservoir": "moon"}, "reservoir must be one of"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(topkast.OptionError, match=message):
        topkast.cost(ONE, **options)


def test_models_that_cannot_be() -> None:
    with pytest.raises(topkast.AdapterNotFoundError, match="cost expects a mapping"):
        topkast.cost([(10, 100)], fwd=0.9, bwd=0.8)
    with pytest.raises(topkast.OptionError, match="example is an input of a torch"):
        topkast.cost(ONE, np.ones(3), fwd=0.9, bwd=0.8)
    with pytest.raises(topkast.OptionError, match="the mapping has no tensors"):
        topkast.cost({}, fwd=0.9, bwd=0.8)
    for shape in (10, (10, -1), (10, 2.5), "ab", np.ones((2, 2))):
        with pytest.raises(topkast.OptionError, match="the shape of a layer must be a sequence"):
            topkast.cost({"w": shape}, fwd=0.9, bwd=0.8)
    for positions in (-1, float("inf"), float("nan"), "3"):
        with pytest.raises(topkast.OptionError, match="positions is the number of times"):
            Layer((2, 2), positions=positions)  # type: ignore[arg-type]
    with pytest.raises(topkast.OptionError, match="itemsize must be a positive integer, got 0"):
        Layer((2, 2), itemsize=0)


@pytest.mark.parametrize(
    ("method", "name", "settings"),
    [
        (methods.TopKAST(), "topkast", {"bwd": 0.8}),
        (methods.SET(), "set", {}),
        (methods.Static(), "static", {"bwd": 0.8}),
        (methods.RigL(), "rigl", {"refresh_every": 100}),
        (methods.ITOP(), "rigl", {"refresh_every": 4000}),
        (methods.GSE(samples=2), "gse", {"refresh_every": 100, "sample_ratio": 2}),
        (methods.ACDC(warm_up=5, sparse=30, dense=10, end=90), "acdc", {"dense_share": 0.25}),
        (
            methods.GradualPruning(start=100, end=900, initial=0.5),
            "gmp",
            {"refresh_every": 100, "steps": 1_000, "window": (100, 900), "initial": 0.5},
        ),
        (methods.DNW(), "dnw", {}),
        (methods.IHT(), "iht", {}),
        (methods.IHT(end=10, initial=0.9), "iht", {"steps": 20}),
    ],
)
def test_methods_stand_for_their_formulas(method: Any, name: str, settings: dict[str, Any]) -> None:
    shapes = {"w": (30, 40)}
    given = {key: settings[key] for key in ("bwd", "steps") if key in settings}
    by_method = topkast.cost(shapes, method=method, fwd=0.9, **given)
    assert by_method == topkast.cost(shapes, method=name, fwd=0.9, **settings)


@pytest.mark.parametrize("sets", [(0.1, 0.2), (2, 1), (10, 101), (1,), 5, (-1, 5), (True, 5)])
def test_known_sets_are_numbers_of_weights(sets: Any) -> None:
    with pytest.raises(topkast.OptionError, match=r"sets must be .* such as \(10, 20\) of 100"):
        Layer((10, 10), sets=sets)
    assert Layer((10, 10), sets=(10, 100)).sets == (10, 100)


@pytest.mark.parametrize("method", [methods.Random(), methods.Mixed(), methods.TopKAST()])
def test_only_methods_of_the_largest_weights_have_a_reserve(method: Any) -> None:
    result = topkast.cost({"w": (100, 400)}, method=method, fwd=0.9, bwd=0.8)
    assert bool(result.bytes["reserve"]) == isinstance(method, methods.TopKAST)
    assert result.fraction == topkast.cost({"w": (100, 400)}, fwd=0.9, bwd=0.8).fraction


def test_iht_costs_the_mean_of_its_linear_schedule() -> None:
    """The sparsity rises to 4 % at the update 8; A is chosen after 0, 3 and 6 updates."""
    options: Any = {"method": methods.IHT(end=8), "fwd": 0.04, "refresh_every": 3}
    result = topkast.cost(ONE, steps=8, **options)
    sizes = [1000 - 40 * update / 8 for update in (0, 0, 0, 3, 3, 3, 6, 6)]
    assert result.training_flops == pytest.approx(2 * 2 * np.mean(sizes) + 2000, rel=1e-12)
    assert result.layers[0].forward == 960
    with pytest.raises(topkast.OptionError, match="pass steps, a positive integer, got None"):
        topkast.cost(ONE, **options)


def test_acdc_counts_its_first_and_its_last_phase() -> None:
    """Dense in updates 0 to 3, 6 and 7, and 10 and 11 of 20, with refreshes at even ones."""
    method = methods.ACDC(warm_up=4, sparse=2, dense=2, end=12)
    by_method = topkast.cost(ONE, method=method, fwd=0.9, refresh_every=2, steps=20)
    assert by_method == topkast.cost(ONE, method="acdc", fwd=0.9, dense_share=8 / 20)
    longer = topkast.cost(ONE, method=method, fwd=0.9, refresh_every=5, steps=20)
    dense = topkast.cost(ONE, method="acdc", fwd=0.9, dense_share=10 / 20)  # after 0 and 10
    assert longer == dense


def test_a_method_without_a_formula_is_refused() -> None:
    class Own(methods.TopKAST):
        pass

    with pytest.raises(topkast.OptionError, match="Own has no formula"):
        topkast.cost({"w": (30, 40)}, method=Own(), fwd=0.9, bwd=0.8)


@pytest.mark.parametrize(
    ("method", "bwd"), [("rigl", 0.9), ("snfs", 0.9), ("dnw", 0), ("gmp", 0.0), ("acdc", 0.0)]
)
def test_the_bwd_that_wrap_optimizer_asks_for_is_taken(method: str, bwd: float) -> None:
    """The same options go to both functions."""
    options: Any = {"method": method, "fwd": 0.9} | ({"steps": 32_000} if method == "gmp" else {})
    plain = topkast.cost({"w": (10, 100)}, **options)
    assert topkast.cost({"w": (10, 100)}, bwd=bwd, **options) == plain
    both = {"w": {"fwd": 0.5, "bwd": 0.5 if bwd else 0}}
    expected = topkast.cost({"w": (10, 100)}, overrides={"w": {"fwd": 0.5}}, **options)
    assert topkast.cost({"w": (10, 100)}, bwd=bwd, overrides=both, **options) == expected


@pytest.mark.parametrize(
    ("method", "every"),
    [
        (methods.GradualPruning(start=0, end=30), 10),
        (methods.GradualPruning(start=5, end=35), 10),  # changes at 10, 20, 30 and 40
        (methods.GradualPruning(start=0, end=7), 10),  # one change
        (methods.GradualPruning(start=3, end=50, initial=0.3), 4),
        (methods.GradualPruning(start=0, end=200), 7),  # longer than the run
        (methods.GradualPruning(start=20, end=60, initial=0.9), 10),  # none: it starts too sparse
        (methods.GraNet(start=5, end=35), 10),
        (methods.GraNet(start=0, end=33, initial=0.0), 6),
    ],
    ids=repr,
)
def test_schedules_of_objects_are_those_of_runs(method: Any, every: int) -> None:
    options: Any = {"fwd": 0.8, "method": method, "refresh_every": every}
    tx: Any = topkast.wrap_optimizer(topkast.SGD(0.1), bwd=0.0, **options)
    params: Any = {"w": np.linspace(-1, 1, 1000).reshape(10, 100)}
    state, active = tx.init(params), 0
    for _ in range(80):
        active += state.supports["w"].forward
        params, state = tx.step({"w": np.ones((10, 100))}, state, params)
    flops = 2 * active / 80
    expected = 3 * flops
    if isinstance(method, methods.GraNet):
        expected = (3 * flops * every + 2 * flops + 2000) / (every + 1)
    result = topkast.cost(ONE, steps=80, **options)
    assert result.training_flops == pytest.approx(expected, rel=1e-3)
    given = topkast.cost(
        ONE,
        steps=80,
        window=(0, 40),
        **options | {"method": type(method)(start=0, end=40, initial=0.5), "refresh_every": 4},
    )
    named = topkast.cost(
        ONE, steps=80, window=(0, 40), initial=0.5, fwd=0.8, refresh_every=4, method=result.method
    )
    assert given.training_flops == named.training_flops


def test_an_initial_sparsity_takes_the_place_of_the_object_s() -> None:
    """In a run that is shorter than the schedule too, whose window nobody passed."""
    options: dict[str, Any] = {"fwd": 0.8, "steps": 70, "refresh_every": 10}
    own = topkast.cost(ONE, method=methods.GradualPruning(start=0, end=100, initial=0.3), **options)
    given = topkast.cost(
        ONE, method=methods.GradualPruning(start=0, end=100), initial=0.3, **options
    )
    assert given == own
