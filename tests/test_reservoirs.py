"""Reservoirs: generated weights, weights in files, and what left B since."""

from __future__ import annotations

import copy
import errno
import itertools
import math
import os
import pickle
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library, host

import topkast
from topkast import OptionError, ReservoirError, _progress
from topkast.adapter import IncrementalSelection, choose_first
from topkast.backends import _candidates, _compiled
from topkast.reservoirs import (
    ArrayReservoir,
    FileBase,
    Generated,
    Init,
    LayeredReservoir,
    Reservoir,
    Zeros,
)
from topkast.reservoirs._initial import _numbers
from topkast.selection._random import Ranks, make_key

Array = Any

UNIFORM, NORMAL = Init("uniform", 0.1), Init("normal", 0.02)


def bits(array: Array) -> Array:
    return np.asarray(array).view(np.uint8)


# Generated weights


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
@pytest.mark.parametrize("init", [UNIFORM, NORMAL], ids=["uniform", "normal"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_library_generates_the_same_bits(library: Library, init: Init, dtype: str) -> None:
    if dtype == "float64" and "jax" in library.name:
        pytest.skip("JAX has 32 bits here")
    weights = Generated("layer.weight", 7, init, 1 << 40, dtype)
    indices = np.arange(30_000, dtype=np.int32)
    expected = weights.take(indices)
    assert str(expected.dtype) == dtype
    generated = host(library.compile(weights.take)(library.asarray(indices)))
    np.testing.assert_array_equal(bits(generated), bits(expected))


@pytest.mark.parametrize("init", [UNIFORM, NORMAL], ids=["uniform", "normal"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("start", [0, 12_345, (1 << 32) - 1_000, (1 << 35) + 5])
def test_the_kernel_generates_the_same_bits(
    init: Init, dtype: str, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    weights = Generated("layer.weight", 7, init, 1 << 40, dtype)
    monkeypatch.setattr(_compiled, "_MIN_ENTRIES", dict.fromkeys(_compiled._MIN_ENTRIES, 0))
    compiled = weights.read(start, start + 40_001)
    monkeypatch.setattr(_compiled, "has_numba", lambda: False)
    np.testing.assert_array_equal(bits(compiled), bits(weights.read(start, start + 40_001)))


def test_a_weight_depends_on_seed_name_and_index_alone() -> None:
    weights = Generated("a", 0, UNIFORM, 100_000)
    same = Generated("a", 0, UNIFORM, 100_000).take(np.asarray([99_999, 5]))
    np.testing.assert_array_equal(same, weights.read(0, 100_000)[[99_999, 5]])
    others = Generated("b", 0, UNIFORM, 100_000), Generated("a", 1, UNIFORM, 100_000)
    for other in others:
        correlation = np.corrcoef(weights.read(0, 100_000), other.read(0, 100_000))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_distributions_are_those_that_are_promised(dtype: str) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    count = 200_000
    uniform = Generated("w", 3, UNIFORM, count, dtype).read(0, count)
    normal = Generated("w", 3, NORMAL, count, dtype).read(0, count)
    assert np.abs(uniform).max() <= 0.1
    assert np.abs(normal).max() <= 4.5 * 0.02
    assert np.count_nonzero(uniform) == np.count_nonzero(normal) == count
    exact = scipy_stats.uniform(-0.1, 0.2), scipy_stats.norm(0, 0.02)
    for weights, distribution in zip((uniform, normal), exact, strict=True):
        assert scipy_stats.kstest(weights, distribution.cdf).pvalue > 1e-3
        neighbours = np.corrcoef(weights[1:], weights[:-1])[0, 1]
        assert abs(neighbours) < 5 / math.sqrt(count)
    # The tail decides which weights are in B: its quantiles are those of the normal distribution.
    for share in (1e-2, 1e-3):
        quantile = np.quantile(np.abs(normal), 1 - share)
        spread = math.sqrt(share / count) / scipy_stats.norm.pdf(exact[1].isf(share / 2) / 0.02) / 2
        assert quantile / 0.02 == pytest.approx(exact[1].isf(share / 2) / 0.02, abs=5 * spread)


def test_distributions_end_where_it_is_promised() -> None:
    """The smallest and the largest magnitudes, which a sample hardly ever has."""
    words = np.asarray([0, (1 << 31) - 1, -1, -(1 << 31)], np.int32)
    uniform = _numbers(words, is_normal=False) / (1 << 24)
    assert np.abs(uniform - [-1, 0, 1, 0]).max() == 2.0**-24
    normal = _numbers(words, is_normal=True) / (1 << 21)
    # The last of 32,768 cells ends at 4.5; a number stands at one of 256 points of its cell.
    last = NormalDist().inv_cdf(1 - 2.0**-16)
    largest = last + (4.5 - last) * 255 / 256
    np.testing.assert_allclose(normal, [0, largest, -largest, 0], rtol=0, atol=2.0**-19)
    assert largest < 4.5


@pytest.mark.parametrize("shape", [(50, 100), (8, 6, 3, 5)])
@pytest.mark.parametrize(
    "rule", ["default", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]
)
def test_rules_have_the_scale_of_pytorch(rule: str, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn.init
    fill = {
        "default": lambda tensor: nn.kaiming_uniform_(tensor, a=math.sqrt(5)),
        "kaiming_uniform": lambda tensor: nn.kaiming_uniform_(tensor, nonlinearity="relu"),
        "kaiming_normal": lambda tensor: nn.kaiming_normal_(tensor, nonlinearity="relu"),
        "xavier_uniform": nn.xavier_uniform_,
        "xavier_normal": nn.xavier_normal_,
    }[rule]
    torch.manual_seed(0)
    drawn = torch.cat([fill(torch.empty(shape)).reshape(-1) for _ in range(40)])
    init = Init.of(rule, shape)
    scale = drawn.std() if init.kind == "normal" else drawn.abs().max()
    assert init.scale == pytest.approx(float(scale), rel=0.02)


def test_wrong_distributions_are_refused() -> None:
    with pytest.raises(OptionError, match=r"init must be .* one of 'default', .* got 'kaiming'"):
        Init.of("kaiming", (2, 3))
    with pytest.raises(OptionError, match="kind must be 'uniform' or 'normal'"):
        Init("cauchy", 1.0)  # type: ignore[arg-type]
    for shape in ((), (5,), (0, 3), (3, 0)):
        with pytest.raises(OptionError, match="needs a weight with inputs and outputs"):
            Init.of("default", shape)
    for seed in (-1, 1.5, True, "0"):
        with pytest.raises(OptionError, match="seed must be an integer of at least 0"):
            Generated("w", seed, UNIFORM, 10)  # type: ignore[arg-type]
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(OptionError, match="scale must be positive and finite"):
            Init("normal", scale)


# What is read is what was written


def make_reservoirs(theta: Array, folder: Path) -> dict[str, Reservoir]:
    """A reservoir of each kind, with the weights that `Generated("w", 0, UNIFORM)` has."""
    half = theta.size // 2
    parts = {"a": theta[:half], "b": theta[half:]}
    bases = [FileBase.create(folder, name, part) for name, part in parts.items()]
    generated = Generated("w", 0, UNIFORM, theta.size, theta.dtype.name)
    return {
        "array": ArrayReservoir(theta.copy()),
        "seeded": LayeredReservoir("seeded", [generated]),
        "disk": LayeredReservoir("disk", [FileBase.create(folder, "w", theta)]),
        "two files": LayeredReservoir("disk", bases),
    }


def test_arrays_of_any_layout_are_written_to() -> None:
    """Where kernels write and where NumPy has to: enough entries for kernels."""
    rng, size = np.random.default_rng(0), 100_000
    indices, weights = rng.permutation(size)[:40_000], rng.standard_normal(40_000)
    for dtype in ("float32", "float64", "float16"):
        for index_dtype in (np.int32, np.int64):
            for step in (1, 2):
                array = np.zeros(2 * size, dtype)[::step][:size]
                reservoir, expected = ArrayReservoir(array), np.zeros(size, dtype)
                own = indices.astype(index_dtype)[::step], weights.astype(dtype)[::step]
                reservoir.write(*own)
                expected[own[0]] = own[1]
                np.testing.assert_array_equal(array, expected)
    frozen = np.zeros(size)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        ArrayReservoir(frozen).write(indices.astype(np.int32), weights)


@given(data=st.data())
def test_reservoirs_agree(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    size = data.draw(st.sampled_from([2, 100, 5_000]))
    theta = Generated("w", 0, UNIFORM, size, data.draw(st.sampled_from(["float32", "float64"])))
    expected = theta.read(0, size)
    reservoirs = make_reservoirs(expected, tmp_path_factory.mktemp("reservoir"))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    for number in range(data.draw(st.integers(0, 12))):
        count = data.draw(st.integers(0, size))
        indices = rng.permutation(size)[:count].astype(np.int32)
        weights = rng.standard_normal(count).astype(expected.dtype)
        expected[indices] = weights
        for name, reservoir in reservoirs.items():
            reservoir.write(indices, weights)
            if number == 5:
                kept = reservoir
                reservoirs[name] = reservoir.copy()
                kept.write(indices, weights + 1)
    start, stop = sorted(rng.integers(0, size + 1, 2).tolist())
    chosen = rng.integers(0, size, 20).astype(np.int32)
    for reservoir in reservoirs.values():
        copies = [reservoir, copy.deepcopy(reservoir), pickle.loads(pickle.dumps(reservoir))]
        if isinstance(reservoir, LayeredReservoir):
            copies.append(
                LayeredReservoir.from_description(reservoir.describe(), reservoir.changes())
            )
        for one in copies:
            assert one.size == size
            np.testing.assert_array_equal(bits(one.read(0, size)), bits(expected))
            for read in (one.read, one.view):
                np.testing.assert_array_equal(read(start, stop), expected[start:stop])
            np.testing.assert_array_equal(one.take(chosen), expected[chosen])


def test_what_is_read_belongs_to_the_caller(tmp_path: Path) -> None:
    theta = Generated("w", 0, UNIFORM, 100).read(0, 100)
    for reservoir in make_reservoirs(theta, tmp_path).values():
        reservoir.read(0, 100)[:] = 0
        np.testing.assert_array_equal(reservoir.read(0, 100), theta)


def test_every_second_weight_of_an_array_is_viewed_like_others() -> None:
    weights = ArrayReservoir(np.arange(10.0)[::2]).view(1, 4)
    assert weights.tolist() == [2.0, 4.0, 6.0]
    assert weights.flags.c_contiguous


def test_only_entries_that_left_are_stored() -> None:
    reservoir = LayeredReservoir("seeded", [Generated("w", 0, UNIFORM, 10**12)])
    assert reservoir.nbytes == reservoir.disk_bytes == 0
    for _ in range(50):
        reservoir.write(np.arange(1_000) + 10**11, np.ones(1_000, np.float32))
    assert 12 * 1_000 <= reservoir.nbytes <= 1.34 * 12 * 1_000
    indices, weights = reservoir.changes()
    np.testing.assert_array_equal(indices, np.arange(1_000) + 10**11)
    assert weights.tolist() == [1.0] * 1_000


def test_a_file_takes_no_memory(tmp_path: Path) -> None:
    reservoir = make_reservoirs(np.ones(1_000, np.float32), tmp_path)["two files"]
    assert (reservoir.nbytes, reservoir.disk_bytes) == (0, 2 * 4096 + 4 * 1_000)


def test_a_method_that_forgets_keeps_nothing() -> None:
    reservoir = LayeredReservoir("none", [Zeros(100, "float32")])
    reservoir.write(np.arange(5), np.ones(5, np.float32))
    assert reservoir.nbytes == 0
    assert not reservoir.read(0, 100).any()
    assert not reservoir.take(np.arange(5)).any()


# Selection from a reservoir


@pytest.fixture(params=["kernels", "numpy"])
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled, "_MIN_ENTRIES", dict.fromkeys(_compiled._MIN_ENTRIES, 0))
    monkeypatch.setattr(_compiled, "has_numba", lambda: request.param == "kernels")


@pytest.mark.usefixtures("functions")
@given(data=st.data(), pair=st.sampled_from([(0.9, 0.8), (0.98, 0.9), (0.5, 0.0), (0.99, 0.99)]))
def test_the_sets_do_not_depend_on_the_reservoir(
    data: st.DataObject, pair: tuple[float, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    size = data.draw(st.sampled_from([2, 50, 4_000, 20_000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    theta = Generated("w", 0, UNIFORM, size, dtype).read(0, size)
    reservoirs = make_reservoirs(theta, tmp_path_factory.mktemp("reservoir"))
    seed, name = 3, "layer.weight"
    ranks = Ranks(make_key(seed, name, "ties"))

    def select(weights: Array) -> topkast.Support:
        return topkast.select(weights, fwd=pair[0], bwd=pair[1], seed=seed, name=name)

    expected = select(theta)
    counts = expected.forward, expected.backward
    selections = {}
    for kind, reservoir in reservoirs.items():
        chosen = choose_first(reservoir, counts, seed=seed, name=name)
        assert chosen is not None
        np.testing.assert_array_equal(chosen[0].support.indices, expected.indices)
        assert chosen[0].support.forward == expected.forward
        np.testing.assert_array_equal(chosen[0].values, theta[expected.indices])
        selections[kind] = chosen[1]
    for _ in range(4):
        change = data.draw(st.sampled_from(["move", "shrink", "round", "zeros", "signs"]))
        old, values = expected, theta[expected.indices]
        changed: Array = {
            "move": values + rng.standard_normal(values.size) * 0.02,
            "shrink": values * rng.random(values.size),
            "round": np.round(values, 2),
            "zeros": np.where(rng.random(values.size) < 0.5, 0, values),
            "signs": -values,
        }[change]
        values = changed.astype(theta.dtype)
        theta[old.indices] = values
        expected = select(theta)
        for kind, reservoir in reservoirs.items():
            outcome = selections[kind].choose(old, values, reservoir, ranks)
            if outcome is None:  # zeros: all weights are ranked
                assert np.count_nonzero(theta) < size
                gone = np.setdiff1d(old.indices, expected.indices)
                reservoir.write(gone, theta[gone])
                selections[kind] = IncrementalSelection()
                continue
            exchange, selections[kind] = outcome
            np.testing.assert_array_equal(exchange.support.indices, expected.indices)
            np.testing.assert_array_equal(exchange.values, theta[expected.indices])
            inside = exchange.support.active, exchange.support.exploring
            reservoir.write(*exchange.left, inside)


def test_what_entered_b_again_is_dropped() -> None:
    reservoir = LayeredReservoir("seeded", [Generated("w", 0, UNIFORM, 10_000)])
    for first in range(0, 5_000, 50):
        entered = np.arange(first), np.arange(5_000, 5_000 + first)
        left = np.arange(first, first + 50)
        reservoir.write(left, np.ones(50, np.float32), entered)
    assert 50 <= len(reservoir.changes()[0]) < 1_500
    assert reservoir.read(4_950, 5_000).tolist() == [1.0] * 50


@pytest.mark.slow  # generates two billion weights
def test_indices_of_large_tensors_have_64_bits() -> None:
    size, count = (1 << 31) + 10, 2_000
    weights = Generated("w", 0, UNIFORM, size)
    chosen = choose_first(LayeredReservoir("seeded", [weights]), (count, 2 * count))
    assert chosen is not None
    support, values = chosen[0].support, chosen[0].values
    assert support.indices.dtype == np.int64
    assert (support.forward, support.backward) == (count, 2 * count)
    np.testing.assert_array_equal(values, weights.take(support.indices))
    smallest = np.abs(values[:count]).min()
    assert np.abs(values[count:]).max() <= smallest
    # The magnitudes of a range: what reaches the threshold there is in B.
    start = size - (1 << 20)
    inside = np.flatnonzero(np.abs(weights.read(start, size)) > np.abs(values).min()) + start
    assert set(inside.tolist()) <= set(support.indices.tolist())
    reserve = chosen[1].reserve
    assert reserve is not None
    assert reserve.indices.dtype == np.int64
    # A refresh, in which an entry of A shrinks.
    values = values.copy()
    values[5] = 0
    ranks = Ranks(make_key(0, "", "ties"))  # many magnitudes are equal
    outcome = chosen[1].choose(support, values, LayeredReservoir("seeded", [weights]), ranks)
    assert outcome is not None
    assert outcome[0].left[0].tolist() == [support.indices[5]]


def test_numpy_and_kernels_choose_alike_in_64_bits() -> None:
    kernels = pytest.importorskip("topkast.kernels")
    rng = np.random.default_rng(0)
    indices = np.sort(rng.choice(1 << 40, 3_000, replace=False))
    values = rng.standard_normal(3_000).astype(np.float32)
    thirds = rng.permutation(np.arange(3_000) % 3)
    lists = [np.flatnonzero(thirds == part) for part in range(3)]
    inside, reserve = (
        (indices[positions], values[positions])
        for positions in (np.concatenate(lists[:2]), lists[2])
    )
    limits: Any = {"size": 1 << 40, "forward": 1.5, "backward": 1.0, "bound": 0.5}
    expected = _candidates.divide(inside, reserve, split=len(lists[0]), **limits)
    actual = kernels.divide(inside, reserve, split=len(lists[0]), **limits)
    assert expected.sizes == actual.sizes
    pairs = zip(actual[:4], expected[:4], strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


# Files


def test_a_file_is_named_by_tensor_and_content(tmp_path: Path) -> None:
    theta = np.arange(1_000, dtype=np.float32)
    first = FileBase.create(tmp_path, "layers/0.weight", theta)
    again = FileBase.create(tmp_path, "layers/0.weight", theta)
    other = FileBase.create(tmp_path, "layers/0.weight", theta + 1)
    assert first.path == again.path != other.path
    assert sorted(tmp_path.iterdir()) == sorted([first.path, other.path])
    again.discard()  # which it did not create
    assert first.path.exists()
    other.discard()
    assert not other.path.exists()


def test_a_file_that_a_checkpoint_needs_stays(tmp_path: Path) -> None:
    base = FileBase.create(tmp_path, "w", np.ones(10, np.float32))
    base.describe()
    base.discard()
    assert base.path.exists()


def test_a_file_that_a_pickle_needs_stays(tmp_path: Path) -> None:
    base = FileBase.create(tmp_path, "w", np.ones(10, np.float32))
    pickled = pickle.dumps(base)
    base.discard()
    assert pickle.loads(pickled).read(0, 10).tolist() == [1.0] * 10
    base.path.unlink()
    with pytest.raises(ReservoirError, match="cannot be read: "):
        pickle.loads(pickled)


def test_a_reservoir_discards_the_files_that_its_replacement_does_not_need(tmp_path: Path) -> None:
    bases = [FileBase.create(tmp_path, name, np.ones(10, np.float32)) for name in "abc"]
    reservoir = LayeredReservoir("disk", bases)
    reservoir.discard(LayeredReservoir("disk", bases[1:]))
    assert [base.path.exists() for base in bases] == [False, True, True]
    reservoir.discard()
    assert not any(base.path.exists() for base in bases)


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    base = FileBase.create(tmp_path, "w", np.ones(10, np.float32))
    content = base.path.read_bytes()
    base.path.write_bytes(content[:-4] + b"\0\0\0\0")
    again = FileBase.create(tmp_path, "w", np.ones(10, np.float32))
    assert again.path == base.path
    assert again.read(0, 10).tolist() == [1.0] * 10


def test_similar_names_have_files_of_their_own(tmp_path: Path) -> None:
    bases = [FileBase.create(tmp_path, name, np.ones(10, np.float32)) for name in ("a/b", "a_b")]
    assert bases[0].path != bases[1].path
    for base in bases:
        assert FileBase.from_description(base.describe(), tmp_path).name == base.name


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    theta = np.arange(1_000, dtype=np.float32)
    base = FileBase.create(tmp_path, "w", theta)
    saved, content = base.describe(), base.path.read_bytes()

    def check(message: str, **changes: Any) -> None:
        with pytest.raises(ReservoirError, match=message):
            FileBase.from_description(saved | changes, tmp_path)

    check("belongs to another tensor or run: its name is 'w'", name="v")
    check("its size is 1000, the checkpoint has 7", size=7)
    check("its digest is", digest="0" * 32)
    check("copy it there", path=str(tmp_path / "missing" / "w-1.reservoir"))
    damaged = bytearray(content)
    damaged[-3] ^= 1
    base.path.write_bytes(damaged)
    check("is damaged: its weights do not have its digest")
    base.path.write_bytes(content[:-4])
    path = re.escape(str(base.path))
    check(f"^{path} has 8,092 bytes, but its header asks for 8,096: it is damaged")
    base.path.write_bytes(b"PK" + content[2:])
    check("is not a reservoir of this version")
    base.path.write_bytes(b"[1, 2]" + b" " * len(content))
    check("its format is None, expected")
    base.path.unlink()
    base.path.mkdir()
    check("cannot be read: .*Is a directory")
    base.path.rmdir()
    base.path.write_bytes(content.replace(b"topkast-reservoir-1", b"topkast-reservoir-9"))
    check("its format is 'topkast-reservoir-9', expected 'topkast-reservoir-1'")
    base.path.unlink()
    base.path.mkdir()
    check("cannot be read: ")
    base.path.rmdir()
    base.path.write_bytes(content)
    assert FileBase.from_description(saved, tmp_path).read(0, 3).tolist() == [0.0, 1.0, 2.0]


def test_a_moved_file_is_found_in_the_new_folder(tmp_path: Path) -> None:
    base = FileBase.create(tmp_path / "old", "w", np.ones(10, np.float32))
    saved = base.describe()
    (tmp_path / "old").rename(tmp_path / "new")
    assert FileBase.from_description(saved, tmp_path / "new").path.parent == tmp_path / "new"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ReservoirError, match=r"4,000 bytes\) cannot be written to .*file"):
        FileBase.create(tmp_path / "file", "w", np.zeros(1_000, np.float32))
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_what_was_there(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = FileBase.create(tmp_path, "w", np.ones(10, np.float32))
    before = base.path.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    expected = ReservoirError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        FileBase.create(tmp_path, "w", np.zeros(10, np.float32))
    assert list(tmp_path.iterdir()) == [base.path]
    assert base.path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_content_and_name_are_written_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power, the file is complete, and found by its name."""
    written, write = [], os.fsync

    def record(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        written.append((is_folder, len(list(tmp_path.glob("*.reservoir")))))
        write(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    FileBase.create(tmp_path, "w", np.ones(10, np.float32))
    assert written == [(False, 0), (True, 1)]  # the content before the name


def test_incomplete_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from topkast.reservoirs import _file\n"
        "with _file._open_part(_file.Path(sys.argv[1]), 'w') as (_, file):\n"
        "    file.write(b'incomplete'); file.flush(); print(); sys.stdout.flush(); time.sleep(300)"
    )
    foreign = tmp_path / ".movie.1234567.part"
    foreign.write_bytes(b"another program's")
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        (part,) = tmp_path.glob(".w.*.part")
        FileBase.create(tmp_path, "v", np.ones(10, np.float32))
        assert part.exists()  # it is still written
    finally:
        writer.kill()
        writer.communicate(timeout=60)
    just_begun = tmp_path / ".w.0.reservoir.part"
    just_begun.write_bytes(b"")  # and not locked yet
    FileBase.create(tmp_path, "v", np.ones(10, np.float32))
    assert not part.exists()
    assert just_begun.exists()
    assert foreign.exists()
    os.utime(just_begun, (0, 0))
    FileBase.create(tmp_path, "v", np.ones(10, np.float32))
    assert not just_begun.exists()


def test_several_runs_write_a_tensor_of_the_same_name_at_once(tmp_path: Path) -> None:
    """Also in containers, where several processes have the same number."""
    weights = [np.full(3_000_000, number, np.float32) for number in range(4)]
    with ThreadPoolExecutor() as pool:
        bases = list(pool.map(lambda own: FileBase.create(tmp_path, "w", own), weights))
    for base, own in zip(bases, weights, strict=True):
        assert np.array_equal(base.read(0, own.size), own)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("letter", ["w", "层", "\U0001f600"])
def test_long_names_leave_the_weights_alone(letter: str, tmp_path: Path) -> None:
    """Tensors ranked as one have the names of all."""
    theta = np.arange(1_000, dtype=np.float32)
    names = [" + ".join(f"{letter * 100}.{number}" for number in range(count)) for count in (1, 99)]
    names.append(f"{names[1]} + v")
    bases = [FileBase.create(tmp_path, name, theta) for name in names]
    assert len({base.path for base in bases}) == 3
    for name, base in zip(names, bases, strict=True):
        assert base.read(0, 1_000).tolist() == theta.tolist()
        assert FileBase.from_description(base.describe()).name == base.name
        assert FileBase.create(tmp_path, name, theta).path == base.path
        base.path.unlink()
        assert FileBase.from_description(base.describe()).path == base.path  # written again


def test_paths_survive_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = FileBase.create("weights", "w", np.ones(10, np.float32))
    pickled = pickle.dumps(base)
    opened = FileBase.from_description(base.describe(), "weights")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for known in (base, opened, pickle.loads(pickled)):
        assert FileBase.from_description(known.describe()).read(0, 2).tolist() == [1.0, 1.0]


def test_a_file_that_others_need_stays(tmp_path: Path) -> None:
    theta = np.ones(10, np.float32)
    copied = FileBase.create(tmp_path, "copied", theta)
    copy.deepcopy(copied)
    first = FileBase.create(tmp_path, "w", theta)
    FileBase.create(tmp_path, "w", theta)  # by another run
    for base in (copied, first):
        base.discard()
        assert base.path.exists()


@pytest.mark.parametrize("checkpoint", ["description", "pickle"])
@pytest.mark.parametrize("change", ["missing", "short", "damaged", "foreign", "copied"])
def test_a_checkpoint_writes_a_file_again(change: str, checkpoint: str, tmp_path: Path) -> None:
    theta = np.arange(1, 11, dtype=np.float32)
    base = FileBase.create(tmp_path, "w", theta)
    content = base.path.read_bytes()
    base.path.unlink()
    other = {
        "short": content[:-4],
        "damaged": content[:-4] + bytes(4),
        "foreign": b"something else",
        "copied": content,
    }
    if change != "missing":
        base.path.write_bytes(other[change])
    before = base.path.stat().st_ino if change == "copied" else None
    if checkpoint == "pickle":
        loaded = pickle.loads(pickle.dumps(base))
    else:
        loaded = FileBase.from_description(base.describe())
    assert loaded.path == base.path
    assert loaded.read(0, 10).tolist() == theta.tolist()
    assert base.path.read_bytes() == content
    assert before in (None, base.path.stat().st_ino)  # an intact file is not written again


@pytest.mark.parametrize("change", ["cut off", "overwritten", "touched"])
def test_a_file_that_was_changed_in_place_is_named(change: str, tmp_path: Path) -> None:
    """Memory-mapped weights change with it, and a read beyond its end would crash the process."""
    base = FileBase.create(tmp_path, "w", np.ones(9_000, np.float32))
    with base.path.open("r+b") as file:
        if change == "cut off":
            file.truncate(5_000)
        elif change == "overwritten":
            file.seek(4_096)
            file.write(bytes(100))
    os.utime(base.path, ns=(0, 10**9))
    if change == "touched":
        assert FileBase.from_description(base.describe()).path == base.path
        pickle.dumps(base)
        return
    uses: list[Callable[[], Any]] = [base.describe, lambda: pickle.dumps(base)]
    if change == "cut off":
        uses += [lambda: base.read(0, 9_000), lambda: base.take(np.asarray([8_999]))]
    for use in uses:
        with pytest.raises(topkast.ReservoirError, match="was changed while it was in use"):
            use()


def test_a_file_can_be_shared(tmp_path: Path) -> None:
    base = FileBase.create(tmp_path, "w", np.ones(10, np.float32))
    assert copy.deepcopy(base) is base
    loaded = pickle.loads(pickle.dumps(base))
    assert loaded.read(0, 10).tolist() == [1.0] * 10
    with pytest.raises(ValueError, match="read-only"):
        base._weights[0] = 2


# Progress


def test_progress_is_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "_SILENT", -1.0)
    monkeypatch.setattr(_progress, "_TERMINAL_PAUSE", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ranges = list(_progress.chunks(5 << 20, "w: reading all weights"))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 5 << 20
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))
    shown = capsys.readouterr().err
    assert "topkast: w: reading all weights: 0%" in shown
    assert "s left" in shown
    assert shown.endswith("\r\x1b[K")  # the line is removed


def test_progress_is_logged_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="topkast")
    list(_progress.chunks(5 << 20, "w: reading all weights"))
    assert not caplog.records  # short work is silent
    monkeypatch.setattr(_progress, "_SILENT", -1.0)
    list(_progress.chunks(5 << 20, "w: reading all weights"))
    assert "w: reading all weights: 0%" in caplog.messages[0]
    assert not capsys.readouterr().err
