"""Every optimizer of torch.optim, schedulefree, prodigyopt and pytorch_optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_optimizer
import torch
from ecosystem.catalogue import (
    NO_OPTIMIZERS,
    NOT_BUILT,
    REFUSED,
    STARTS,
    WRAPPED,
    Build,
    every_class,
)
from optimizer_runs import (
    DENSE,
    OPTIONS,
    assert_same_bits,
    backward,
    entries_by_index,
    make_model,
    save_and_load,
    train,
)
from torch import nn

import topkast
from topkast.testing import assert_forward_view

pytestmark = pytest.mark.filterwarnings("ignore")  # of the optimizers, which warn of themselves


# It moves by signs, for which the factors do not matter that it keeps for the rows of a matrix.
FACTORED = {"pytorch_optimizer.EmoFact"}


@pytest.fixture(params=WRAPPED)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def prepare(name: str, options: dict[str, Any] | None) -> tuple[nn.Sequential, Any]:
    """A model and its optimizer, unwrapped without options; in training mode, if it has modes."""
    model = make_model()
    optimizer: Any = WRAPPED[name](model)
    if options is not None:
        optimizer = topkast.wrap_optimizer(optimizer, **options)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return model, optimizer


def test_no_optimizer_is_left_out() -> None:
    listed = [*WRAPPED, *REFUSED, *NO_OPTIMIZERS, *NOT_BUILT]
    assert sorted(listed) == sorted(every_class())
    assert len(WRAPPED) >= 96


def test_without_sparsity_it_is_the_unwrapped_optimizer(name: str) -> None:
    (plain_model, plain), (model, wrapped) = prepare(name, None), prepare(name, DENSE)
    start = copy.deepcopy(model.state_dict())
    for step in range(12):
        train(plain_model, plain, range(step, step + 1))
        train(model, wrapped, range(step, step + 1))
        assert_same_bits(plain_model.state_dict(), model.state_dict(), f"step {step}")
    assert not torch.equal(start["0.weight"], model.state_dict()["0.weight"])
    if name in FACTORED:
        return
    for one, other in zip(plain_model.parameters(), model.parameters(), strict=True):
        assert_same_bits(dict(plain.state).get(one, {}), dict(wrapped.state).get(other, {}))
    for one, other in zip(plain.param_groups, wrapped.param_groups, strict=True):
        own = {key: value for key, value in one.items() if key != "params"}
        assert_same_bits(own, {key: other[key] for key in own})


def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    model, optimizer = prepare(name, OPTIONS)
    train(model, optimizer, range(5))
    saved_model = save_and_load(model.state_dict())
    saved = save_and_load(optimizer.state_dict())
    train(model, optimizer, range(5, 11))
    other_model, other = prepare(name, OPTIONS)
    train(other_model, other, range(50, 53))  # what is there is replaced
    other_model.load_state_dict(saved_model)
    other.load_state_dict(saved)
    train(other_model, other, range(5, 11))
    assert_same_bits(topkast.dense_params(optimizer), topkast.dense_params(other))
    assert_same_bits(model.state_dict(), other_model.state_dict())
    assert_same_bits(optimizer.state_dict(), other.state_dict())


def test_survivors_keep_their_entries_and_entrants_start_anew(name: str) -> None:
    """Between two copies of a run, of which one refreshes."""
    model, optimizer = prepare(name, OPTIONS | {"refresh_every": 1000, "explore": "random"})
    train(model, optimizer, range(8))
    other_model, other = copy.deepcopy((model, optimizer))
    for group in other.param_groups:
        group["refresh_every"] = 9
    train(model, optimizer, range(8, 9))
    train(other_model, other, range(8, 9))
    entered = 0
    for one, two in zip(
        optimizer._wrapper_state.executions, other._wrapper_state.executions, strict=True
    ):
        before, after = entries_by_index(optimizer, one), entries_by_index(other, two)
        assert before.keys() == after.keys()
        theta = two.theta()
        entered += len({*two.support.indices.tolist()} - {*one.support.indices.tolist()})
        for entry, columns in after.items():
            start = STARTS.get(name, {}).get(entry[0][1], 0.0)
            for index, column in columns.items():
                if index in before[entry]:
                    assert torch.equal(column, before[entry][index]), entry
                else:
                    fresh = theta[index] if start is None else torch.tensor(start)
                    assert torch.equal(column, fresh.to(column).expand_as(column)), entry
    assert entered > 0


def test_starts_are_of_entries_that_there_are() -> None:
    for name, starts in STARTS.items():
        model, optimizer = prepare(name, OPTIONS)
        train(model, optimizer, range(2))
        assert starts.keys() <= optimizer.state[model[0].weight].keys(), name


@pytest.mark.parametrize("name", [name for name in WRAPPED if "ScheduleFree" in name])
def test_averages_are_shown_saved_and_trained_on(name: str) -> None:
    """`eval` shows the average, which is the result of schedule-free training."""
    model, optimizer = prepare(name, OPTIONS)
    train(model, optimizer, range(7))
    training = copy.deepcopy(model.state_dict())
    optimizer.eval()
    for (key, masks), layer in zip(
        topkast.masks(optimizer).items(), (model[0], model[2]), strict=True
    ):
        theta = topkast.dense_params(optimizer)[key]
        assert_forward_view(theta, layer.weight, masks.forward)
    assert not torch.equal(model.state_dict()["0.weight"], training["0.weight"])
    saved_model = save_and_load(model.state_dict())
    saved = save_and_load(optimizer.state_dict())
    other_model, other = prepare(name, OPTIONS)
    other_model.load_state_dict(saved_model)
    other.load_state_dict(saved)
    optimizer.train()
    for key, tensor in training.items():
        torch.testing.assert_close(model.state_dict()[key], tensor)
    other.eval()
    other.train()
    for one, two in ((model, optimizer), (other_model, other)):
        train(one, two, range(7, 12))
    assert_same_bits(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name_before_anything_is_trained(name: str) -> None:
    build, reason = REFUSED[name]
    model = make_model()
    inner = build(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        topkast.UnsupportedOptimizerError, match=rf"^{name.rpartition('.')[2]}\b.*{reason}"
    ):
        topkast.wrap_optimizer(inner, **OPTIONS)
    assert_same_bits(before, model.state_dict())
    backward(model, 0)
    grad = model.get_parameter("0.weight").grad
    # LOMO drops gradients as it steps in the backward pass.
    assert grad is None or int(torch.count_nonzero(grad)) == 192


@pytest.mark.parametrize("name", NO_OPTIMIZERS)
def test_what_is_no_optimizer_to_pytorch_has_no_adapter(name: str) -> None:
    wrapper = NO_OPTIMIZERS[name](make_model())
    with pytest.raises(topkast.AdapterNotFoundError, match=name.rpartition(".")[2]):
        topkast.wrap_optimizer(wrapper, **OPTIONS)


@pytest.mark.parametrize("kind", ["APOLLO", "Conda", "Fira", "GaLore"])
def test_options_that_a_group_alone_has_are_tried_too(kind: str) -> None:
    """With a rank these project gradients, which uses rows and columns."""
    group = {
        "params": list(make_model().parameters()),
        "rank": 2,
        "update_proj_gap": 2,
        "scale": 1.0,
        "projection_type": "std",
    }
    inner = getattr(pytorch_optimizer, kind)([group])
    with pytest.raises(topkast.UnsupportedOptimizerError, match=f"{kind} does not treat"):
        topkast.wrap_optimizer(inner, **OPTIONS)


@pytest.mark.parametrize("kind", ["AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon"])
def test_without_matrices_muon_is_elementwise(kind: str) -> None:
    def build(model: nn.Module) -> Any:
        groups = [{"params": list(model.parameters()), "use_muon": False}]
        return getattr(pytorch_optimizer, kind)(groups)

    models = make_model(), make_model()
    plain = build(models[0])
    wrapped = topkast.wrap_optimizer(build(models[1]), **DENSE)
    for model, optimizer in zip(models, (plain, wrapped), strict=True):
        train(model, optimizer, range(7))
    assert_same_bits(models[0].state_dict(), models[1].state_dict())


def test_counters_in_groups_start_anew_in_trials() -> None:
    """While what the user has written there is kept: an optimizer that has stepped is wrapped."""
    build: Build = WRAPPED["pytorch_optimizer.AdaBelief"]
    model = make_model()
    inner = build(model)
    train(model, inner, range(3))
    assert inner.param_groups[0]["step"] == 3
    optimizer = topkast.wrap_optimizer(inner, **DENSE)
    plain_model = make_model()
    plain = build(plain_model)
    train(plain_model, plain, range(8))
    train(model, optimizer, range(3, 8))
    assert_same_bits(plain_model.state_dict(), model.state_dict())
