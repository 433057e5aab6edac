"""GFLOP/s of the kernels, counting useful products only, against dense GEMM and PyTorch's kernels.

SpMM is the output ``A · X``, its transpose the input gradient ``Aᵀ · dY``, and SDDMM the gradient
on B, ``dY · Xᵀ``. "r × 1" is the same for units of r rows, which share a column. Layers are square
and float32, sets random, and four products are timed in a row. "SpMM, one column" has all entries
in one column, whose activations stay in the L1 cache: the speed of the loop if memory accesses were
free. "layouts" is the time in milliseconds that a refresh spends on making layouts, "bytes" their
size per entry of B without its index. Then a convolution is timed, forward and backward, by the
number of images; and the cost of two thread pools: a dense and a sparse product in turn, against
each alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from _harness import (
    Timing,
    describe_environment,
    interleave,
    make_parser,
    markdown_table,
    write_json,
)

import topkast
from topkast.kernels import (
    LinearProducts,
    UnitLinearProducts,
    find_row_starts,
    make_row_layout,
    multiply,
)

SPARSITIES = [(0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95)]
UNIT_ROWS = (2, 4, 8)
IN_A_ROW = 4


class Case:
    """One layer, one batch, one pair of sparsities."""

    def __init__(self, size: int, batch: int, pair: tuple[float, float]) -> None:
        self.size, self.batch, self.pair = size, batch, pair
        self.indices, forward = random_sets(size**2, pair)
        self.forward, backward = forward, len(self.indices)
        self.products = self.make_products()
        _, _, width = self.products.packed_shape((batch, size), np.float32)
        tiles = -(-batch // width)
        self.values, self.gradient = aligned(backward), aligned(backward)
        self.x, self.y = aligned(tiles, size, width), aligned(tiles, size, width)
        self.out = aligned(batch, size)
        self.flops = {
            "SpMM": 2 * forward * batch,
            "SpMM of the transpose": 2 * forward * batch,
            "SDDMM": 2 * backward * batch,
            "dense": 2 * size**2 * batch,
        }
        self.weight, self.columns = torch.randn(size, size), torch.randn(size, batch)
        self.grad_output = torch.randn(size, batch)
        self.a = csr(self.indices[:forward], self.values[:forward], size)
        self.b = csr(np.sort(self.indices), np.zeros(backward, np.float32), size)

    def make_products(self) -> LinearProducts:
        return LinearProducts(self.indices, self.forward, shape=(self.size, self.size))

    def sides(self) -> dict[str, Callable[[], Any]]:
        rows, products = self.columns.t().contiguous(), self.products
        shape = self.size, self.size
        starts = find_row_starts(self.indices, slice(self.forward), shape=shape)
        layout = make_row_layout(self.indices, starts, shape=shape, pitch=self.size)
        one_column = replace(layout, columns=np.zeros_like(self.indices), pitch=0)
        return {
            "dense": lambda: self.weight @ self.columns,
            "SpMM": partial(products.forward, self.values, self.x, self.out),
            "SpMM of the transpose": partial(
                products.input_gradient, self.values, self.y, self.out
            ),
            "SpMM, one column": partial(multiply, one_column, self.values, self.x, self.out),
            "SDDMM": partial(products.weight_gradient, self.y, self.x, self.gradient),
            "SpMM, PyTorch": lambda: self.a @ self.columns,
            "SDDMM, PyTorch": lambda: torch.sparse.sampled_addmm(
                self.b, self.grad_output, rows, beta=0.0
            ),
            **{name: side for rows in UNIT_ROWS for name, side in self.unit_sides(rows).items()},
        }

    def unit_sides(self, rows: int) -> dict[str, Callable[[], Any]]:
        """The three products with as many weights in units of `rows` × 1."""
        size, batch = self.size, self.batch
        units, forward = random_sets(size**2 // rows, self.pair)
        products = UnitLinearProducts(units, forward, shape=(size, size), rows=rows)
        x, y = (aligned(*products.packed_shape((batch, size), np.float32)) for _ in range(2))
        values, gradient = aligned(len(units) * rows), aligned(len(units) * rows)
        return {
            f"SpMM, {rows} × 1": partial(products.forward, values, x, self.out),
            f"SpMM of the transpose, {rows} × 1": partial(
                products.input_gradient, values, y, self.out
            ),
            f"SDDMM, {rows} × 1": partial(products.weight_gradient, y, x, gradient),
        }

    def measure_layouts(self) -> dict[str, float]:
        """Measure the milliseconds of making the layouts, and their bytes per entry of B."""
        timing = interleave({"layouts": self.make_products}, rounds=5)["layouts"]
        return {"ms": timing.median, "bytes": self.products.nbytes / len(self.indices)}


def random_sets(count: int, pair: tuple[float, float]) -> tuple[np.ndarray[Any, Any], int]:
    """Indices of A, then of B∖A, of `count` weights or units; and |A|."""
    rng = np.random.default_rng(0)
    forward, backward = (count - int(sparsity * count) for sparsity in pair)
    selected = rng.choice(count, backward, replace=False).astype(np.int32)
    sets = np.sort(selected[:forward]), np.sort(selected[forward:])
    return torch.from_numpy(np.concatenate(sets)).numpy(), forward


def aligned(*shape: int) -> np.ndarray[Any, Any]:
    """Draw random numbers, aligned to a multiple of the vector length as PyTorch aligns them."""
    return torch.randn(*shape).numpy()


def csr(indices: Any, values: Any, size: int) -> torch.Tensor:
    row, column = np.divmod(indices, size)
    starts = torch.from_numpy(np.searchsorted(row, np.arange(size + 1)))
    columns = torch.from_numpy(column.astype(np.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(starts, columns, torch.from_numpy(values), (size, size))


def flops_of(case: Case, name: str) -> int:
    return case.flops[name.partition(",")[0]]


def measure(size: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    columns: list[dict[str, str]] = []
    for pair in SPARSITIES:
        case = Case(size, batch, pair)
        sides = {name: repeat(side, IN_A_ROW) for name, side in case.sides().items()}
        timings = {
            name: timing.divided(IN_A_ROW)
            for name, timing in interleave(sides, rounds=rounds).items()
        }
        speeds = {
            name: flops_of(case, name) / timing.median / 1e6 for name, timing in timings.items()
        }
        layouts = case.measure_layouts()
        columns.append(
            {name: f"{speed:.0f}" for name, speed in speeds.items()}
            | {f"layouts, {unit}": f"{number:.1f}" for unit, number in layouts.items()}
        )
        setting = {"size": size, "batch": batch, "fwd": pair[0], "bwd": pair[1]}
        records.append({**setting, "kernel": "layouts", **layouts})
        records += [
            {**setting, "kernel": name, "gflops": speeds[name], **vars(timing)}
            for name, timing in timings.items()
        ]
    print(f"\n{size} × {size}, batch {batch}, GFLOP/s\n")
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    print(markdown_table(["fwd/bwd", *(f"{f}/{b}" for f, b in SPARSITIES)], rows), flush=True)
    return records


def repeat(call: Callable[[], Any], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def measure_images(rounds: int) -> list[dict[str, Any]]:
    """Measure a convolution of 64 channels with a 3 × 3 window on 32 × 32 images."""
    records, rows = [], []
    for count in (1, 4, 8, 16, 32, 64):
        images = torch.randn(count, 64, 32, 32, requires_grad=True)
        torch.manual_seed(0)
        dense = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1))
        models = {"dense": dense}
        for fwd, bwd in SPARSITIES:
            models[f"{fwd}/{bwd}"] = copy.deepcopy(dense)
            params = models[f"{fwd}/{bwd}"].named_parameters()
            optimizer = topkast.wrap_optimizer(torch.optim.SGD(params, 0.1), fwd=fwd, bwd=bwd)
            topkast.sparsify(models[f"{fwd}/{bwd}"], optimizer)

        def passes(model: torch.nn.Module, images: torch.Tensor = images) -> None:
            output = model(images)
            torch.autograd.grad(output, [images, *model.parameters()], torch.ones_like(output))

        sides = {name: repeat(partial(passes, model), IN_A_ROW) for name, model in models.items()}
        timings = {
            name: timing.divided(IN_A_ROW)
            for name, timing in interleave(sides, rounds=rounds).items()
        }
        rows.append(
            [
                str(count),
                f"{timings['dense'].median:.1f}",
                *(f"{1 / timing.ratio:.2f}" for name, timing in timings.items() if name != "dense"),
            ]
        )
        records += [
            {"images": count, "side": name, **vars(timing)} for name, timing in timings.items()
        ]
    print("\nConvolution, 64 channels, 3 × 3, images of 32 × 32: times faster than dense\n")
    names = [f"{fwd}/{bwd}" for fwd, bwd in SPARSITIES]
    print(markdown_table(["images", "dense, ms", *names], rows), flush=True)
    return records


def measure_pools(rounds: int) -> dict[str, Any]:
    """Measure a dense and a sparse product in turn, against each alone."""
    case = Case(2048, 256, (0.9, 0.8))
    sides = case.sides()
    dense, sparse = sides["dense"], sides["SpMM"]

    def both() -> None:
        dense()
        sparse()

    timings = interleave(
        {
            "dense alone": repeat(dense, 20),
            "sparse alone": repeat(sparse, 20),
            "in turn": repeat(both, 20),
        },
        rounds=rounds,
    )
    alone = timings["dense alone"].median + timings["sparse alone"].median
    together: Timing = timings["in turn"]
    print("\n20 dense products (2048 × 2048 × 256) and 20 sparse ones (0.9), ms\n")
    rows = [[name, f"{timing.median:.1f}"] for name, timing in timings.items()]
    print(
        markdown_table(
            ["", "ms"], [*rows, ["in turn / sum of both", f"{together.median / alone:.3f}"]]
        )
    )
    return {name: vars(timing) for name, timing in timings.items()}


def main() -> None:
    parser = make_parser(__doc__, "sparse_kernels")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = [
        record
        for size in options.sizes
        for batch in options.batches
        for record in measure(size, batch, options.rounds)
    ]
    images = measure_images(options.rounds)
    pools = measure_pools(options.rounds)
    packages = ("numpy", "torch", "numba")
    result = {"environment": describe_environment(options.threads, packages), "rows": records}
    write_json(options.output, {**result, "images": images, "pools": pools})


if __name__ == "__main__":
    main()
