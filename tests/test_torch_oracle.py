"""Training programs, compared with Top-KAST on dense tensors, in masked and sparse execution."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense_sgd import DenseTopKAST
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import topkast

OPTIONS: dict[str, Any] = {"fwd": 0.8, "bwd": 0.6, "refresh_every": 3, "penalty": 1e-2}
STEPS = 20


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_network(seed: int, *sizes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def wrap(execution: str, model: nn.Module) -> Any:
    if execution == "oracle":
        return DenseTopKAST(model.named_parameters(), lr=0.05, momentum=0.9, **OPTIONS)
    inner = torch.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9)
    optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
    if execution == "sparse":
        topkast.sparsify(model, optimizer)
    return optimizer


def batches(width: int, seed: int = 5) -> Tensor:
    return torch.randn(STEPS, 8, width, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x[:, :3]).square().mean()
    return loss


def train_adversaries(execution: str, *, freeze: bool) -> list[Any]:
    """Two networks; one frozen while the other is trained, or with its gradient dropped."""
    generator, critic = make_network(0, 4, 16, 12), make_network(1, 12, 20, 2)
    optimizers = [wrap(execution, generator), wrap(execution, critic)]
    for x, noise in zip(batches(12), batches(4, seed=9), strict=True):
        critic.requires_grad_(True)
        optimizers[1].zero_grad()
        made = generator(noise).detach()
        (functional.softplus(-critic(x)) + functional.softplus(critic(made))).mean().backward()
        optimizers[1].step()
        critic.requires_grad_(not freeze)
        optimizers[0].zero_grad()
        functional.softplus(-critic(generator(noise))).mean().backward()
        optimizers[0].step()
    return optimizers


def train_critic_with_penalty(execution: str) -> list[Any]:
    """A penalty on the gradient by the input, as a second derivative."""
    critic = make_network(1, 12, 20, 2)
    optimizer = wrap(execution, critic)
    for x in batches(12):
        optimizer.zero_grad()
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(inputs).sum(), inputs, create_graph=True)
        (critic(x).mean() + (gradient.norm(dim=1) - 1).square().mean()).backward()
        optimizer.step()
    return [optimizer]


def train_with_layers_frozen_in_turn(execution: str) -> list[Any]:
    model = make_network(0, 12, 24, 16, 3)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    optimizer = wrap(execution, model)
    for number, x in enumerate(batches(12)):
        layers[0].requires_grad_(number % 7 < 4)
        layers[1].requires_grad_(number % 5 != 2)
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    return [optimizer]


def train_with_accumulation_and_clipping(execution: str) -> list[Any]:
    model = make_network(0, 12, 24, 16, 3)
    optimizer = wrap(execution, model)
    for number, x in enumerate(batches(12)):
        loss_of(model, x).backward()
        if execution == "oracle":
            optimizer.restrict_gradients()
        if number % 4 == 3:
            if number % 8 == 3:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return [optimizer]


def train_with_changing_options(execution: str) -> list[Any]:
    model = make_network(0, 12, 24, 16, 3)
    optimizer = wrap(execution, model)
    changes: dict[int, dict[str, Any]] = {
        5: {"lr": 0.01, "weight_decay": 0.1},
        9: {"refresh_every": 2, "penalty": 0.2},
        14: {"momentum": 0.5, "nesterov": True},
    }
    for number, x in enumerate(batches(12)):
        optimizer.param_groups[0].update(changes.get(number, {}))
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    return [optimizer]


def train_with_a_layer_added_later(execution: str) -> list[Any]:
    model, head = make_network(0, 12, 24, 3), make_network(3, 3, 9, 3)
    optimizer = wrap(execution, model)
    for number, x in enumerate(batches(12)):
        if number == 10:
            named = list(head.named_parameters("head"))
            group = {"params": named, "lr": 0.02, "penalty": 0.1, "refresh_every": 2}
            optimizer.add_param_group(group)
            if execution == "sparse":
                topkast.sparsify(head, optimizer)
        whole = model if number < 10 else nn.Sequential(model, head)
        optimizer.zero_grad()
        loss_of(whole, x).backward()
        optimizer.step()
    return [optimizer]


def train_with_tied_layers(execution: str) -> list[Any]:
    """An embedding that is the last layer too, and a layer that is used twice."""
    torch.manual_seed(0)
    embedding, layer = nn.Embedding(20, 12), nn.Linear(12, 12)
    model = nn.ModuleDict({"embedding": embedding, "layer": layer})
    optimizer = wrap(execution, model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        tokens = torch.randint(20, (8,), generator=generator)
        optimizer.zero_grad()
        hidden = torch.tanh(layer(layer(embedding(tokens))))
        functional.cross_entropy(hidden @ embedding.weight.T, tokens).backward()
        optimizer.step()
    return [optimizer]


def train_with_recomputation(execution: str) -> list[Any]:
    model = make_network(0, 12, 24, 16, 3)
    optimizer = wrap(execution, model)

    def evaluate(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        output: Any = checkpoint(model, x, use_reentrant=False)
        loss: Tensor = (output - x[:, :3]).square().mean()
        loss.backward()
        return loss

    for x in batches(12):
        optimizer.step(lambda x=x: evaluate(x))
    return [optimizer]


def train_in_the_backward_pass(execution: str) -> list[Any]:
    """An optimizer for each layer, which steps as soon as its gradients are there."""
    model = make_network(0, 12, 24, 16, 3)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    optimizers = [wrap(execution, layer) for layer in layers]
    for layer, optimizer in zip(layers, optimizers, strict=True):

        def step(_: Tensor, layer: nn.Module = layer, optimizer: Any = optimizer) -> None:
            if all(param.grad is not None for param in layer.parameters()):
                optimizer.step()
                optimizer.zero_grad()

        for param in layer.parameters():
            param.register_post_accumulate_grad_hook(step)
    for x in batches(12):
        loss_of(model, x).backward()
    return optimizers


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize(
    "program",
    [
        lambda execution: train_adversaries(execution, freeze=True),
        lambda execution: train_adversaries(execution, freeze=False),
        train_critic_with_penalty,
        train_with_layers_frozen_in_turn,
        train_with_accumulation_and_clipping,
        train_with_changing_options,
        train_with_a_layer_added_later,
        train_with_tied_layers,
        train_with_recomputation,
        train_in_the_backward_pass,
    ],
    ids=[
        "adversaries, frozen",
        "adversaries, dropped",
        "gradient penalty",
        "freezing",
        "accumulation, clipping",
        "options",
        "group",
        "ties",
        "recomputation",
        "in backward",
    ],
)
def test_programs_train_as_the_oracle(program: Callable[[str], list[Any]], execution: str) -> None:
    trained = [tensor for optimizer in program("oracle") for tensor in optimizer.thetas()]
    thetas = [
        theta
        for optimizer in program(execution)
        for theta in topkast.dense_params(optimizer).values()
    ]
    for one, other in zip(trained, thetas, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
