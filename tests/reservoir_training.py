"""A small training run with a reservoir of any kind: a module of its own, to be killed as well."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import topkast_torch
import torch
from torch import nn

import topkast

INPUTS = torch.randn(16, 40, generator=torch.Generator().manual_seed(7))


def build(
    reservoir: Any = "device",
    *,
    folder: Path | None = None,
    sparse: bool = False,
    seed: int = 0,
    optimizer: Any = lambda params: torch.optim.AdamW(params, lr=3e-3),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Any, Any]:
    """A model with generated weights, and its wrapped optimizer."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(40, 96), nn.Tanh(), nn.Linear(96, 110), nn.Tanh())
    model.append(nn.Linear(110, 4)).to(dtype)
    if dtype in (torch.float32, torch.float64):
        topkast_torch.generate_weights(model, seed=seed)
    inner = optimizer(model.named_parameters())
    settings: Any = {"fwd": 0.9, "bwd": 0.8, "refresh_every": 1, "dense": ["4.*"]} | options
    if reservoir == "disk":
        settings["reservoir_path"] = folder
    opt = topkast.wrap_optimizer(inner, reservoir=reservoir, **settings)
    if sparse:
        topkast.sparsify(model, opt)
    return model, opt


def train(model: nn.Module, opt: Any, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        dtype = next(model.parameters()).dtype
        model(INPUTS.to(dtype)).square().mean().backward()
        opt.step()


def save(path: Path, model: nn.Module, opt: Any) -> None:
    """Write a checkpoint in one piece."""
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, part)
    part.replace(path)


def kill_at(count: int, folder: Path) -> None:
    """Have the system kill this process when it touches its files for the `count`-th time."""
    touched = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event.startswith(("open", "os.")) and str(folder) in str(arguments):
            touched += 1
            if touched == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main() -> None:
    """Train until killed, with a checkpoint after each step; continue from the last one."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    kill_at(int(os.environ["KILLED_AT"]), folder)
    model, opt = build("disk", folder=folder / "weights", sparse=True, seed=int(os.environ["RUN"]))
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
    while True:
        train(model, opt, 1)
        save(checkpoint, model, opt)


if __name__ == "__main__":
    main()
