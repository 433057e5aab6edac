"""Saving, loading and copying: runs resume bit for bit, and invalid state dicts are refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import star
from torch import Tensor, nn

import topkast

BUILD: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.named_parameters(), 0.02, weight_decay=0.1),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "Rprop": lambda model: torch.optim.Rprop(model.parameters(), 0.01),
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"distribution": "global"},
    {"distribution": "erk", "explore": "random"},
    {"explore_until": 5},
]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def make(
    build: str = "AdamW", model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, Any]:
    model = make_model() if model is None else model
    defaults = {"fwd": 0.9, "bwd": 0.7, "refresh_every": 3, "penalty": 0.1}
    return model, topkast.wrap_optimizer(BUILD[build](model), **defaults | options)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 12, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()


def save(state: Any) -> Any:
    """Save to a file and load without running code from it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def full_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The complete state of a run, as a flat dictionary of tensors and numbers."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(f"{prefix}/{key}", entry)
        elif isinstance(value, (list, tuple)):
            for number, entry in enumerate(value):
                walk(f"{prefix}/{number}", entry)
        else:
            flat[prefix] = value.clone() if isinstance(value, Tensor) else value

    walk("optimizer", optimizer.state_dict())
    walk("model", model.state_dict())
    return flat


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        other = second[key]
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype, key
            assert torch.equal(value, other), key
        else:
            assert value == other, key


@pytest.mark.parametrize(("build", "variant"), star(list(BUILD), VARIANTS))
def test_resumed_run_equals_the_uninterrupted_one(build: str, variant: dict[str, Any]) -> None:
    model, optimizer = make(build, **variant)
    train(model, optimizer, range(10))
    other_model, other = make(build, **variant)
    train(other_model, other, range(5))  # the next update refreshes
    saved_model, saved = save(other_model.state_dict()), save(other.state_dict())
    fresh_model, fresh = make(build, **variant)
    fresh_model.load_state_dict(saved_model)
    fresh.load_state_dict(saved)
    train(fresh_model, fresh, range(5, 10))
    assert_equal(full_state(model, optimizer), full_state(fresh_model, fresh))


def test_order_of_loading_does_not_matter() -> None:
    model, optimizer = make()
    train(model, optimizer, range(5))
    saved_model, saved = save(model.state_dict()), save(optimizer.state_dict())
    train(model, optimizer, range(5, 9))
    fresh_model, fresh = make()
    fresh.load_state_dict(saved)
    fresh_model.load_state_dict(saved_model)
    train(fresh_model, fresh, range(5, 9))
    assert_equal(full_state(model, optimizer), full_state(fresh_model, fresh))


def test_loading_restores_the_forward_view_without_the_model() -> None:
    model, optimizer = make()
    train(model, optimizer, range(5))
    fresh_model, fresh = make()
    fresh.load_state_dict(save(optimizer.state_dict()))
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            assert torch.equal(tensor, fresh_model.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_indices_and_counters_survive_in_every_precision(dtype: torch.dtype) -> None:
    # PyTorch casts state to the dtype of the parameter: 257 becomes 256 in bfloat16.
    model = nn.Linear(40, 20, bias=False, dtype=dtype)
    optimizer = topkast.wrap_optimizer(
        torch.optim.SGD(model.parameters(), 0.1), fwd=0.5, bwd=0.25, refresh_every=10**6
    )
    for _ in range(257):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    other_model = nn.Linear(40, 20, bias=False, dtype=dtype)
    other = topkast.wrap_optimizer(
        torch.optim.SGD(other_model.parameters(), 0.1), fwd=0.5, bwd=0.25, refresh_every=10**6
    )
    other.load_state_dict(save(optimizer.state_dict()))
    assert_equal(full_state(model, optimizer), full_state(other_model, other))
    assert other.state_dict()["param_groups"][0]["topkast"]["updates"] == 257


def test_loaded_state_is_not_shared() -> None:
    model, optimizer = make()
    train(model, optimizer, range(4))
    fresh_model, fresh = make()
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    train(fresh_model, fresh, range(4, 8))
    train(model, optimizer, range(4, 8))
    assert_equal(full_state(model, optimizer), full_state(fresh_model, fresh))


def test_scheduler_reaches_the_inner_optimizer_after_loading() -> None:
    model, optimizer = make("SGD")
    train(model, optimizer, range(3))
    saved = save(optimizer.state_dict())
    model, optimizer = make("SGD")
    optimizer.load_state_dict(saved)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    train(model, optimizer, range(3, 4))
    scheduler.step()
    before = topkast.dense_params(optimizer)
    train(model, optimizer, range(4, 5))
    for name, tensor in topkast.dense_params(optimizer).items():
        assert torch.equal(before[name], tensor)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copy_trains_alike_and_independently(way: str) -> None:
    model, optimizer = make()
    train(model, optimizer, range(4))
    duplicate: Any = (
        copy.deepcopy if way == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
    )
    other_model, other = duplicate((model, optimizer))
    before = full_state(model, optimizer)
    train(other_model, other, range(4, 8))
    assert_equal(before, full_state(model, optimizer))
    train(model, optimizer, range(4, 8))
    assert_equal(full_state(model, optimizer), full_state(other_model, other))
    # The copy restricts its own gradients.
    grad = next(other_model.parameters()).grad
    assert grad is not None
    assert torch.count_nonzero(grad) <= 58


def test_state_dict_loads_with_weights_only() -> None:
    model, optimizer = make(dense=lambda name, tensor: name == "2.weight")
    train(model, optimizer, range(4))
    save(optimizer.state_dict())


Mutation = Callable[[dict[str, Any]], None]


def _sets(state: dict[str, Any]) -> dict[str, Any]:
    sets: dict[str, Any] = state["state"][0]["topkast"]
    return sets


def _header(state: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, Any] = state["param_groups"][0]["topkast"]
    return counts


def _change_sets_entry(key: str, change: Callable[[Any], Any]) -> Mutation:
    def mutate(state: dict[str, Any]) -> None:
        _sets(state)[key] = change(_sets(state)[key])

    return mutate


def _swap_first_two(indices: Tensor) -> Tensor:
    return indices[torch.cat([torch.tensor([1, 0]), torch.arange(2, len(indices))])]


def _change_entry(key: str, change: Callable[[Tensor], Any]) -> Mutation:
    def mutate(state: dict[str, Any]) -> None:
        state["state"][0][key] = change(state["state"][0][key])

    return mutate


def _drop(*path: Any) -> Mutation:
    def mutate(state: Any) -> None:
        for step in path[:-1]:
            state = state[step]
        del state[path[-1]]

    return mutate


def _set_option(key: str, value: Any) -> Mutation:
    def mutate(state: dict[str, Any]) -> None:
        state["param_groups"][0][key] = value

    return mutate


def _change_updates(change: Callable[[Any], Any]) -> Mutation:
    def mutate(state: dict[str, Any]) -> None:
        _header(state)["updates"] = change(_header(state)["updates"])

    return mutate


def _make_non_finite(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


MUTATIONS: dict[str, Mutation] = {
    "no topkast": _drop("param_groups", 0, "topkast"),
    "no state": _drop("state"),
    "no groups": _drop("param_groups"),
    "no version": _drop("param_groups", 0, "topkast", "version"),
    "no updates": _drop("param_groups", 0, "topkast", "updates"),
    "no sets": _drop("state", 0, "topkast"),
    "a tensor too few": _drop("state", 2),
    "no indices": _drop("state", 0, "topkast", "indices"),
    "no count": _drop("state", 2, "topkast", "active_count"),
    "no weights": _drop("state", 0, "topkast", "params"),
    "no ages": _drop("state", 0, "topkast", "ages"),
    "no moment": _drop("state", 0, "exp_avg"),
    "no option": _drop("param_groups", 0, "fwd"),
    "no parameters": _drop("param_groups", 0, "params"),
    "later version": lambda state: _header(state).update(version=99),
    "other attributes": lambda state: _header(state).update(attributes={"unknown": 1}),
    "negative updates": _change_updates(lambda updates: -updates),
    "broken updates": _change_updates(float),
    "index too large": _change_sets_entry(
        "indices", lambda i: torch.cat([i[:-1], torch.tensor([10**6])])
    ),
    "negative index": _change_sets_entry(
        "indices", lambda i: torch.cat([torch.tensor([-1]), i[1:]])
    ),
    "duplicate index": _change_sets_entry("indices", lambda i: torch.cat([i[:1], i[:1], i[2:]])),
    "unsorted indices": _change_sets_entry("indices", _swap_first_two),
    "float indices": _change_sets_entry("indices", lambda i: i.float()),
    "indices as list": _change_sets_entry("indices", lambda i: i.tolist()),
    "wrong |B|": _change_sets_entry("indices", lambda i: i[:-1]),
    "wrong |A|": _change_sets_entry("active_count", lambda count: count - 1),
    "wide indices": _change_sets_entry("indices", lambda i: i.long()),
    "ages as floats": _change_sets_entry("ages", lambda ages: ages.float()),
    "short ages": _change_sets_entry("ages", lambda ages: ages[1:]),
    "negative steps": _change_sets_entry("steps", lambda steps: -1),
    "broken change": _change_sets_entry("entered_active", float),
    "wrong shape": _change_sets_entry("params", lambda weights: weights.T),
    "wrong dtype": _change_sets_entry("params", lambda weights: weights.double()),
    "not finite": _change_sets_entry("params", _make_non_finite),
    "short moment": _change_entry("exp_avg", lambda moment: moment[..., :-1]),
    "dense moment": _change_entry("exp_avg_sq", lambda moment: torch.zeros(16, 12)),
    "moment is no tensor": _change_entry("exp_avg", lambda moment: 3.0),
    "bwd above fwd": _set_option("bwd", 0.95),
    "parameters too few": _set_option("params", [0]),
    "refresh never": _set_option("refresh_every", 0),
}


@settings(max_examples=settings().max_examples // 2)
@given(names=st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=1, max_size=2, unique=True))
def test_corrupt_state_is_refused_and_changes_nothing(names: list[str]) -> None:
    model, optimizer = make()
    train(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(4, 7))
    before = full_state(model, optimizer)
    for name in names:
        try:
            MUTATIONS[name](state)
        except (
            KeyError,
            IndexError,
            AttributeError,
            TypeError,
        ):  # the other mutation removed the entry
            continue
    with pytest.raises(topkast.StateDictError):
        optimizer.load_state_dict(state)
    assert_equal(before, full_state(model, optimizer))
    train(model, optimizer, range(7, 9))


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_corruption_is_refused(name: str) -> None:
    model, optimizer = make()
    train(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    MUTATIONS[name](state)
    with pytest.raises(topkast.StateDictError):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [{"fwd": 0.8}, {"bwd": 0.5}, {"distribution": "global"}, {"dense": "2.*"}],
    ids=str,
)
def test_state_of_other_sparsities_is_refused(options: dict[str, Any]) -> None:
    model, optimizer = make(**options)
    train(model, optimizer, range(4))
    other_model, other = make()
    before = full_state(other_model, other)
    with pytest.raises(topkast.StateDictError):
        other.load_state_dict(optimizer.state_dict())
    assert_equal(before, full_state(other_model, other))


def test_state_of_an_unwrapped_optimizer_is_refused() -> None:
    plain = BUILD["AdamW"](make_model())
    _, optimizer = make()
    with pytest.raises(topkast.StateDictError, match="not wrapped"):
        optimizer.load_state_dict(plain.state_dict())


def test_state_dict_hooks_fire_once_and_in_order() -> None:
    _, optimizer = make()
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(
        lambda opt, state: calls.append("after saving" if "state" in state else "too early")
    )
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", "after saving", "before loading", "after loading"]
