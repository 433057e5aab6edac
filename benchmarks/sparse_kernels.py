"""GFLOP/s of the kernels, useful products alone, beside dense GEMM and PyTorch's sparse products.

SpMM is the output ``A · X``; its transpose the input gradient ``Aᵀ · dY``; SDDMM the gradient on B,
``dY · Xᵀ``. Square float32 layers, random sets, four products in a row. "SpMM, one column" is the
same with all entries in one column, whose activations stay in the first cache: what the loop could
do if memory cost nothing. "layouts" are the milliseconds that a refresh spends on making them, and
"bytes" what they hold for each entry of B, beside its index. Then a convolution, forward and
backward, by the number of images; and what two pools of threads would cost: a dense product and a
sparse one in turn, against each alone.
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
from _harness import Timing, arguments, environment, interleave, table, write

import topkast
from topkast.kernels import LinearProducts, find_row_starts, make_row_layout, multiply

SPARSITIES = [(0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95)]
IN_A_ROW = 4


class Case:
    """One layer, one batch, one pair of sparsities."""

    def __init__(self, size: int, batch: int, pair: tuple[float, float]) -> None:
        rng = np.random.default_rng(0)
        backward, forward = (size**2 - int(sparsity * size**2) for sparsity in reversed(pair))
        chosen = rng.choice(size**2, backward, replace=False).astype(np.int32)
        parts = np.sort(chosen[:forward]), np.sort(chosen[forward:])
        self.size, self.forward = size, forward
        self.indices = torch.from_numpy(np.concatenate(parts)).numpy()
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
        self.a = csr(parts[0], self.values[:forward], size)
        self.b = csr(np.sort(chosen), np.zeros(backward, np.float32), size)

    def make_products(self) -> LinearProducts:
        return LinearProducts(self.indices, self.forward, shape=(self.size, self.size))

    def sides(self) -> dict[str, Callable[[], Any]]:
        rows, products = self.columns.t().contiguous(), self.products
        shape = self.size, self.size
        starts = find_row_starts(self.indices, slice(self.forward), shape=shape)
        layout = make_row_layout(self.indices, starts, shape=shape, pitch=self.size)
        one = replace(layout, columns=np.zeros_like(self.indices), pitch=0)
        return {
            "dense": lambda: self.weight @ self.columns,
            "SpMM": partial(products.forward, self.values, self.x, self.out),
            "SpMM of the transpose": partial(
                products.input_gradient, self.values, self.y, self.out
            ),
            "SpMM, one column": partial(multiply, one, self.values, self.x, self.out),
            "SDDMM": partial(products.weight_gradient, self.y, self.x, self.gradient),
            "SpMM, PyTorch": lambda: self.a @ self.columns,
            "SDDMM, PyTorch": lambda: torch.sparse.sampled_addmm(
                self.b, self.grad_output, rows, beta=0.0
            ),
        }

    def layouts(self) -> dict[str, float]:
        """Milliseconds of making the layouts, and bytes of them for each entry of B."""
        timing = interleave({"layouts": self.make_products}, rounds=5)["layouts"]
        return {"ms": timing.median, "bytes": self.products.nbytes / len(self.indices)}


def aligned(*shape: int) -> np.ndarray[Any, Any]:
    """Random numbers at an address that is a multiple of a vector's length, as PyTorch's are."""
    return torch.randn(*shape).numpy()


def csr(indices: Any, values: Any, size: int) -> torch.Tensor:
    row, column = np.divmod(indices, size)
    starts = torch.from_numpy(np.searchsorted(row, np.arange(size + 1)))
    places = torch.from_numpy(column.astype(np.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(starts, places, torch.from_numpy(values), (size, size))


def flops_of(case: Case, name: str) -> int:
    return case.flops[name.partition(",")[0]]


def measure(size: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    records, rows = [], []
    for pair in SPARSITIES:
        case = Case(size, batch, pair)
        sides = {name: several(side, IN_A_ROW) for name, side in case.sides().items()}
        timings = {
            name: timing.divided(IN_A_ROW)
            for name, timing in interleave(sides, rounds=rounds).items()
        }
        speeds = {
            name: flops_of(case, name) / timing.median / 1e6 for name, timing in timings.items()
        }
        layouts = case.layouts()
        cells = (
            *(f"{speed:.0f}" for speed in speeds.values()),
            *map("{:.1f}".format, layouts.values()),
        )
        rows.append([f"{pair[0]}/{pair[1]}", *cells])
        of = {"size": size, "batch": batch, "fwd": pair[0], "bwd": pair[1]}
        records.append({**of, "kernel": "layouts", **layouts})
        records += [
            {**of, "kernel": name, "gflops": speeds[name], **vars(timing)}
            for name, timing in timings.items()
        ]
    print(f"\n{size} × {size}, batch {batch}, GFLOP/s\n")
    print(table(["fwd/bwd", *speeds, "layouts, ms", "bytes"], rows), flush=True)
    return records


def several(call: Callable[[], Any], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def measure_images(rounds: int) -> list[dict[str, Any]]:
    """A convolution of 64 channels with a window of 3 × 3, on images of 32 × 32."""
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
            found = model(images)
            torch.autograd.grad(found, [images, *model.parameters()], torch.ones_like(found))

        sides = {name: several(partial(passes, model), IN_A_ROW) for name, model in models.items()}
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
    print(table(["images", "dense, ms", *names], rows), flush=True)
    return records


def measure_pools(rounds: int) -> dict[str, Any]:
    """A dense and a sparse product in turn, against each alone."""
    case = Case(2048, 256, (0.9, 0.8))
    sides = case.sides()
    dense, sparse = sides["dense"], sides["SpMM"]

    def both() -> None:
        dense()
        sparse()

    timings = interleave(
        {
            "dense alone": several(dense, 20),
            "sparse alone": several(sparse, 20),
            "in turn": several(both, 20),
        },
        rounds=rounds,
    )
    alone = timings["dense alone"].median + timings["sparse alone"].median
    together: Timing = timings["in turn"]
    print("\n20 dense products (2048 × 2048 × 256) and 20 sparse ones (0.9), ms\n")
    rows = [[name, f"{timing.median:.1f}"] for name, timing in timings.items()]
    print(table(["", "ms"], [*rows, ["in turn / sum of both", f"{together.median / alone:.3f}"]]))
    return {name: vars(timing) for name, timing in timings.items()}


def main() -> None:
    parser = arguments(__doc__, "sparse_kernels")
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
    result = {"environment": environment(options.threads, packages), "rows": records}
    write(options.output, {**result, "images": images, "pools": pools})


if __name__ == "__main__":
    main()
