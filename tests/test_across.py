"""Sets of a tensor that is spread over processes, here threads: those of the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import topkast
from topkast.adapter import Options, change_sets, rank_tensors

CONVERT: dict[str, Callable[[Any], Any]] = {
    "numpy": np.ascontiguousarray,
    "torch": lambda array: torch.from_numpy(np.ascontiguousarray(array)),
}


def choose(
    theta: np.ndarray[Any, Any],
    old: topkast.Support,
    options: Options,
    count: int,
    convert: Callable[[Any], Any],
) -> topkast.Support:
    """Give each process a part of B and a part of the rest, and join what they choose."""
    (ranked,) = rank_tensors({"w": theta.shape}, options)
    flat, barrier = theta.reshape(-1), Barrier(count)
    added: dict[int, Any] = {}
    outside = np.setdiff1d(np.arange(flat.size), old.indices)
    inside_parts, outside_parts = (
        np.array_split(indices, count) for indices in (old.indices, outside)
    )

    def run(rank: int) -> tuple[Any, Any]:
        def total(counts: Any) -> Any:
            added[rank] = np.asarray(counts)
            barrier.wait(30)
            summed = sum(added.values())
            barrier.wait(30)
            return convert(summed)

        indices, others = inside_parts[rank], outside_parts[rank]
        pieces = [(convert(piece), convert(flat[piece])) for piece in np.array_split(others, 3)]
        try:
            chosen = ranked.refresh_across(
                convert(flat[indices]), convert(indices), lambda: pieces, options, total
            )
        except topkast.NonFiniteError:
            raise
        except BaseException:
            barrier.abort()
            raise
        joined = np.concatenate([indices, np.asarray(chosen.entrants)])
        places = np.concatenate([np.asarray(chosen.places), np.asarray(chosen.entrant_places)])
        return joined, places

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(run, range(count)))
    indices, places = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return change_sets(old, indices, places)


@pytest.mark.parametrize("library", CONVERT)
@given(data=st.data())
def test_the_sets_are_those_of_the_whole_tensor(library: str, data: st.DataObject) -> None:
    size, count = data.draw(st.integers(2, 60)), data.draw(st.sampled_from([1, 2, 3, 4]))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    theta = generator.standard_normal((size, 2))
    digits = data.draw(st.sampled_from([0, 1, 9]))  # many ties, some, none
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    theta = np.round(theta * data.draw(st.sampled_from([0.0, 1e-40, 1.0])), digits).astype(dtype)
    fwd = data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    bwd = data.draw(st.sampled_from([0.0, fwd / 2, fwd]))
    seed = data.draw(st.integers(0, 3))
    options = Options(fwd=fwd, bwd=bwd, seed=seed)
    old = topkast.select(generator.standard_normal(size * 2), fwd=fwd, bwd=bwd)
    expected = topkast.select(theta, fwd=fwd, bwd=bwd, seed=seed, name="w")
    found = choose(theta, old, options, count, CONVERT[library])
    assert np.array_equal(found.indices, expected.indices)
    assert found.forward == expected.forward


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_weights_are_counted_in_all_processes(bad: float) -> None:
    theta = np.linspace(-1, 1, 40).reshape(8, 5)
    theta[3, 1] = theta[7, 4] = bad
    old = topkast.select(np.arange(40.0), fwd=0.8, bwd=0.6)
    with pytest.raises(topkast.NonFiniteError, match="w: 2 of 40 entries are NaN or infinite"):
        choose(theta, old, Options(fwd=0.8, bwd=0.6), 2, CONVERT["numpy"])
