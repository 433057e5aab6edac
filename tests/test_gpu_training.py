"""Training in PyTorch on a GPU: the runs are those of the CPU. ``nox -s gpu`` runs these tests."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import topkast
from topkast import methods
from topkast.testing import assert_same_support

if TYPE_CHECKING or importlib.util.find_spec("torch"):
    import topkast_torch
    import torch
    from torch import Tensor, nn

    IS_AVAILABLE = torch.cuda.is_available()
else:
    IS_AVAILABLE = False

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not IS_AVAILABLE, reason="PyTorch sees no GPU"),
]

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of the CPU have tests of their own, and take longer to compile than these."""
    for module in ("topkast.backends._compiled", "topkast_torch.sparse._products"):
        monkeypatch.setattr(f"{module}.has_numba", lambda: False)


Options = dict[str, Any]


# The name of the inner optimizer, its options, and those of the wrapper.
OPTIMIZERS: dict[str, tuple[str, Options]] = {
    "sgd": ("SGD", {"lr": 0.05}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9}),
    "adam": ("Adam", {"lr": 0.01}),
    "adamw, fused": ("AdamW", {"lr": 0.01, "fused": True}),
    "adagrad": ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "rmsprop": ("RMSprop", {"lr": 0.01}),
    "rprop": ("Rprop", {"lr": 0.01}),
}
OPTIONS: dict[str, Options] = {
    "every step": {"refresh_every": 1},
    "l1": {"penalty_kind": "l1", "penalty": 1e-3},
    "stops": {"explore_until": 5},
    "random": {"explore": "random"},
    "global": {"distribution": "global"},
    "erk": {"distribution": "erk"},
    "blocks": {"block": (2, 2)},
    "pattern": {"pattern": (1, 4), "fwd": 0.75, "bwd": 0.5},
    "overrides": {"overrides": {"2.*": {"fwd": 0.95, "bwd": 0.5, "reservoir": "host"}}},
    "host": {"reservoir": "host", "refresh_every": 1},
    "disk": {"reservoir": "disk"},
    "seeded": {"reservoir": "seeded"},
    "static": {"method": methods.Static()},
    "set": {"method": methods.SET(0.3)},
    "rigl": {"method": methods.RigL(until=12)},
    "itop": {"method": methods.ITOP(until=12)},
    "gradual pruning": {"method": methods.GradualPruning(start=2, end=8)},
    "granet": {"method": methods.GraNet(start=0, end=8, until=12)},
    "acdc": {"method": methods.ACDC(warm_up=2, sparse=4, dense=2, end=10)},
}


def make_model(device: str, convolutions: bool = False) -> Any:
    """A model with generated weights in double precision on a device."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16)).double()
    if convolutions:
        model = nn.Sequential(
            nn.Unflatten(1, (4, 2, 3)),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 4, 2, groups=2),
            nn.Flatten(),
        ).double()
    topkast_torch.generate_weights(model, seed=3)
    return model.to(device)


def build(
    device: str, folder: Path, options: Options, inner: str = "adam", convolutions: bool = False
) -> tuple[Any, Any]:
    """A model on a device and its wrapped optimizer."""
    model = make_model(device, convolutions)
    name, settings = OPTIMIZERS[inner]
    if device == "cpu":
        settings = {key: value for key, value in settings.items() if key != "fused"}
    settings = settings | ({"foreach": False} if inner == "adagrad" else {})
    optimizer = getattr(torch.optim, name)(model.named_parameters(), **settings)
    if options.get("reservoir") == "disk":
        options = {**options, "reservoir_path": folder / device}
    bwd = 0.8
    if method := options.get("method"):
        bwd = 0.9 if method.backward == "equal" else 0.0
    wrapping: Options = {"fwd": 0.9, "bwd": bwd, "refresh_every": 3} | options
    return model, topkast.wrap_optimizer(optimizer, **wrapping)


def train(model: Any, opt: Any, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        inputs = torch.randn(8, 24, generator=torch.Generator().manual_seed(step)).double()
        model(inputs.to(next(model.parameters()).device)).square().mean().backward()
        opt.step()


def assert_agree(opt: Any, expected: Any) -> None:
    sets = topkast.masks(opt), topkast.masks(expected)
    assert sets[0].keys() == sets[1].keys()
    for name, pair in sets[0].items():
        assert torch.equal(pair.forward.cpu(), sets[1][name].forward), name
        assert torch.equal(pair.backward.cpu(), sets[1][name].backward), name
    theta = topkast.dense_params(expected)
    for name, weights in topkast.dense_params(opt).items():
        torch.testing.assert_close(weights.cpu(), theta[name], rtol=1e-9, atol=1e-9, msg=name)


def check(folder: Path, options: Options, *, sparse: bool, **built: Any) -> None:
    """The GPU's run has the sets and, to rounding, the weights of the CPU's."""
    runs = []
    for device in ("cpu", DEVICE):
        model, opt = build(device, folder, options, **built)
        if sparse and device == DEVICE:  # on the CPU, masked and sparse runs agree
            topkast.sparsify(model, opt)
        train(model, opt, range(12))
        assert all(param.device.type == device for param in model.parameters())
        runs.append(opt)
    assert_agree(runs[1], runs[0])


either = pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])


@either
@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_optimizers(inner: str, sparse: bool, tmp_path: Path) -> None:
    check(tmp_path, {}, sparse=sparse, inner=inner)


@either
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, sparse: bool, tmp_path: Path) -> None:
    options = OPTIONS[name]
    if sparse and "distribution" in options and options["distribution"] == "global":
        pytest.skip("tensors that are ranked together are not made sparse")
    check(tmp_path, options, sparse=sparse)


@either
@pytest.mark.parametrize("name", ["every step", "blocks", "host"])
def test_convolutions(name: str, sparse: bool, tmp_path: Path) -> None:
    check(tmp_path, OPTIONS[name], sparse=sparse, convolutions=True)


@either
@pytest.mark.parametrize("kind", ["device", "host", "disk", "seeded"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_checkpoint_continues_on(target: str, kind: str, sparse: bool, tmp_path: Path) -> None:
    options = {"reservoir": kind}
    model, opt = build(DEVICE, tmp_path, options)
    other, other_opt = build(target.replace("cuda", DEVICE), tmp_path / "other", options)
    if sparse:
        topkast.sparsify(model, opt)
        topkast.sparsify(other, other_opt)
    train(model, opt, range(5))
    path = tmp_path / "checkpoint.pt"
    torch.save([model.state_dict(), opt.state_dict()], path)
    model_state, state = torch.load(path, weights_only=True, map_location=target)
    other.load_state_dict(model_state)
    other_opt.load_state_dict(state)
    train(model, opt, range(5, 12))
    train(other, other_opt, range(5, 12))
    theta = topkast.dense_params(other_opt)
    for name, weights in topkast.dense_params(opt).items():
        torch.testing.assert_close(theta[name].cpu(), weights.cpu(), rtol=1e-9, atol=1e-9)
    for name, sets in topkast.masks(opt).items():
        assert torch.equal(sets.backward.cpu(), topkast.masks(other_opt)[name].backward.cpu())


@either
def test_a_model_that_moves_is_refused(sparse: bool, tmp_path: Path) -> None:
    model, opt = build("cpu", tmp_path, {})
    if sparse:
        topkast.sparsify(model, opt)
    train(model, opt, range(2))
    model.to(DEVICE)
    with pytest.raises(topkast.MismatchError, match="device"):
        train(model, opt, range(2, 4))


@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_an_input_on_another_device_is_refused(layer: str, tmp_path: Path) -> None:
    model, opt = build("cpu", tmp_path, {}, convolutions=layer == "convolution")
    topkast.sparsify(model, opt)
    with pytest.raises(topkast.MismatchError, match="its values on cpu"):
        model(torch.zeros(8, 24, dtype=torch.float64, device=DEVICE))


@either
def test_mixed_precision(sparse: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16)).to(DEVICE)
    inner = torch.optim.AdamW(model.named_parameters(), 0.01, fused=True)
    opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, refresh_every=2)
    if sparse:
        topkast.sparsify(model, opt)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8)
    inputs, losses = torch.randn(32, 24, device=DEVICE), []
    for _ in range(30):
        opt.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = (model(inputs).float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert int(topkast.masks(opt)["0.weight"].forward.sum()) == 96


def test_layers_that_are_never_dense() -> None:
    runs = []
    for device in ("cpu", DEVICE, "meta"):
        with torch.device(device):
            layer: Any = topkast_torch.SparseLinear(
                60, 50, False, fwd=0.95, bwd=0.9, reservoir="seeded", seed=4, dtype=torch.float64
            )
        if device == "meta":
            layer.to_empty(device=DEVICE)
            layer.reset_parameters()
        opt: Any = torch.optim.AdamW(layer.named_parameters(), 0.01)
        opt = topkast.wrap_optimizer(opt, fwd=0.95, bwd=0.9, refresh_every=2, reservoir="seeded")
        inputs = torch.linspace(-1, 1, 4 * 60, dtype=torch.float64).reshape(4, 60)
        for _ in range(9):
            opt.zero_grad()
            (layer(inputs.to(layer.values.device)) - 1).square().mean().backward()
            opt.step()
        runs.append(opt)
    for opt in runs[1:]:
        assert_agree(opt, runs[0])


@either
def test_copies_and_conversions(sparse: bool, tmp_path: Path) -> None:
    model, opt = build(DEVICE, tmp_path, {})
    if sparse:
        topkast.sparsify(model, opt)
    train(model, opt, range(4))
    inputs = torch.randn(8, 24, dtype=torch.float64, device=DEVICE)
    expected = model(inputs)
    assert topkast.summary(opt).held_bytes
    dense = topkast.densify(copy.deepcopy(model)) if sparse else copy.deepcopy(model)
    torch.testing.assert_close(dense(inputs), expected)
    topkast_torch.save_forward(model, tmp_path / "file")
    for device in ("cpu", DEVICE):
        loaded = make_model(device)
        topkast_torch.load_sparse(loaded, tmp_path / "file")
        torch.testing.assert_close(loaded(inputs.to(device)).to(DEVICE), expected)


@pytest.fixture
def group() -> Iterator[Callable[[], Any]]:
    """A group of one process over NCCL, and its mesh."""
    from torch import distributed
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group(
        "nccl",
        store=HashStore(),
        rank=0,
        world_size=1,
        device_id=torch.device("cuda:0"),
    )
    yield lambda: init_device_mesh("cuda", (1,))
    distributed.destroy_process_group()


@either
def test_data_parallel_over_nccl(group: Any, sparse: bool, tmp_path: Path) -> None:
    runs = []
    for parallel in (False, True):
        model, opt = build(DEVICE, tmp_path, {})
        if sparse:
            topkast.sparsify(model, opt)
        wrapped = nn.parallel.DistributedDataParallel(model) if parallel else model
        train(wrapped, opt, range(8))
        runs.append({name: weights.cpu() for name, weights in topkast.dense_params(opt).items()})
    for name, weights in runs[0].items():
        torch.testing.assert_close(runs[1][name], weights, rtol=1e-9, atol=1e-9)


def test_fully_sharded_over_nccl(group: Any) -> None:
    runs = []
    for sharded in (False, True):
        torch.manual_seed(0)
        layers = [topkast_torch.SparseLinear(24, 40, fwd=0.9, bwd=0.8), nn.Tanh()]
        model: Any = nn.Sequential(*layers, nn.Linear(40, 16)).to(DEVICE)
        if sharded:
            for layer in (model[0], model[2], model):
                topkast_torch.fully_shard(layer, mesh=group())
        inner = torch.optim.AdamW(model.named_parameters(), 0.01)
        opt: Any = topkast.wrap_optimizer(
            inner, fwd=0.9, bwd=0.8, refresh_every=2, dense=["2.*", "*bias"]
        )
        inputs = torch.linspace(-1, 1, 8 * 24, device=DEVICE).reshape(8, 24)
        for _ in range(8):
            opt.zero_grad()
            (model(inputs) - 1).square().mean().backward()
            opt.step()
        runs.append((topkast.dense_params(opt)["0.values"], topkast.masks(opt)["0.values"]))
    (first, first_sets), (second, second_sets) = runs
    full: Tensor = second.full_tensor() if hasattr(second, "full_tensor") else second
    torch.testing.assert_close(full, first, rtol=1e-4, atol=1e-6)
    assert torch.equal(first_sets.backward, second_sets.backward)


def test_equal_magnitudes_rank_as_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    for values in (torch.ones(1000), torch.randint(-3, 4, (5000,), generator=generator).float()):
        for fwd, bwd in ((0.9, 0.8), (0.5, 0.0)):
            expected = topkast.select(values, fwd=fwd, bwd=bwd)
            assert_same_support(topkast.select(values.to(DEVICE), fwd=fwd, bwd=bwd), expected)
