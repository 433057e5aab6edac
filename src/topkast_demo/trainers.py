"""Dispatch to the trainer of a framework."""

from __future__ import annotations

from topkast_demo.trainer import Trainer


def find_trainer(framework: str) -> type[Trainer]:
    """Find the trainer of a framework; only this function imports it."""
    if framework == "jax":
        from topkast_demo.jax_trainer import JaxTrainer

        return JaxTrainer
    from topkast_demo.torch_trainer import TorchTrainer

    return TorchTrainer
