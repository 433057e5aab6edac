"""Inference: latency and bytes of dense PyTorch, sparse layers, and the kernels without PyTorch.

Each side runs in a process of its own, so that no pool of threads disturbs another; the processes
take turns, one batch of calls each. Weights are those at initialization, since values do not
matter for the time. Bytes are of the safetensors file that a side loads, and of the weights,
indices and layouts that it holds, where that is known. ONNX Runtime, dense, is measured if it is
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _harness import describe_environment, make_parser, markdown_table, write_json

SPARSITIES = (0.9, 0.98)
SIDES = ("dense PyTorch", "ONNX Runtime", "sparse layers", "kernels alone")
CASES = {"mlp": ((784,), (1, 16, 256)), "convolutions": ((3, 32, 32), (1, 32))}
TARGET_SECONDS = 0.1  # of one batch of calls


def build(case: str) -> Any:
    """A multilayer perceptron, or a convolutional network, whose first or last layer is dense."""
    from torch import nn

    if case == "mlp":
        widths = (784, 2048, 2048, 2048)
        layers: list[Any] = []
        for width, rows in itertools.pairwise(widths):
            layers += [nn.Linear(width, rows), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(2048, 10))
    channels, strides = (3, 64, 128, 128, 256), (1, 2, 1, 2)
    layers = []
    for (width, rows), stride in zip(itertools.pairwise(channels), strides, strict=True):
        layers += [nn.Conv2d(width, rows, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def write_models(case: str, fwd: float, folder: Path) -> dict[str, int]:
    """Write the files that the sides load; returns their bytes."""
    import topkast_torch
    import torch
    from safetensors.torch import save_file

    import topkast

    torch.manual_seed(0)
    model = build(case)
    first_and_last = [f"{len(model) - 1}.*", *(["0.*"] if case != "mlp" else [])]
    adam = torch.optim.Adam(model.named_parameters())
    topkast.wrap_optimizer(adam, fwd=fwd, bwd=fwd, dense=first_and_last)
    topkast_torch.save_forward(model, folder / "sparse")
    save_file(model.state_dict(), folder / "dense")
    if importlib.util.find_spec("onnxruntime") is not None:
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the older exporter
        x = torch.ones(1, *CASES[case][0])
        axes: Any = {"x": {0: "batch"}}
        torch.onnx.export(
            model.eval(), (x,), folder / "onnx", input_names=["x"], dynamic_axes=axes, dynamo=False
        )
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def make_side(side: str, case: str, folder: Path, threads: int) -> tuple[Callable[..., Any], int]:
    """The model of a side as a function of a NumPy array, and the bytes that it holds."""
    if side == "kernels alone":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import topkast.inference

        loaded = topkast.inference.load(folder / "sparse")
        loaded(np.zeros((1, *CASES[case][0]), np.float32))  # layouts are made in the first call
        return loaded, loaded.nbytes
    if side == "ONNX Runtime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(folder / "onnx", options, providers=providers)
        return lambda x: session.run(None, {"x": x})[0], 0  # unknown
    import topkast_torch
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    model = build(case).eval()
    if side == "dense PyTorch":
        model.load_state_dict(load_file(folder / "dense"))
    else:
        topkast_torch.load_sparse(model, folder / "sparse")

    def run(x: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    run(np.zeros((1, *CASES[case][0]), np.float32))  # layouts are made in the first call
    held = sum(param.nbytes for param in model.parameters())
    for module in model.modules():
        if isinstance(module, (topkast_torch.SparseLinear, topkast_torch.SparseConv2d)):
            held += module.indices.nbytes + module.products.nbytes
    return run, held


def serve(side: str, case: str, folder: Path, threads: int) -> None:
    """Answer each batch size on standard input with milliseconds per call."""
    run, held = make_side(side, case, folder, threads)
    print(held, flush=True)
    counts: dict[int, int] = {}
    for line in sys.stdin:
        batch = int(line)
        x = np.random.default_rng(0).standard_normal((batch, *CASES[case][0])).astype("float32")
        if batch not in counts:
            run(x)
            start = time.perf_counter()
            output = run(x)
            counts[batch] = max(1, round(TARGET_SECONDS / (time.perf_counter() - start)))
            np.save(folder / f"{side}.{batch}.npy", output)
        start = time.perf_counter()
        for _ in range(counts[batch]):
            run(x)
        print(1e3 * (time.perf_counter() - start) / counts[batch], flush=True)


def measure(case: str, fwd: float, threads: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of the table for one network and sparsity."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nbytes = write_models(case, fwd, folder)
        files = dict(zip(SIDES, ("dense", "onnx", "sparse", "sparse"), strict=True))
        sides = [side for side in SIDES if files[side] in nbytes]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--case", case, "--folder", name]
        command += ["--threads", str(threads), "--side"]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children: dict[str, Any] = {
            side: subprocess.Popen([*command, side], env=env, **pipes) for side in sides
        }
        held = {side: int(_answer(child)) for side, child in children.items()}
        rows = []
        for batch in CASES[case][1]:
            times: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(rounds + 1):
                for side, child in children.items():
                    ms = _ask(child, batch)
                    if number:  # the first round warms up
                        times[side].append(ms)
            expected = np.load(folder / f"{sides[0]}.{batch}.npy")
            for side in sides:
                output = np.load(folder / f"{side}.{batch}.npy")
                np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-4)
                ratios = [a / b for a, b in zip(times[sides[0]], times[side], strict=True)]
                rows.append(
                    {
                        "network": case,
                        "fwd": fwd,
                        "batch": batch,
                        "side": side,
                        "ms": statistics.median(times[side]),
                        "min_ms": min(times[side]),
                        "times_dense": statistics.median(ratios),
                        "file_bytes": nbytes[files[side]],
                        "held_bytes": held[side],
                    }
                )
        for child in children.values():
            child.stdin.close()
            child.wait(timeout=60)
    return rows


def _ask(child: Any, batch: int) -> float:
    child.stdin.write(f"{batch}\n")
    child.stdin.flush()
    return float(_answer(child))


def _answer(child: Any) -> str:
    line: str = child.stdout.readline()
    if not line:
        raise RuntimeError(f"a side ended with exit status {child.wait(timeout=60)}")
    return line


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    head = ("network", "fwd", "side", "file, MB", "held, MB", "batch: ms (times dense)")
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        sizes = (row["file_bytes"], row["held_bytes"])
        megabytes = (f"{size / 1e6:.2f}" if size else "" for size in sizes)
        key = row["network"], str(row["fwd"]), row["side"], *megabytes
        lines.setdefault(key, []).append(
            f"{row['batch']}: {row['ms']:.3g} ({row['times_dense']:.2f} ×)"
        )
    print(markdown_table(head, [(*key, ", ".join(cells)) for key, cells in lines.items()]))


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "inference")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.side is not None:
        serve(options.side, options.case, options.folder, options.threads)
        return
    cases = [options.only] if options.only else list(CASES)
    rows = [
        row
        for case in cases
        for fwd in SPARSITIES
        for row in measure(case, fwd, options.threads, options.rounds)
    ]
    print_tables(rows)
    packages = ("numpy", "torch", "numba", "onnxruntime")
    environment = describe_environment(options.threads, packages)
    write_json(options.output, {"environment": environment, "rows": rows})


if __name__ == "__main__":
    main()
