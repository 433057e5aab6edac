"""Densities of tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import topkast
from topkast._options import Options
from topkast._tensors import rank_tensors
from topkast.selection._distribution import exact_densities, kept_count
from topkast.testing import sparsities

dimensions = st.lists(st.integers(1, 30), min_size=1, max_size=4).map(tuple)
networks = st.dictionaries(st.text("abc", min_size=1), dimensions, min_size=1, max_size=6)


def total(densities: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Any:
    return sum(densities[name] * math.prod(shape) for name, shape in shapes.items())


@given(shapes=networks, sparsity=st.sampled_from([0.0, 0.3, 0.8, 0.9, 0.99]))
def test_every_distribution_has_the_overall_density(
    shapes: dict[str, tuple[int, ...]], sparsity: float
) -> None:
    size = sum(math.prod(shape) for shape in shapes.values())
    for distribution in ("uniform", "erk"):
        densities = topkast.densities(shapes, sparsity, distribution=distribution)
        assert all(0 < density <= 1 for density in densities.values())
        assert total(densities, shapes) == pytest.approx((1 - sparsity) * size)


@given(shapes=networks, sparsity=st.sampled_from([0.3, 0.8, 0.9, 0.99]))
def test_erk_is_proportional_to_sum_over_product_below_one(
    shapes: dict[str, tuple[int, ...]], sparsity: float
) -> None:
    densities = exact_densities(shapes, sparsity, distribution="erk")
    scales = {
        densities[name] * math.prod(shape) / sum(shape)
        for name, shape in shapes.items()
        if densities[name] < 1
    }
    assert len(scales) <= 1
    for name, shape in shapes.items():  # a full tensor would be full under the common scale too
        if densities[name] == 1 and scales:
            assert max(scales) * sum(shape) / math.prod(shape) >= 1


@given(
    shapes=networks, pair=sparsities(), distribution=st.sampled_from(["uniform", "erk", "global"])
)
def test_counts_of_ranked_tensors_are_nested(
    shapes: dict[str, tuple[int, ...]], pair: tuple[float, float], distribution: Any
) -> None:
    options = Options(fwd=pair[0], bwd=pair[1], distribution=distribution)
    for ranked in rank_tensors(shapes, options):
        assert 1 <= ranked.forward <= ranked.backward <= ranked.size


def test_resnet_layer_densities_match_the_published_formula() -> None:
    # (3, 3, 64, 64) at the ERK of Evci et al.: (64 + 64 + 3 + 3) / (64 * 64 * 3 * 3) = 0.003635
    shapes = {"conv": (64, 64, 3, 3), "wide": (512, 512, 3, 3), "fc": (1000, 2048)}
    densities = topkast.densities(shapes, 0.95, distribution="erk")
    ratio = densities["conv"] / densities["wide"]
    assert ratio == pytest.approx((134 / 36864) / (1030 / 2359296))
    assert densities["fc"] / densities["wide"] == pytest.approx((3048 / 2048000) / (1030 / 2359296))


def test_empty_tensor_keeps_nothing() -> None:
    assert topkast.densities({"empty": (0, 4), "full": (4, 4)}, 0.5, distribution="erk") == {
        "empty": 1.0,
        "full": 0.5,
    }
    assert kept_count(0, exact_densities({"e": (0,)}, 0.5, distribution="uniform")["e"]) == 0


def test_global_has_no_density_per_tensor() -> None:
    with pytest.raises(topkast.OptionError, match="only in total"):
        topkast.densities({"a": (3, 3)}, 0.5, distribution="global")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_a_sparsity_out_of_range_is_refused(distribution: Any, sparsity: float) -> None:
    with pytest.raises(topkast.OptionError, match="must lie in"):
        topkast.densities({"a": (3, 3)}, sparsity, distribution=distribution)
