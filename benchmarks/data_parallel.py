"""Data parallel training over a slow network: bytes on the wire and time of a step.

Processes with one thread each train an MLP 784-h-h-h-10 with AdamW under DistributedDataParallel,
over a loopback whose rate is limited: dense, masked, masked with
:func:`topkast_torch.ddp_comm_hook`, the same in bfloat16, and with sparse layers. The sides are
timed in turn, in the same processes. "On the wire" is what the network device has sent in a step,
gloo's protocol and acknowledgements included, per process. The script starts itself again in a
network of its own, which needs Linux, `unshare`, `ip`, `tc` and the rights of root.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import topkast_torch
import torch
import torch.distributed as dist
from _harness import describe_environment, interleave, make_parser, markdown_table, write_json
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import topkast

PAIRS = [(0.9, 0.8), (0.95, 0.9), (0.98, 0.95)]
NEVER = 10**9


def mlp(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [784, width, width, width, 10]
    layers: list[nn.Module] = []
    for index in range(4):
        layers += [nn.Linear(sizes[index], sizes[index + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_side(
    kind: str, pair: tuple[float, float] | None, width: int, batch: int
) -> Callable[[], None]:
    model: nn.Module = mlp(width)
    if kind != "sparse":
        model = DistributedDataParallel(model)
    optimizer: Any = torch.optim.AdamW(model.named_parameters(), 1e-6, fused=True)
    if pair is not None:
        fwd, bwd = pair
        optimizer = topkast.wrap_optimizer(optimizer, fwd=fwd, bwd=bwd, refresh_every=NEVER)
    if kind == "sparse":
        topkast.sparsify(model, optimizer)
        model = DistributedDataParallel(model)
    elif kind.startswith("hook"):
        dtype = torch.bfloat16 if kind.endswith("bf16") else None
        assert isinstance(model, DistributedDataParallel)
        model.register_comm_hook(None, topkast_torch.ddp_comm_hook(optimizer, dtype=dtype))
    inputs, labels = torch.randn(batch, 784), torch.arange(batch) % 10

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return step


def bytes_sent() -> int:
    """Bytes that the loopback of this network has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "lo:" in line)
    return int(line.split(":")[1].split()[8])


def worker(rank: int, folder: str, options: Any) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", options.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.processes)
    kinds = {"masked": "masked", "hook": "masked, hook", "hook bf16": "masked, hook, bfloat16"}
    kinds["sparse"] = "sparse layers"
    sides = {"dense": make_side("dense", None, options.width, options.batch)}
    for pair in PAIRS:
        for kind, label in kinds.items():
            name = f"{pair[0]}/{pair[1]}, {label}"
            sides[name] = make_side(kind, pair, options.width, options.batch)
    wire: dict[str, float] = {}
    for name, step in sides.items():
        step()  # builds the buckets anew
        dist.barrier()
        before = bytes_sent()
        step()
        dist.barrier()
        wire[name] = (bytes_sent() - before) / options.processes
    timings = interleave(sides, rounds=options.rounds)
    if rank == 0:
        rows, records = [], []
        for name, timing in timings.items():
            megabytes = wire[name] / 1e6
            rows.append(
                [
                    name,
                    f"{megabytes:.1f}",
                    f"{wire[name] / wire['dense']:.2f}",
                    f"{timing.median:.0f}",
                    f"{timing.min:.0f}-{timing.max:.0f}",
                    f"{1 / timing.ratio:.2f}",
                ]
            )
            records.append({"side": name, "wire_bytes": wire[name], **vars(timing)})
        print(
            f"\nMLP of three hidden layers of {options.width}, {options.processes} processes with "
            f"a batch of {options.batch} each, {options.rate}\n"
        )
        head = ["fwd/bwd", "MB on the wire", "of dense", "ms a step", "min-max", "× dense"]
        print(markdown_table(head, rows), flush=True)
        settings = {
            name: getattr(options, name) for name in ("width", "batch", "processes", "rate")
        }
        environment = describe_environment(1, ("numpy", "torch", "numba"))
        write_json(options.output, {"environment": environment, **settings, "rows": records})
    dist.barrier()
    time.sleep(1)  # gloo's threads drop their callbacks, for which they need the GIL
    dist.destroy_process_group()


def main() -> None:
    parser = make_parser(__doc__, "data_parallel")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="of each process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rate", default="1gbit", help="of the loopback, in the words of tc")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if "TOPKAST_BENCHMARK_NETWORK" not in os.environ:
        limit = f"tc qdisc add dev lo root tbf rate {options.rate} burst 1mb latency 200ms"
        command = f'ip link set lo up && {limit} && exec "$0" "$@"'
        environment = {**os.environ, "TOPKAST_BENCHMARK_NETWORK": "1"}
        arguments = ["unshare", "-n", "sh", "-c", command, sys.executable, *sys.argv]
        sys.exit(subprocess.run(arguments, env=environment, check=False).returncode)
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, args=(folder, options), nprocs=options.processes)


if __name__ == "__main__":
    main()
