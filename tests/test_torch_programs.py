"""Programs of other people: what they do with gradients, weights and state between steps."""

from __future__ import annotations

import collections
import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import topkast_torch
import torch
from torch import Tensor, nn

import topkast

OPTIONS: dict[str, Any] = {"fwd": 0.8, "bwd": 0.6, "refresh_every": 3, "penalty": 1e-2}
GROWING: dict[str, Any] = {"method": topkast.methods.RigL(), "bwd": 0.8, "penalty": 0.0}


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def make(
    sparse: bool, optimizer: str = "SGD", model: Any = None, **options: Any
) -> tuple[Any, Any]:
    model = make_model() if model is None else model
    inner = getattr(torch.optim, optimizer)(model.named_parameters(), lr=0.05)
    wrapped = topkast.wrap_optimizer(inner, **OPTIONS | options)
    if sparse:
        topkast.sparsify(model, wrapped)
    return model, wrapped


def batch(number: int) -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, number: int) -> Tensor:
    x = batch(number)
    loss: Tensor = (model(x) - x[:, :3]).square().mean()
    return loss


def train(model: nn.Module, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()


def assert_same_weights(one: Any, other: Any) -> None:
    thetas = topkast.dense_params(one), topkast.dense_params(other)
    for first, second in zip(*(theta.values() for theta in thetas), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("sparse", [False, True])
class TestGradientsWithGraph:
    """``backward(create_graph=True)``, whose ``p.grad`` is differentiated again."""

    @pytest.mark.parametrize("explore_until", [None, 0])
    def test_a_penalty_on_gradients(self, sparse: bool, explore_until: int | None) -> None:
        """It is that of the gradient on B, on A once B∖A rests, by hand from whole gradients."""
        options: dict[str, Any] = {"penalty": 0.0, "explore_until": explore_until}
        model, optimizer = make(sparse, **options)
        twin, twin_optimizer = make(False, **options)
        for number in range(7):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a reference cycle, which zero_grad ends
                loss_of(model, number).backward(create_graph=True)
            sum(param.grad.square().sum() for param in model.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()

            names = [name for name, _ in twin.named_parameters()]
            params = [param for _, param in twin.named_parameters()]
            whole = torch.autograd.grad(loss_of(twin, number), params, create_graph=True)
            masks = topkast.masks(twin_optimizer)
            on_b = []
            for name, gradient in zip(names, whole, strict=True):
                if name in masks:
                    mask = masks[name].backward if explore_until is None else masks[name].forward
                    gradient = gradient * mask
                on_b.append(gradient)
            penalty = torch.stack([gradient.square().sum() for gradient in on_b]).sum()
            for param, first, second in zip(
                params, on_b, torch.autograd.grad(penalty, params), strict=True
            ):
                param.grad = first.detach() + second
            twin_optimizer.step()
        assert_same_weights(optimizer, twin_optimizer)

    def test_sparsify_with_such_a_gradient(self, sparse: bool) -> None:
        model, optimizer = make(sparse)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss_of(model, 0).backward(create_graph=True)
        topkast.sparsify(model, optimizer)
        optimizer.step()
        twin, twin_optimizer = make(False)
        train(twin, twin_optimizer, range(1))
        assert_same_weights(optimizer, twin_optimizer)
        optimizer.zero_grad()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "reset",
    [
        lambda optimizer: setattr(optimizer, "state", collections.defaultdict(dict)),
        lambda optimizer: optimizer.state.clear(),
        lambda optimizer: [optimizer.state.pop(p) for p in list(optimizer.state)],
        lambda optimizer: [entries.clear() for entries in optimizer.state.values()],
    ],
    ids=["assigned", "cleared", "popped", "emptied"],
)
def test_deleted_state_starts_as_a_new_optimizer(sparse: bool, reset: Callable[[Any], Any]) -> None:
    """As reinforcement learning does it: no entry is young any more, and steps count from zero."""
    model, optimizer = make(sparse, "Adam")
    train(model, optimizer, range(12))
    twin = make_model()
    state = topkast.densify(copy.deepcopy(model.state_dict()))
    twin.load_state_dict(state | topkast.dense_params(optimizer))
    twin, twin_optimizer = make(sparse, "Adam", twin)
    for key, masks in topkast.masks(optimizer).items():
        assert torch.equal(masks.backward, topkast.masks(twin_optimizer)[key].backward)
    reset(optimizer)
    for number in range(12, 20):
        for trained in ((model, optimizer), (twin, twin_optimizer)):
            train(*trained, range(number, number + 1))
        assert_same_weights(optimizer, twin_optimizer)


@pytest.mark.parametrize("sparse", [False, True])
class TestSwappedParameters:
    def swap(self, layer: nn.Module, name: str) -> nn.Parameter:
        kept: nn.Parameter = getattr(layer, name)
        setattr(layer, name, nn.Parameter(2 * kept.detach()))
        return kept

    def test_one_that_came_back_is_trained(self, sparse: bool) -> None:
        """As to look at the loss of other weights."""
        model, optimizer = make(sparse)
        twin, twin_optimizer = make(sparse)
        name = "values" if sparse else "weight"
        for number in range(4):
            kept = self.swap(model[0], name)
            loss_of(model, number)
            setattr(model[0], name, kept)
            train(model, optimizer, range(number, number + 1))
        train(twin, twin_optimizer, range(4))
        assert_same_weights(optimizer, twin_optimizer)

    def test_one_of_several_that_came_back_is_not_enough(self, sparse: bool) -> None:
        model, optimizer = make(sparse)
        name = "values" if sparse else "weight"
        kept = [self.swap(model[index], name) for index in (0, 2)]
        setattr(model[0], name, kept[0])
        loss_of(model, 0).backward()
        with pytest.raises(topkast.MismatchError, match=r"2\.weight"):
            optimizer.step()
        setattr(model[2], name, kept[1])
        train(model, optimizer, range(1))

    def test_one_that_another_module_got_is_still_replaced(self, sparse: bool) -> None:
        """As by a list of Parameters for an average or for gradient clipping."""
        model, optimizer = make(sparse)
        kept = self.swap(model[0], "values" if sparse else "weight")
        nn.ParameterList([kept])
        loss_of(model, 0).backward()
        with pytest.raises(topkast.MismatchError, match="another"):
            optimizer.step()


def test_a_tied_weight_has_to_come_back_to_all_modules() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12) for _ in range(2)]
    kept = layers[1].weight = layers[0].weight
    model, optimizer = make(False, model=nn.Sequential(*layers))
    for layer in layers:
        layer.weight = nn.Parameter(2 * kept.detach())
    for layer in layers:
        kept.grad = torch.ones_like(kept)
        with pytest.raises(topkast.MismatchError, match=r"0\.weight is another Parameter"):
            optimizer.step()
        layer.weight = kept
    model(batch(0)).square().mean().backward()
    optimizer.step()


class TestWritesWithoutTrace:
    """Those by ``param.data``, which PyTorch does not count."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.cfloat])
    @pytest.mark.parametrize("distribution", ["uniform", "global"])
    def test_dense_weights_are_refused_at_the_first_step(
        self, dtype: torch.dtype, distribution: Any
    ) -> None:
        weights = [nn.Parameter(torch.randn(6, 5, 3, 2).to(dtype)) for _ in range(2)]
        weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
        inner = torch.optim.SGD([("one", weights[0]), ("other", weights[1])], lr=0.1)
        optimizer = topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.6, distribution=distribution)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        weights[1].data.normal_()
        with pytest.raises(topkast.MismatchError, match="other has nonzero weights outside"):
            optimizer.step()
        with torch.no_grad():
            optimizer.load_state_dict(optimizer.state_dict())  # writes the forward view
        optimizer.step()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("number", [1.0, -2.0, 0.5])
    def test_equal_weights_are_refused(self, dtype: torch.dtype, number: float) -> None:
        """The sum of their bits is that of zeros."""
        weight = nn.Parameter(torch.randn(64, 64).to(dtype))
        optimizer = topkast.wrap_optimizer(torch.optim.SGD([weight], lr=0.1), fwd=0.75, bwd=0.5)
        weight.grad = torch.ones_like(weight)
        weight.data.fill_(number)
        with pytest.raises(topkast.MismatchError, match="has nonzero weights outside"):
            optimizer.step()

    @pytest.mark.parametrize("view", ["conjugate", "negative"])
    def test_views_whose_bits_are_others_are_trained(self, view: str) -> None:
        """PyTorch marks them, and reads their memory as what it is not."""
        weights = torch.randn(8, 6, dtype=torch.complex128)
        lazy = weights.conj() if view == "conjugate" else torch._neg_view(weights)
        runs = []
        for start in (lazy, lazy.clone().resolve_conj().resolve_neg()):
            weight = nn.Parameter(start)
            inner = torch.optim.SGD([("w", weight)], lr=0.1, momentum=0.9)
            optimizer = topkast.wrap_optimizer(inner, **OPTIONS | {"refresh_every": 1})
            for number in range(4):
                weight.grad = torch.full_like(weight, 0.1 * number)
                optimizer.step()
            runs.append(topkast.dense_params(optimizer)["w"])
        assert torch.equal(*runs)

    def test_a_single_row_is_refused_before_the_refresh(self) -> None:
        """Which would write zeros there, without a word."""
        model, optimizer = make(False)
        train(model, optimizer, range(1))
        model[2].weight.data[5].fill_(0.25)
        train(model, optimizer, range(1, 2))
        with pytest.raises(topkast.MismatchError, match=r"2\.weight has nonzero weights outside"):
            train(model, optimizer, range(2, 3))

    @pytest.mark.parametrize("name", ["clamp", "scale", "flip"])
    def test_others_are_accepted(self, name: str) -> None:
        """Clipping of critics; -0 outside A is a zero."""
        model, optimizer = make(False)
        twin, twin_optimizer = make(False)
        for number in range(7):
            with torch.no_grad():
                for weight, counted in ((model[0].weight.data, False), (twin[0].weight, True)):
                    assert weight.requires_grad == counted
                    if name == "clamp":
                        weight.clamp_(-0.1, 0.1)
                    else:
                        weight.mul_(0.9 if name == "scale" else -1.0)
            train(model, optimizer, range(number, number + 1))
            train(twin, twin_optimizer, range(number, number + 1))
        assert_same_weights(optimizer, twin_optimizer)


class TestRecordedGradients:
    """What sparse layers record for methods that grow by gradients."""

    @pytest.mark.parametrize("layer", ["linear", "convolution"])
    def test_uses_of_the_dense_weight_count(self, layer: str) -> None:
        """Tied by the tensor, as in ``functional.linear(hidden, layer.weight)``."""

        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.first = nn.Linear(12, 24)
                self.linear: Any = nn.Linear(24, 24)
                self.convolution: Any = nn.Conv2d(2, 2, 3, padding=1)

            def forward(self, x: Tensor) -> Tensor:
                hidden = torch.tanh(self.first(x))
                if layer == "linear":
                    hidden = torch.tanh(self.linear(hidden))
                    hidden = nn.functional.linear(hidden, self.linear.weight)
                else:
                    images = hidden.view(-1, 2, 3, 4)
                    images = torch.tanh(self.convolution(images))
                    images = nn.functional.conv2d(images, self.convolution.weight, padding=1)
                    hidden = images.flatten(1)
                return torch.tanh(hidden)[:, :3]

        runs = [make(sparse, model=Tied(), **GROWING) for sparse in (False, True)]
        for model, optimizer in runs:
            train(model, optimizer, range(7))
        assert_same_weights(runs[0][1], runs[1][1])

    def test_passes_that_accumulate_nothing_leave_nothing(self) -> None:
        """A critic whose gradient by its input alone is taken again and again."""
        model, optimizer = make(True, **GROWING)
        train(model, optimizer, range(2))  # the next step needs the gradient outside B
        for _ in range(3):
            x = torch.randn(37, 12, requires_grad=True)
            torch.autograd.grad(model(x).sum(), x)
        del x
        gc.collect()
        tensors = [kept for kept in gc.get_objects() if type(kept) is Tensor]
        assert not [kept for kept in tensors if kept.shape[:1] == (37,)]
        train(model, optimizer, range(2, 4))


@pytest.mark.parametrize("late", [False, True])
def test_gradients_of_sparse_layers_can_be_detached_in_place(late: bool) -> None:
    """As old loops did before they zeroed them."""
    model, optimizer = make(not late)
    twin, twin_optimizer = make(False)
    for number in range(7):
        for param in model.parameters():
            if param.grad is not None:
                param.grad.detach_()
                param.grad.zero_()
        loss_of(model, number).backward()
        if late and number == 1:
            topkast.sparsify(model, optimizer)
        optimizer.step()
    train(twin, twin_optimizer, range(7))
    assert_same_weights(optimizer, twin_optimizer)


def test_inference_tensors_are_refused_by_name() -> None:
    with torch.inference_mode():
        model = make_model()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(topkast.UnsupportedTensorError, match=r"0\.weight .*inference tensor"):
        topkast.wrap_optimizer(inner, **OPTIONS)
    weight: Any = model[0].weight
    assert weight.all()
    assert inner.state_dict()["param_groups"][0]["lr"] == 0.1  # it can still be used


class TestTargetNetworks:
    def test_soft_updates_average_forward_views(self) -> None:
        model, optimizer = make(False)
        target = copy.deepcopy(model).requires_grad_(False)
        expected = {name: entry.clone() for name, entry in target.state_dict().items()}
        for number in range(7):
            train(model, optimizer, range(number, number + 1))
            for kept, param in zip(target.parameters(), model.parameters(), strict=True):
                kept.data.mul_(0.9).add_(param.data, alpha=0.1)
            for name, entry in model.state_dict().items():
                expected[name].lerp_(entry, 0.1)
        for name, entry in target.state_dict().items():
            torch.testing.assert_close(entry, expected[name])

    @pytest.mark.parametrize("sparse", [False, True])
    def test_hard_updates_by_state_dicts_have_the_sets(self, sparse: bool) -> None:
        model, optimizer = make(sparse)
        target = copy.deepcopy(model)
        kept = target(batch(0)).detach()
        for number in range(7):
            train(model, optimizer, range(number, number + 1))
            torch.testing.assert_close(target(batch(0)).detach(), kept)  # the copy is independent
            if number % 3 == 2:
                target.load_state_dict(model.state_dict())
                kept = target(batch(0)).detach()
                assert torch.equal(kept, model(batch(0)).detach())

    @pytest.mark.parametrize("sparse", [False, True])
    def test_soft_updates_of_a_dense_target(self, sparse: bool) -> None:
        """An average of the weights themselves, on the largest entries."""
        model, optimizer = make(sparse)
        average = topkast_torch.WeightAverage(optimizer, decay=0.9)
        target = make_model()
        for number in range(7):
            train(model, optimizer, range(number, number + 1))
            average.update()
            target.load_state_dict(average.forward_params())
        for key, theta in average.dense_params().items():
            view = target.state_dict()[key]
            count = (
                int(topkast.masks(optimizer)[key].forward.sum()) if theta.dim() > 1 else len(theta)
            )
            largest = theta.flatten().abs().argsort(descending=True)[:count]
            torch.testing.assert_close(view.flatten()[largest], theta.flatten()[largest])
            assert view.count_nonzero() == count


class UsesWeight(nn.Module):
    """The squared outputs of a product with the weight of a sparse layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias).square().sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile reads it
@pytest.mark.parametrize("how", ["grad", "jacrev", "vmap", "compile"])
def test_weights_of_sparse_layers_inside_function_transforms(how: str) -> None:
    model = UsesWeight(make(sparse=True)[0][0])
    params = dict(model.named_parameters())
    x = batch(0)
    model(x).backward()
    expected = model.layer.values.grad.clone()
    model.layer.values.grad = None

    def loss(params: Any, x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, params, (x,))
        return result

    if how == "compile":
        torch.compile(model, backend="aot_eager")(x).backward()
        gradient = model.layer.values.grad
    elif how == "vmap":
        by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
        gradient = by_sample["layer.values"].sum(0)
    else:
        gradient = getattr(torch.func, how)(loss)(params, x)["layer.values"]
    torch.testing.assert_close(gradient, expected)


class TestOptionsOfGroups:
    """What is fixed when an optimizer is wrapped is refused afterwards, and nothing is trained."""

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("fwd", 0.7),
            ("bwd", 0.7),
            ("distribution", "erk"),
            ("block", (2, 2)),
            ("pattern", (1, 4)),
            ("method", topkast.methods.Random()),
            ("dense", "4.*"),
        ],
    )
    def test_fixed_options_are_refused(self, sparse: bool, name: str, value: Any) -> None:
        model, optimizer = make(sparse)
        train(model, optimizer, range(2))
        kept = copy.deepcopy(model.state_dict())
        group = optimizer.param_groups[0]
        before = {name: group[name]} if name in group else {}
        group[name] = value
        with pytest.raises(topkast.OptionError, match=f"^{name} of a parameter group was changed"):
            train(model, optimizer, range(2, 3))
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, kept[key])
        del group[name]
        group.update(before)
        train(model, optimizer, range(2, 4))

    @pytest.mark.parametrize("method", ["plain", None])
    def test_a_method_of_the_inner_optimizer_is_its_own(self, method: str | None) -> None:
        class WithMethod(torch.optim.SGD):
            def __init__(self, params: Any) -> None:
                super().__init__(params, lr=0.1)
                self.defaults["method"] = method
                for group in self.param_groups:
                    group["method"] = method

        model = make_model()
        optimizer = topkast.wrap_optimizer(WithMethod(model.named_parameters()), **OPTIONS)
        train(model, optimizer, range(2))
        optimizer.param_groups[0]["method"] = "other"
        train(model, optimizer, range(2, 5))
