"""Bytes that each process holds of an MLP with sparse layers, sharded by FSDP2.

An MLP 784-h-h-h-10 whose hidden layers are built as :class:`topkast_torch.SparseLinear` is sharded
layer by layer over processes on this machine, and takes two steps of AdamW with a refresh after
each. The table has what the process that holds most holds after them, by what it is for.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import topkast_torch
import torch
import torch.distributed as dist
from _harness import describe_environment, make_parser, markdown_table, write_json
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

import topkast

PARTS = ["values", "gradient", "state", "ages", "reservoir", "indices", "layouts"]


def train(
    rank: int, count: int, folder: str, width: int, batch: int, pair: tuple[float, float]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = FileStore(f"{folder}/store_{count}", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    mesh, (fwd, bwd) = init_device_mesh("cpu", (count,)), pair
    sizes = [784, width, width, width, 10]
    layers: list[nn.Module] = []
    for index in range(4):
        layer = topkast_torch.SparseLinear(
            sizes[index], sizes[index + 1], fwd=fwd, bwd=bwd, reservoir="seeded", seed=index
        )
        layers += [topkast_torch.fully_shard(layer, mesh=mesh), nn.ReLU()]
    model: Any = topkast_torch.fully_shard(nn.Sequential(*layers[:-1]), mesh=mesh)
    optimizer: Any = torch.optim.AdamW(model.named_parameters(), 1e-4)
    optimizer = topkast.wrap_optimizer(optimizer, fwd=fwd, bwd=bwd)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(batch, 784)).square().mean().backward()
        optimizer.step()
    held = topkast.summary(optimizer).held_parts
    torch.save({name: held[name] for name in PARTS}, f"{folder}/{count}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = make_parser(__doc__, "fully_sharded")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--fwd", type=float, default=0.9)
    parser.add_argument("--bwd", type=float, default=0.8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.processes:
            pair = arguments.fwd, arguments.bwd
            options = count, folder, arguments.width, arguments.batch, pair
            spawn(train, args=options, nprocs=count)
            processes = [torch.load(path) for path in Path(folder).glob(f"{count}_*.pt")]
            most = max(processes, key=lambda held: sum(held.values()))
            results.append({"processes": count} | most | {"all": sum(most.values())})
    rows = [
        [str(result["processes"]), *(f"{result[name] / 1e6:.1f}" for name in (*PARTS, "all"))]
        for result in results
    ]
    print(f"MLP 784-h-h-h-10 with h = {arguments.width}, {arguments.fwd}/{arguments.bwd}, in MB:\n")
    print(markdown_table(["processes", *PARTS, "all"], rows))
    environment = describe_environment(1)
    write_json(arguments.output, {"environment": environment, "bytes": results})


if __name__ == "__main__":
    main()
