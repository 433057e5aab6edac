"""The analysis of masks agrees with counts by hand and with plain NumPy, for every library."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from libraries import Library
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

import topkast
from topkast import analysis
from topkast.analysis import EverActive, MaskHistory

Flags = NDArray[np.bool_]
SEEDS = st.integers(0, 2**32 - 1)


def mask(text: str) -> Flags:
    """A mask from rows of x (in A) and dots."""
    return np.asarray([[entry == "x" for entry in row] for row in text.split()])


BEFORE = mask("xx.. .x.. ..x. ....")
AFTER = mask("x... .xx. ..x. ...x")  # 1 of 4 left, 2 entered
WIDE = mask("xxx. .x.. ..xx ....")  # a B around BEFORE


def test_change_of_a_4_by_4_mask() -> None:
    change = analysis.mask_change({"w": BEFORE}, {"w": AFTER})
    assert change.tensors["w"] == change.total == (1 / 4, 1 / 4, 3 / 16)


def test_change_of_b_and_of_several_tensors() -> None:
    before = {"a": topkast.Masks(BEFORE, WIDE), "b": np.ones((2, 2), dtype=bool)}
    after = {"a": topkast.Masks(AFTER, AFTER), "b": np.ones((2, 2), dtype=bool)}
    change = analysis.mask_change(before, after)
    assert change.tensors["a"] == (1 / 4, 3 / 6, 3 / 16)
    assert change.tensors["b"] == analysis.Change(0, 0, 0)
    assert change.total == (1 / 8, 3 / 10, 3 / 20)  # counts are added before they are divided


def test_use_of_the_reservoir_of_a_4_by_4_mask() -> None:
    start = topkast.Masks(BEFORE, WIDE)  # 4 in A, 6 in B, 10 in the reservoir
    between = mask("xx.. .x.. .... x...")
    use = analysis.reservoir_use(start, between, AFTER).total
    # (3, 0), (1, 2) and (3, 3) of the reservoir were in A; nothing else outside the first A was.
    assert use == (3 / 10, 3 / 12, 3 / 4)
    assert analysis.reservoir_use(start, AFTER).total == (2 / 10, 2 / 12, 3 / 4)


def test_without_a_reservoir_its_use_is_nan_and_null_in_json() -> None:
    start = topkast.Masks(BEFORE, np.ones((4, 4), dtype=bool))
    use = analysis.reservoir_use(start, AFTER)
    assert math.isnan(use.total.reservoir)
    assert use.total.outside == 2 / 12
    assert use.to_dict()["total"] == {"reservoir": None, "outside": 2 / 12, "kept": 3 / 4}


def test_overlap_of_4_by_4_masks() -> None:
    result = analysis.overlap(BEFORE, AFTER).total
    assert result == (3 / 6, 3 / 4, (4 * 5 / 16) / (9 - 4 * 5 / 16), 5 / 16)


def test_counts_of_rows_and_columns() -> None:
    counts = analysis.unit_counts({"w": BEFORE})["w"]
    assert counts.outputs.tolist() == [2, 1, 1, 0]
    assert counts.inputs.tolist() == [1, 2, 1, 0]
    assert counts.empty_outputs.tolist() == counts.empty_inputs.tolist() == [3]


def test_kernels_of_convolutions_belong_to_their_units() -> None:
    kernel = np.zeros((2, 3, 2, 2), dtype=bool)  # outputs, inputs, height, width
    kernel[1, 2] = [[True, False], [True, True]]
    counts = analysis.unit_counts(kernel)[""]
    assert (counts.outputs.tolist(), counts.inputs.tolist()) == ([0, 3], [0, 0, 3])
    flax = analysis.unit_counts(kernel.transpose(2, 3, 1, 0), output_axis=-1)[""]
    assert (flax.outputs.tolist(), flax.inputs.tolist()) == ([0, 3], [0, 0, 3])


def test_dead_units_by_hand() -> None:
    sets = {
        "0": mask("x. .. .x xx"),  # unit 1 has no input
        "1": mask(".x.. x... ...x"),  # unit 2 has no output; unit 0 of the next has dead inputs
        "2": mask("x.. xx."),  # unit 2 of the last group has no output
    }
    first, second = analysis.dead_units(sets, ["0", "1", "2"])
    assert (first.producers, first.consumers, first.units) == (("0",), ("1",), 4)
    assert first.without_inputs.tolist() == [1]
    assert first.without_outputs.tolist() == [2]
    assert first.disconnected.tolist() == [1, 2, 3]  # 3 leads only to a unit without output
    assert second.without_inputs.tolist() == []
    assert second.without_outputs.tolist() == [2]
    assert second.disconnected.tolist() == [0, 2]


def test_dense_tensors_connect_all_units() -> None:
    (hidden,) = analysis.dead_units({"w": mask("x.. ...")}, [("w", None)])
    assert (hidden.without_inputs.tolist(), hidden.without_outputs.tolist()) == ([1], [])
    (hidden,) = analysis.dead_units({"w": mask("x.. ...")}, [(None, "w")])
    assert (hidden.without_inputs.tolist(), hidden.disconnected.tolist()) == ([], [1, 2])


def test_units_of_a_residual_network_form_one_group() -> None:
    shapes = {"in": (4, 5), "a": (3, 4), "b": (4, 3), "out": (2, 4)}
    sets = {name: np.ones(shape, dtype=bool) for name, shape in shapes.items()}
    layers = [("in", "a"), ("a", "b"), ("b", "out"), ("in", "out")]
    groups = [
        (group.producers, group.consumers, group.units)
        for group in analysis.dead_units(sets, layers)
    ]
    assert groups == [(("in", "b"), ("a", "out"), 4), (("a",), ("b",), 3)]
    groups_of_match = analysis.match_units(sets, sets, layers).groups
    assert [str(group) for group in groups_of_match] == ["in, b → a, out", "a → b"]


def draw(rng: np.random.Generator, *shape: int, density: float | None = None) -> Flags:
    drawn: Flags = rng.random(shape) < (rng.random() if density is None else density)
    return drawn


@given(seed=SEEDS, shape=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_shares_agree_with_plain_numpy(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(4):
        forward = draw(rng, *shape)
        forward[0, 0] = True
        masks.append(topkast.Masks(forward, forward | draw(rng, *shape)))
    start, *_, last = masks
    change = analysis.mask_change(start, last).total
    assert change.forward == (start.forward & ~last.forward).sum() / start.forward.sum()
    assert change.backward == (start.backward & ~last.backward).sum() / start.backward.sum()
    assert change.flipped == (start.forward ^ last.forward).mean()
    use = analysis.reservoir_use(start, *masks[1:]).total
    used = np.logical_or.reduce([later.forward for later in masks[1:]])
    if not start.backward.all():
        assert use.reservoir == used[~start.backward].mean()
    if not start.forward.all():
        assert use.outside == used[~start.forward].mean()
    assert use.kept == last.forward[start.forward].mean()
    history, ever_active = MaskHistory(), EverActive()
    for step, sets in enumerate(masks):
        history.record(step, sets)
        ever_active.update(sets)
    record = history.records[-1]
    np.testing.assert_equal(record.reservoir.total, use)  # NaN equals NaN
    assert record.change == analysis.mask_change(masks[-2], last)
    assert record.explored.total == ever_active.explored.total == (used | start.forward).mean()
    np.testing.assert_array_equal(ever_active.masks()[""], used | start.forward)


@given(seed=SEEDS)
def test_overlap_of_independent_masks_is_near_chance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, first, second = 5000, rng.integers(100, 2500), rng.integers(100, 2500)
    masks = [rng.permutation(np.arange(n) < size) for size in (first, second)]
    result = analysis.overlap(*masks).total
    deviation = math.sqrt(first * second * (n - first) * (n - second) / (n * n * (n - 1)))
    assert result.chance_common == pytest.approx(second / n)
    assert abs(result.common - result.chance_common) < 7 * deviation / first
    lower, upper = (
        (common / (first + second - common))
        for common in (first * second / n + sign * 7 * deviation for sign in (-1, 1))
    )
    assert lower < result.chance_iou < upper
    assert lower < result.iou < upper


def permuted(network: dict[str, Flags], permutations: list[NDArray[np.int64]]) -> dict[str, Flags]:
    """Reorder the hidden units of an MLP: rows of one weight and columns of the next."""
    network = {name: weight.copy() for name, weight in network.items()}
    for number, permutation in enumerate(permutations):
        network[str(number)] = network[str(number)][permutation]
        network[str(number + 1)] = network[str(number + 1)][:, permutation]
    return network


def mlp(
    rng: np.random.Generator, widths: list[int], density: float | None = None
) -> dict[str, Flags]:
    return {
        str(number): draw(rng, outputs, inputs, density=density)
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    }


@given(seed=SEEDS, widths=st.lists(st.integers(1, 7), min_size=3, max_size=3))
def test_a_permuted_network_with_one_hidden_layer_matches(seed: int, widths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    network = mlp(rng, widths)
    assume(any(weight.any() for weight in network.values()))
    other = permuted(network, [rng.permutation(widths[1])])
    match = analysis.match_units(network, other, ["0", "1"])
    assert match.matched.total.common == match.matched.total.iou == 1
    for name, weight in network.items():
        np.testing.assert_array_equal(match.masks[name], weight)
    restored = permuted(other, list(match.permutations))
    assert all((restored[name] == network[name]).all() for name in network)


@given(seed=SEEDS, depth=st.integers(2, 7))
def test_a_permuted_deep_network_matches(seed: int, depth: int) -> None:
    rng, width = np.random.default_rng(seed), 6
    # Units with equal incoming weights could not be told apart layer by layer: each row is another
    # binary number.
    network = {
        str(number): (rng.permutation(2**width)[:width, None] >> np.arange(width)) % 2 == 1
        for number in range(depth + 1)
    }
    permutations = [rng.permutation(width) for _ in range(depth)]
    names = list(network)
    match = analysis.match_units(network, permuted(network, permutations), names)
    assert match.matched.total.common == 1
    for found, applied in zip(match.permutations, permutations, strict=True):
        np.testing.assert_array_equal(applied[found], np.arange(width))
    first, second = (
        {name: weight.T for name, weight in sets.items()}
        for sets in (network, permuted(network, permutations))
    )
    match = analysis.match_units(first, second, names, output_axis=-1)
    assert match.matched.total.common == 1


def common(first: dict[str, Flags], second: dict[str, Flags]) -> int:
    """Number of weights in common."""
    return sum(int((mask & second[name]).sum()) for name, mask in first.items())


@given(seed=SEEDS, widths=st.lists(st.integers(2, 4), min_size=3, max_size=5))
def test_matching_finds_no_less_than_the_given_order_and_no_more_than_the_best(
    seed: int, widths: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    first, second = mlp(rng, widths), mlp(rng, widths)
    assume(any(weight.any() for weight in first.values()))
    assume(any(weight.any() for weight in second.values()))
    match = analysis.match_units(first, second, list(first))
    orders = [map(np.asarray, itertools.permutations(range(width))) for width in widths[1:-1]]
    commons = [
        common(first, permuted(second, list(choice))) for choice in itertools.product(*orders)
    ]
    size = sum(int(weight.sum()) for weight in first.values())
    found = round(match.matched.total.common * size)
    assert round(match.raw.total.common * size) <= found <= max(commons)
    if len(widths) == 3:  # one group of units: the Hungarian algorithm is exact
        assert found == max(commons)
    # What is reported is what the permutations do.
    assert found == common(first, permuted(second, list(match.permutations)))


@given(seed=SEEDS)
def test_after_matching_no_layer_alone_can_be_improved(seed: int) -> None:
    rng = np.random.default_rng(seed)
    widths = [9, 12, 10, 12, 9]
    first, second = mlp(rng, widths, 0.3), mlp(rng, widths, 0.3)
    match = analysis.match_units(first, second, list(first))
    counts, placed = (
        {int(name): mask.astype(int) for name, mask in masks.items()}
        for masks in (first, match.masks)
    )
    for layer in range(3):
        similarity = counts[layer] @ placed[layer].T + counts[layer + 1].T @ placed[layer + 1]
        best = similarity[linear_sum_assignment(similarity, maximize=True)].sum()
        assert np.trace(similarity) == best


def test_matching_finds_common_weights_by_chance_too() -> None:
    rng = np.random.default_rng(0)
    first, second = mlp(rng, [20, 30, 10], 0.1), mlp(rng, [20, 30, 10], 0.1)
    match = analysis.match_units(first, second, ["0", "1"], chance_draws=20)
    matched, chance = match.matched.total.common, match.matched.total.chance_common
    assert match.raw.total.common < 0.2
    assert 0.3 < chance < 0.7
    assert abs(matched - chance) < 0.06  # independent networks: nothing beyond chance
    again = analysis.match_units(first, second, ["0", "1"], chance_draws=20)
    assert again.matched == match.matched
    same = analysis.match_units(first, first, ["0", "1"], chance_draws=5).matched.total
    assert same.common == 1
    assert 0.3 < same.chance_common < 0.7
    assert math.isnan(analysis.match_units(first, second, ["0", "1"]).matched.total.chance_iou)


def test_other_tensors_than_the_layers_do_not_count() -> None:
    sets = {"0": np.eye(3) > 0, "1": np.eye(3) > 0, "other": mask("x. ..")}
    match = analysis.match_units(sets, sets | {"other": mask(".. x.")}, ["0", "1"])
    assert set(match.raw.tensors) == {"0", "1"}
    assert match.raw.total.common == 1


def test_libraries_agree(library: Library) -> None:
    as_array = library.asarray
    assert analysis.mask_change(as_array(BEFORE), as_array(AFTER)).total == (1 / 4, 1 / 4, 3 / 16)
    masks = topkast.Masks(as_array(BEFORE), as_array(WIDE))
    assert analysis.reservoir_use({"w": masks}, {"w": as_array(AFTER)}).total.reservoir == 2 / 10
    counts = analysis.unit_counts(as_array(BEFORE))[""]
    assert type(counts.outputs) is np.ndarray
    assert counts.outputs.tolist() == [2, 1, 1, 0]
    layers = {"0": as_array(BEFORE), "1": as_array(AFTER)}
    assert analysis.match_units(layers, layers, ["0", "1"]).matched.total.common == 1
    ever_active = EverActive()
    ever_active.update(as_array(BEFORE))
    ever_active.update(as_array(AFTER))
    assert ever_active.explored.total == 6 / 16


def test_supports_agree_with_their_masks(library: Library) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    params = {"w": library.asarray(weights)}
    for block in (None, (2, 4)):
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5, block=block)
        state = tx.init(params)
        masks = topkast.masks(state, params)
        support = state.supports["w"]
        for sets in (state, state.supports):
            assert analysis.mask_change(masks, sets, params).total == (0, 0, 0)
        assert analysis.mask_change(support, masks["w"], params["w"]).total == (0, 0, 0)
        assert analysis.mask_change(support, ~masks["w"].forward, params["w"]).total.forward == 1


def test_optimizers_of_all_frameworks_agree() -> None:
    weights = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.asarray(weights.copy()))
    sgd = torch.optim.SGD([("w", parameter)], 0.1)
    optimizer = topkast.wrap_optimizer(sgd, fwd=0.75, bwd=0.5)
    params = {"w": jnp.asarray(weights)}
    state = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.75, bwd=0.5).init(params)
    assert analysis.mask_change(optimizer, state, params).total == (0, 0, 0)
    assert analysis.overlap(state, optimizer, params).total.iou == 1
    ever_active = EverActive()
    ever_active.update(optimizer)
    ever_active.update(state, params)
    assert ever_active.explored.total == 0.25


def test_tensors_ranked_together_are_analysed_one_by_one() -> None:
    params = {"a": np.ones((2, 2)), "b": np.full((2, 2), 9.0)}
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5, distribution="global")
    state = tx.init(params)
    change = analysis.mask_change(state, state, params)
    assert math.isnan(change.tensors["a"].forward)  # a has no weight in A
    assert change.tensors["b"].forward == change.total.forward == 0


def record_three() -> MaskHistory:
    history = MaskHistory()
    other = {"v": mask("xx ..")}
    history.record(0, {"w": topkast.Masks(BEFORE, WIDE)} | other)
    history.record(10, {"w": topkast.Masks(AFTER, AFTER)} | other)
    history.record(20, {"w": topkast.Masks(BEFORE, BEFORE)} | other)
    return history


def test_a_history_is_saved_and_read(tmp_path: Path) -> None:
    history = record_three()
    assert history.records[0].change is None
    assert [record.step for record in history.records] == [0, 10, 20]
    history.save(tmp_path / "history.json")
    assert MaskHistory.read(tmp_path / "history.json") == history.records
    saved = json.loads((tmp_path / "history.json").read_text())
    assert saved["shapes"] == {"w": [4, 4], "v": [2, 2]}
    assert saved["records"][1]["change"]["tensors"]["w"]["forward"] == 1 / 4
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(topkast.MismatchError, match="is no file of mask records"):
        MaskHistory.read(tmp_path / "other.json")


@pytest.mark.parametrize("recorder", [MaskHistory, EverActive])
def test_a_resumed_recorder_continues_as_if_it_had_not_stopped(
    recorder: type[MaskHistory] | type[EverActive], tmp_path: Path
) -> None:
    def add(target: Any, step: int) -> None:
        sets = topkast.Masks(*(draw(np.random.default_rng(step), 5, 3),) * 2)
        target.record(step, sets) if recorder is MaskHistory else target.update(sets)

    whole, first, resumed = recorder(), recorder(), recorder()
    for step in range(6):
        add(whole, step)
        add(first if step < 3 else resumed, step)
        if step == 2:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
            assert json.loads(json.dumps(state)) == state
            resumed.load_state_dict(state)
    assert resumed.state_dict() == whole.state_dict()


def test_recorders_keep_no_reference_to_what_they_were_given() -> None:
    sets = {"w": BEFORE.copy()}
    history = MaskHistory()
    history.record(0, sets)
    sets["w"][:] = ~BEFORE
    history.record(1, sets)
    assert history.records[1].change is not None
    assert history.records[1].change.total.forward == 1
    assert history.records[1].explored.total == 1


def test_damaged_states_are_refused() -> None:
    ever_active = EverActive()
    ever_active.update({"w": mask("xxx")})
    state = ever_active.state_dict()
    fresh = EverActive()
    with pytest.raises(topkast.StateDictError, match="lacks 'ever_active', 'updates'"):
        fresh.load_state_dict({"shapes": {}})
    for bits in ("/w==", "4OA=", "no bits", ""):  # unused bits set; two bytes; no base64; nothing
        with pytest.raises(topkast.StateDictError, match=r"'w' in .* is not base64 of 3"):
            fresh.load_state_dict(state | {"ever_active": {"w": bits}})
    with pytest.raises(topkast.StateDictError, match=r"has the tensors \['v'\]"):
        fresh.load_state_dict(state | {"ever_active": {"v": "4A=="}})
    assert fresh.updates == 0
    with pytest.raises(topkast.StateDictError, match="lacks"):
        MaskHistory().load_state_dict(state)


W = {"w": BEFORE}


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"w": BEFORE[:3]}, r"'w' has the shape \(4, 4\) in the sets before and \(3, 4\) in the"),
        ({"v": BEFORE}, "'w' only in the sets before"),
        (W | {"v": BEFORE}, "'v' only in the sets after"),
        ({}, "the sets after are empty: expected the sets of at least one tensor"),
        ({"w": 1.0 * BEFORE}, "'w' of the sets after has dtype float64: expected booleans"),
        ({"w": "mask"}, "got dict: .*or pass masks by name"),
        (None, "got NoneType: .*or pass masks by name"),
        ({"w": topkast.Masks(WIDE, BEFORE)}, "'w' of the sets after has 2 weights in A that are"),
        ({"w": topkast.Masks(WIDE, WIDE[:3])}, r"an A of shape \(4, 4\) and a B of shape \(3, 4\)"),
        ({"w": topkast.Support.of(np.asarray([0]), np.asarray([1]))}, "knows no shape"),
        ({1: BEFORE}, "1 is no string"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(after: Any, message: str) -> None:
    with pytest.raises(topkast.MismatchError, match=message):
        analysis.mask_change(W, after)


def test_sets_without_a_weight_are_refused() -> None:
    empty = {"w": np.zeros((4, 4), dtype=bool)}
    for call in (analysis.mask_change, analysis.reservoir_use, analysis.overlap):
        with pytest.raises(topkast.MismatchError, match="have no weight in A"):
            call(empty, W)
    with pytest.raises(topkast.MismatchError, match="the second sets have no weight in A"):
        analysis.overlap(W, empty)
    with pytest.raises(topkast.MismatchError, match="have no weight in A"):
        MaskHistory().record(0, empty)
    with pytest.raises(topkast.MismatchError, match="at least one later"):
        analysis.reservoir_use(W)
    with pytest.raises(topkast.MismatchError, match="call update first"):
        _ = EverActive().explored


def test_supports_without_their_weights_are_refused() -> None:
    support = topkast.Support.of(np.asarray([0]), np.asarray([17]))
    with pytest.raises(topkast.MismatchError, match="params has no weights of this name"):
        analysis.unit_counts({"w": support}, {"v": BEFORE})
    with pytest.raises(topkast.MismatchError, match=r"indices outside of \[0, 16\)"):
        analysis.unit_counts({"w": support}, {"w": BEFORE})


def test_recorders_refuse_other_tensors_and_earlier_steps() -> None:
    history, ever_active = record_three(), EverActive()
    before = history.state_dict()
    with pytest.raises(topkast.OptionError, match="after the last record's, 20"):
        history.record(20, W)
    with pytest.raises(topkast.MismatchError, match="'v' only in the first record"):
        history.record(30, W)
    with pytest.raises(topkast.MismatchError, match="have no weight in A"):
        MaskHistory().record(0, {"w": np.zeros((1, 1), dtype=bool)})
    assert history.state_dict() == before
    ever_active.update(W)
    with pytest.raises(topkast.MismatchError, match=r"\(4, 4\) in the first update and \(3, 4\)"):
        ever_active.update({"w": BEFORE[:3]})


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["w"], topkast.OptionError, "have no hidden units"),
        ("wv", topkast.OptionError, "have no hidden units"),
        (["w", "v", "w"], topkast.OptionError, "name 'w' twice"),
        (["w", ("w", "v")], topkast.OptionError, "contain 'w'"),
        ([(None, None)], topkast.OptionError, r"contain \(None, None\)"),
        ([("w", "v", "u")], topkast.OptionError, r"contain \('w', 'v', 'u'\)"),
        (["w", "u"], topkast.MismatchError, "name 'u', but the sets have only 'w', 'v', 'x'"),
        (["w", "v"], topkast.MismatchError, "4 outputs of 'w', 2 inputs of 'v'"),
        (["w", "x"], topkast.MismatchError, r"'x' has the shape \(4,\)"),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    layers: Any, error: type[Exception], message: str
) -> None:
    sets = {"w": BEFORE, "v": BEFORE[:, :2], "x": BEFORE[0]}
    with pytest.raises(error, match=message):
        analysis.dead_units(sets, layers)
    with pytest.raises(error, match=message):
        analysis.match_units(sets, sets, layers)


def test_invalid_options_are_refused() -> None:
    with pytest.raises(topkast.OptionError, match="output_axis=1: expected 0"):
        analysis.unit_counts(W, output_axis=1)
    with pytest.raises(topkast.OptionError, match="chance_draws=-1"):
        analysis.match_units(W, W, [("w", None)], chance_draws=-1)


def test_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scipy.optimize", raising=False)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs scipy: pip install 'topkast\[analysis\]"):
        analysis.match_units(W, W, [("w", None)])
