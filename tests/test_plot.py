"""The figures show the numbers that they are given, in colours that can be told apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import NDArray

import topkast
from topkast import analysis, plot
from topkast.analysis import Layer, MaskHistory

Flags = NDArray[np.bool_]

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#e4e7eb"  # A, B∖A, outside B on a light page


def mask(text: str) -> Flags:
    """A mask from rows of x (in A) and dots."""
    return np.asarray([[entry == "x" for entry in row] for row in text.split()])


BEFORE = mask("xx.. .x.. ..x. ....")
AFTER = mask("x... .xx. ..x. ...x")  # 1 of 4 left, 2 entered
WIDE = mask("xxx. .x.. ..xx ....")  # a B around BEFORE
W = {"w": topkast.Masks(BEFORE, WIDE)}


def history_of_three() -> MaskHistory:
    """Two tensors; the second never changes."""
    history = MaskHistory()
    for step, flags in ((0, BEFORE), (10, AFTER), (20, BEFORE)):
        history.record(step, {"w": flags, "v": np.asarray([[True, False]])})
    return history


def pixels(axes: Axes) -> list[list[str]]:
    """The colours of the picture of a plot."""
    (image,) = axes.images
    colours: Any = image.cmap(image.norm(np.asarray(image.get_array())))
    return [[to_hex(colour) for colour in row] for row in colours]


def bars(axes: Axes) -> list[tuple[str, float, float, float]]:
    """Colour, position, start and length of the bars of a plot."""
    return [
        (
            to_hex(bar.get_facecolor()),
            round(bar.get_y() + bar.get_height() / 2, 6),
            bar.get_x(),
            bar.get_width(),
        )
        for bar in axes.patches
        if isinstance(bar, Rectangle)
    ]


def lengths(axes: Axes, colour: str) -> list[float]:
    return [length for of_bar, _, _, length in bars(axes) if of_bar == colour]


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def wrapped() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 4))
    adam = torch.optim.Adam(model.named_parameters())
    return topkast.wrap_optimizer(adam, fwd=0.9, bwd=0.75, dense="1.*")


def test_a_picture_has_a_pixel_for_each_weight_in_the_colour_of_its_set() -> None:
    figure = plot.masks(W)
    expected = [
        [BLUE, BLUE, ORANGE, GREY],
        [GREY, BLUE, GREY, GREY],
        [GREY, GREY, BLUE, ORANGE],
        [GREY, GREY, GREY, GREY],
    ]
    assert pixels(figure.axes[0]) == expected
    assert figure.axes[0].get_title() == "w\nA 25.0 %, B∖A 12.5 %"
    assert legend_of(figure) == ["A", "B∖A", "outside B"]
    assert pixels(plot.mask(W).axes[0]) == expected


def test_masks_without_b_have_two_colours() -> None:
    figure = plot.masks({"w": BEFORE, "bias": BEFORE[0]})
    assert pixels(figure.axes[1]) == [[BLUE, BLUE, GREY, GREY]]  # one row
    assert legend_of(figure) == ["A", "not in A"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 13])
def test_there_is_a_picture_for_each_tensor(count: int, tmp_path: Path) -> None:
    sets = {f"layer{number}": BEFORE for number in range(count)}
    figure = plot.masks(sets)
    titles = [axes.get_title().partition("\n")[0] for axes in figure.axes]
    assert titles == list(sets)
    figure.savefig(tmp_path / "masks.png")  # a layout that does not fit is a warning


def test_names_choose_tensors() -> None:
    optimizer = wrapped()
    figure = plot.masks({"a.w": BEFORE, "b.w": AFTER, "c": AFTER}, names=["a.*", "c"])
    assert [axes.get_title()[:3] for axes in figure.axes] == ["a.w", "c\nA"]
    assert [axes.get_title()[:8] for axes in plot.masks(optimizer).axes] == ["0.weight"]


def test_units_of_outputs_are_rows_in_either_order_of_axes() -> None:
    kernel = np.zeros((3, 2, 2, 2), dtype=bool)
    kernel[1, 0, 1, 1] = True  # output 1, input 0, last position
    row = [GREY, GREY, GREY, BLUE, GREY, GREY, GREY, GREY]
    assert pixels(plot.masks(kernel).axes[0])[1] == row
    flax = np.moveaxis(kernel, (0, 1), (3, 2))
    assert pixels(plot.masks(flax, output_axis=-1).axes[0])[1] == row


def test_large_tensors_are_drawn_as_shares_of_cells() -> None:
    half = np.zeros((1000, 3), dtype=bool)
    half[500:] = True
    figure = plot.masks({"half": half, "small": BEFORE})
    picture = np.asarray(figure.axes[0].images[0].get_array())
    assert picture.shape == (64, 3)
    assert picture[0].tolist() == [0, 0, 0]
    assert picture[-1].tolist() == [100, 100, 100]
    assert figure.axes[2].get_ylabel() == "weights of a cell in A (%)"
    assert np.asarray(plot.mask(half).axes[0].images[0].get_array()).shape == (128, 3)


def test_the_shares_of_cells_are_exact() -> None:
    flags = np.random.default_rng(0).random((201, 70)) < 0.3
    picture = np.asarray(plot.masks(flags).axes[0].images[0].get_array())
    edges = [np.arange(65) * size // 64 for size in flags.shape]
    for row, column in ((0, 0), (17, 40), (63, 63)):
        cell = flags[edges[0][row] : edges[0][row + 1], edges[1][column] : edges[1][column + 1]]
        assert picture[row, column] == pytest.approx(100 * cell.mean())
    sizes = np.outer(*(np.diff(edge) for edge in edges))
    assert (picture / 100 * sizes).sum() == pytest.approx(flags.sum())


def test_cells_of_several_tensors_have_one_scale() -> None:
    dense, sparse = np.ones((300, 2), dtype=bool), np.zeros((300, 2), dtype=bool)
    sparse[::4] = True
    first, second, _ = plot.masks({"dense": dense, "sparse": sparse}).axes
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 100)


def test_the_picture_of_one_mask_counts_rows_and_columns() -> None:
    figure = plot.mask(W)
    _, top, side = figure.axes
    for axes, counts in ((top, [1, 2, 1, 0]), (side, [2, 1, 1, 0])):
        (stairs,) = axes.patches
        assert stairs.get_data().values.tolist() == counts  # type: ignore[attr-defined]
        (marks,) = axes.lines
        assert np.asarray(marks.get_xydata()).sum() == 3  # row or column 3, at zero
    title = "w: 4 of 16 weights in A (25.0 %)"
    assert figure.get_suptitle().splitlines()[0] == title


def test_curves_show_the_records() -> None:
    history = history_of_three()
    change, explored, use = plot.dynamics(history).axes
    curve = np.asarray(change.lines[0].get_xydata())
    np.testing.assert_allclose(curve, [[10, 100 / 5], [20, 100 * 2 / 6]])
    np.testing.assert_allclose(
        np.asarray(explored.lines[0].get_ydata()), [100 * 5 / 18, 100 * 7 / 18, 100 * 7 / 18]
    )
    reservoir, kept = use.lines
    np.testing.assert_allclose(np.asarray(reservoir.get_ydata()), [0, 100 * 2 / 13, 100 * 2 / 13])
    np.testing.assert_allclose(np.asarray(kept.get_ydata()), [100, 80, 100])
    (band,) = change.collections
    low, high = band.get_datalim(change.transData).intervaly
    assert (low, high) == (0, pytest.approx(100 * 2 / 5))
    flipped = plot.dynamics(history.records, measure="flipped").axes[0]
    np.testing.assert_allclose(np.asarray(flipped.lines[0].get_ydata()), 2 * [100 * 3 / 18])


def test_without_a_reservoir_its_use_is_not_drawn() -> None:
    history = MaskHistory()
    for step in range(2):
        history.record(step, {"w": topkast.Masks(BEFORE, np.ones_like(BEFORE))})
    figure = plot.dynamics(history)
    assert len(figure.axes[2].lines) == 1
    assert "reservoir: has been in A" not in legend_of(figure)


@pytest.mark.parametrize("as_summary", [True, False])
def test_bars_show_the_densities_of_the_summary(as_summary: bool) -> None:
    optimizer = wrapped()
    summary = topkast.summary(optimizer)
    (axes,) = plot.densities(summary if as_summary else optimizer).axes
    row = summary.tensors[0]
    assert (row.name, row.forward, row.backward) == ("0.weight", 12, 30)
    forward, backward = np.asarray([12 / 120, 1, 52 / 160]), np.asarray([30 / 120, 1, 70 / 160])
    np.testing.assert_allclose(lengths(axes, BLUE), 100 * forward)
    np.testing.assert_allclose(lengths(axes, ORANGE), 100 * (backward - forward))
    starts = [start for colour, _, start, _ in bars(axes) if colour == ORANGE]
    np.testing.assert_allclose(starts, 100 * forward)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["0.weight", "1.weight", "all"]  # no biases
    assert [text.get_text() for text in axes.texts] == [
        "10.0 % / 25.0 %",
        "100 % / 100 %",
        "32.5 % / 43.8 %",
    ]


LAYERS = {"conv": Layer((8, 4, 3, 3), positions=16), "head": (10, 8), "bias": (10,)}


def test_bars_show_the_costs_of_methods() -> None:
    costs = {
        "Top-KAST": topkast.cost(LAYERS, fwd=0.9, bwd=0.8),
        "masked": topkast.cost(LAYERS, method="rigl", fwd=0.9, execution="masked"),
    }
    figure = plot.costs(costs)
    flops, memory = figure.axes
    values = list(costs.values())
    assert lengths(flops, GREY) == [cost.dense_training_flops for cost in values]
    assert lengths(flops, BLUE) == [cost.training_flops for cost in values]
    assert lengths(memory, GREY) == [cost.dense_bytes for cost in values]
    trained = [sum(cost.bytes[kind] for kind in ("values", "gradient", "state")) for cost in values]
    assert lengths(memory, BLUE) == trained
    for row, cost in enumerate(values):
        stacked = [bar for bar in bars(memory) if bar[1] == row and bar[0] != GREY]
        assert max(start + length for _, _, start, length in stacked) == cost.total_bytes
    assert [label.get_text() for label in flops.get_yticklabels()] == list(costs)
    assert [text.get_text() for text in flops.texts] == [
        f"{100 * cost.fraction:.1f} %" for cost in values
    ]
    assert legend_of(figure)[:2] == ["dense", "values, gradient, state"]
    assert legend_of(figure)[-1] == "dense weights and gradient"


def test_bars_show_the_cost_of_layers() -> None:
    cost = topkast.cost(LAYERS, fwd=0.9, bwd=0.8, dense="head")
    flops, memory = plot.costs(cost).axes
    layers = cost.layers[:2]  # the bias has no product
    assert [label.get_text() for label in flops.get_yticklabels()] == ["conv", "head"]
    assert lengths(flops, BLUE) == [layer.training_flops for layer in layers]
    assert lengths(memory, GREY) == [layer.dense_bytes for layer in layers]
    assert flops.texts[1].get_text() == memory.texts[1].get_text() == "100 %"


def test_bars_show_the_overlap_before_and_after_matching() -> None:
    flags = {"w": BEFORE}
    match = analysis.match_units(flags, {"w": BEFORE[[1, 0, 2, 3]]}, [("w", None)])
    (axes,) = plot.overlap(match).axes
    np.testing.assert_allclose(lengths(axes, ORANGE), [75, 75])
    np.testing.assert_allclose(lengths(axes, BLUE), [100, 100])
    (axes,) = plot.overlap(analysis.overlap(flags, {"w": AFTER}), measure="iou").axes
    np.testing.assert_allclose(lengths(axes, ORANGE), [50, 50])
    segments: Any = axes.collections[0]
    np.testing.assert_allclose(segments.get_segments()[0][:, 0], 100 * 1.25 / 7.75)


def drawings() -> list[Callable[..., Figure]]:
    """All functions, with something to draw."""
    large = topkast.Masks(*2 * [np.ones((300, 3), bool)])
    return [
        partial(plot.masks, W | {"large": large}),
        partial(plot.mask, W),
        partial(plot.dynamics, history_of_three()),
        partial(plot.densities, wrapped()),
        partial(plot.costs, topkast.cost(LAYERS, fwd=0.9, bwd=0.8)),
        partial(plot.overlap, analysis.overlap({"w": BEFORE}, {"w": AFTER})),
    ]


def luminance(colour: Any) -> float:
    """Relative luminance of WCAG 2."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], parts))


def contrast(first: Any, second: Any) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("style", ["light", "dark", "dark_background"])
def test_all_text_is_readable(style: str, tmp_path: Path) -> None:
    """At 700 pixels, on a light and a dark page, and in the colours that a user has set."""
    is_ours = style in ("light", "dark")
    with matplotlib.style.context("default" if is_ours else style):
        drawn = [draw(style=style if is_ours else None) for draw in drawings()]
    for figure in drawn:
        assert figure.get_figwidth() == 7  # of 100 pixels
        figure.savefig(tmp_path / "figure.png", dpi=100)  # outside the user's style
        background = figure.get_facecolor()
        assert (luminance(background) < 0.2) == (style != "light")
        written = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert len(written) > 4
        for text in written:
            assert contrast(text.get_color(), background) > 7, text
            assert float(text.get_fontsize()) >= 9, text


@pytest.mark.parametrize("style", ["light", "dark"])
def test_sets_differ_in_brightness_too(style: Any) -> None:
    """So that they can be told apart without colours."""
    figure = plot.masks(W, style=style)
    ((a, _, exploring, outside), *_) = pixels(figure.axes[0])
    for first, second in combinations((a, exploring, outside), 2):
        assert contrast(first, second) > 1.25
    assert contrast(a, figure.get_facecolor()) > 4.5


def test_the_style_leaves_the_settings_of_matplotlib_alone() -> None:
    before = dict(mpl.rcParams)
    for draw in drawings():
        draw(style="dark")
        assert dict(mpl.rcParams) == before


def test_figures_are_drawn_into_subfigures(tmp_path: Path) -> None:
    parent = Figure(figsize=(14, 24), layout="constrained")
    grid = parent.add_gridspec(6)
    for row, draw in enumerate(drawings()):
        part = parent.add_subfigure(grid[row])
        assert draw(figure=part, style="dark") is parent
        assert part.axes
        assert luminance(part.get_facecolor()) < 0.2
    parent.savefig(tmp_path / "parts.png")


def test_a_figure_without_a_layout_gets_one() -> None:
    figure = Figure()
    assert plot.densities(wrapped(), figure=figure) is figure
    assert figure.get_layout_engine() is not None


def test_notebooks_show_a_figure_without_pyplot() -> None:
    figure: Any = plot.masks(W)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(topkast.OptionError, match="measure='a': expected one of 'forward'"):
        plot.dynamics(history_of_three(), measure="a")
    with pytest.raises(topkast.MismatchError, match="has 1 records: a curve needs at least 2"):
        plot.dynamics(history_of_three().records[:1])
    with pytest.raises(topkast.OptionError, match="measure='a': expected one of 'common'"):
        plot.overlap(analysis.overlap({"w": BEFORE}, {"w": AFTER}), measure="a")
    with pytest.raises(topkast.MismatchError, match="pass name="):
        plot.mask(W | {"v": BEFORE})
    with pytest.raises(topkast.MismatchError, match="no tensor 'v', only 'w'"):
        plot.mask(W, name="v")
    with pytest.raises(topkast.MismatchError, match=r"'w' has the shape \(4,\)"):
        plot.mask({"w": BEFORE[0]})
    with pytest.raises(topkast.OptionError, match=r"names='v\*' matches none of"):
        plot.masks(W, names="v*")
    with pytest.raises(topkast.MismatchError, match="'w' have no weights"):
        plot.masks({"w": np.zeros((0, 3), dtype=bool)})
    with pytest.raises(topkast.MismatchError, match="nothing to draw"):
        plot.densities(topkast.Summary(0, (), 0))
    with pytest.raises(topkast.MismatchError, match="got list"):
        plot.costs([topkast.cost(LAYERS, fwd=0.9, bwd=0.8)])  # type: ignore[arg-type]
    with pytest.raises(topkast.MismatchError, match="there is no cost"):
        plot.costs({})
    with pytest.raises(topkast.OptionError, match="style='night': expected 'light', 'dark'"):
        plot.masks(W, style="night")  # type: ignore[arg-type]


@pytest.mark.parametrize("use", ["topkast.plot.masks", "from topkast import plot"])
def test_missing_matplotlib_is_named(use: str) -> None:
    code = f"import sys; sys.modules['matplotlib'] = None; import topkast; {use}"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode
    assert result.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: topkast.plot needs matplotlib: pip install 'topkast[analysis]'"
    )


@pytest.mark.parametrize("name", ["$", "$a$", "$a_{$", "x" * 80 + "$a_{$"])
def test_names_are_no_formulas(tmp_path: Path, name: str) -> None:
    weights = {name: np.random.default_rng(0).standard_normal((4, 6))}
    state = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5).init(weights)
    cost = topkast.cost({name: (4, 6)}, fwd=0.5, bwd=0.5)
    overlaps = analysis.overlap(state, state, weights)
    for figure in (
        plot.mask(state, weights),
        plot.masks(state, weights),
        plot.densities(state, weights),
        plot.costs(cost),
        plot.costs({name: cost}),
        plot.overlap(overlaps),
    ):
        figure.savefig(tmp_path / "figure.png", dpi=20)
