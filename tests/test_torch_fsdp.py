"""Sparse layers in FSDP2: the runs of several processes are those of one, and what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
import torch.distributed as dist
from odd_optimizers import Flattened
from sharded_replica import (
    OPTIONS,
    SAVED,
    SPARSITIES,
    STEPS,
    build,
    report,
    resume,
    run_four,
    run_two,
    shard,
    train,
    train_alone,
    wrap,
)
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as shard_with_pytorch
from torch.distributed.tensor import Shard, distribute_module
from torch.multiprocessing.spawn import spawn

import topkast


def read(folder: Path, name: str, count: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=False) for rank in range(count)]


def assert_same(first: Any, second: Any, where: str = "") -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key, value in first.items():
            assert_same(value, second[key], f"{where} {key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where} {number}")
    else:
        assert first == second, where


def run_one(case: str, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The run of `count` processes in one, without FSDP; and the bytes that it holds."""
    model = build(case)
    opt = wrap(model, case)
    train_alone(model, opt, case, range(STEPS), count)
    return report(opt), topkast.summary(opt).held_parts


@pytest.fixture
def group() -> Iterator[Any]:
    """A group of one process, and its mesh."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_two_processes_are_one_and_resume_in_one(tmp_path: Path, group: Any) -> None:
    """Weights, sets, moments and ages, to the last bit: a sum of two gradients has no order."""
    spawn(run_two, args=(str(tmp_path),), nprocs=2)
    two = read(tmp_path, "two", 2)
    for case in OPTIONS:
        one, parts = run_one(case, 2)
        for result in two:
            assert_same(one, {name: result[case][name] for name in one}, case)
        held = [result[case]["parts"] for result in two]
        assert held[0]["indices"] == parts["indices"]  # whole in each process
        for name in ("values", "gradient", "state", "ages"):
            # Parts of vectors over B and of biases: of odd sizes, and with numbers that each has.
            assert abs(sum(own[name] for own in held) - parts[name]) <= 16, name
            assert held[0][name] <= 0.55 * parts[name] + 16, name
        reservoirs = [own["reservoir"] for own in held]
        weights = sum(theta.nbytes for theta in one["theta"].values() if theta.dim() > 1)
        assert sum(reservoirs) == weights
        assert max(reservoirs) <= 0.62 * weights  # 9 of 17 rows, and 3 of 5

    for differ, options, bad, same in (result["errors"] for result in two):
        assert "the sets or weights of 0 differ between processes" in differ
        assert "the options of topkast.wrap_optimizer, or the names" in options
        assert "0.values: 1 of 221 entries are NaN or infinite" in bad
        assert same

    for resume_in_one in (_resume_sharded, _resume_whole):
        assert_same(two[0]["resumed"] | {"parts": None}, resume_in_one(tmp_path))


def _resume_sharded(folder: Path) -> dict[str, Any]:
    """From the sharded checkpoint, in one process with FSDP2."""
    model = build("resumed")
    shard(model, 1)
    opt = wrap(model, "resumed")
    train(model, opt, "resumed", range(20, 21), 0)  # all of its state is replaced
    resume(model, opt, str(folder), 0)
    return report(opt) | {"parts": None}


def _resume_whole(folder: Path) -> dict[str, Any]:
    """From whole tensors, in one process without FSDP."""
    model = build("resumed")
    opt = wrap(model, "resumed")
    saved_model, saved = torch.load(folder / "full.pt", weights_only=True)
    set_state_dict(model, opt, model_state_dict=saved_model, optim_state_dict=saved)
    train(model, opt, "resumed", range(SAVED, STEPS), 0)
    return report(opt) | {"parts": None}


@pytest.mark.slow
def test_four_processes_are_one_and_go_on_from_two(tmp_path: Path) -> None:
    spawn(run_two, args=(str(tmp_path),), nprocs=2)
    spawn(run_four, args=(str(tmp_path),), nprocs=4)
    expected, _ = run_one("resumed", 1)
    for result in read(tmp_path, "four", 4):
        # Their gradients are equal in all processes: no order of sums changes them.
        assert_same(expected, result["resumed"])
        assert_same(expected, result["replicated"])  # a mesh of 2 × 2: HSDP
    # Four different gradients are added in another order: sets are the same, weights are close.
    one, parts = run_one("adamw", 4)
    for result in read(tmp_path, "four", 4):
        own = result["adamw"]
        assert_same(one["masks"], own["masks"])
        assert_same(one["ages"], own["ages"])
        for name, theta in one["theta"].items():
            torch.testing.assert_close(own["theta"][name], theta, rtol=1e-5, atol=1e-6)
        assert own["parts"]["state"] <= parts["state"] / 4 + 48


def make(mesh: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = topkast_torch.SparseLinear(6, 4, **SPARSITIES)
    return topkast_torch.fully_shard(nn.Sequential(layer), mesh=mesh, **options)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), 0.1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "SET": (
        {"method": topkast.methods.SET(), "bwd": 0.8},
        "SET cannot choose the sets of 0.values.*DistributedDataParallel",
    ),
    "random": ({"explore": "random"}, r"cannot choose the sets .* explore='magnitude'"),
    "pattern": ({"pattern": (1, 5), "bwd": 0.6}, "pattern"),
    "seeded": ({"reservoir": "seeded"}, "reservoir='seeded' cannot be combined with 0.values"),
    "global": ({"distribution": "global"}, "distribution='global' would move weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_are_refused_by_name(group: Any, case: str) -> None:
    options, message = REFUSED[case]
    torch.manual_seed(0)
    sparsities = SPARSITIES | {name: options[name] for name in ("bwd",) if name in options}
    layer = topkast_torch.SparseLinear(10, 4, **sparsities)
    model = topkast_torch.fully_shard(nn.Sequential(layer), mesh=group)
    with pytest.raises(topkast.OptionError, match=message):
        topkast.wrap_optimizer(adamw(model), **SPARSITIES | options)


def test_sets_that_never_change_are_supported(group: Any) -> None:
    model = make(group)
    before = model[0].indices.clone()
    opt = topkast.wrap_optimizer(adamw(model), **SPARSITIES, method=topkast.methods.Static())
    for _ in range(3):
        model(torch.ones(2, 6)).sum().backward()
        opt.step()
    assert torch.equal(before, model[0].indices)


def test_an_optimizer_of_whole_tensors_is_refused(group: Any) -> None:
    class ByNorm(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for param in self.param_groups[0]["params"]:
                if param.grad is not None:
                    param.sub_(param.grad / param.grad.norm().clamp(min=1e-9), alpha=0.1)

    for dense in (None, "0.bias"):
        model = make(group)
        inner = ByNorm(model.named_parameters(), 0.1)
        message = "ByNorm steps a tensor by norms .* choose an elementwise optimizer, as AdamW"
        with pytest.raises(topkast.UnsupportedOptimizerError, match=message):
            topkast.wrap_optimizer(inner, **SPARSITIES, dense=dense)


def test_dense_layers_are_sharded_beside_sparse_ones(group: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(topkast_torch.SparseLinear(6, 8, **SPARSITIES), nn.Linear(8, 2))
    model = topkast_torch.fully_shard(model, mesh=group)
    with pytest.raises(topkast.UnsupportedTensorError, match=r"1\.weight .* DTensor.*SparseLinear"):
        topkast.wrap_optimizer(adamw(model), **SPARSITIES)
    opt = topkast.wrap_optimizer(adamw(model), **SPARSITIES, dense="1.weight")
    before: Any = model[1].weight.full_tensor().clone()
    model(torch.ones(3, 6)).square().sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    moved = model[1].weight.full_tensor() - before
    assert torch.count_nonzero(moved) == 16
    torch.testing.assert_close(moved.abs(), torch.full((2, 8), 0.1), rtol=0.02, atol=0.0)


def test_layers_in_a_row_run_together_in_a_sharded_module(group: Any) -> None:
    """On the mesh of all processes, the default; gradients of two passes are added up."""
    runs = []
    for is_sharded in (True, False):
        torch.manual_seed(0)
        layers = [topkast_torch.SparseLinear(6, 6, **SPARSITIES) for _ in range(2)]
        model: Any = topkast_torch.SparseSequential(layers[0], nn.ReLU(), layers[1])
        if is_sharded:
            model = topkast_torch.fully_shard(model)
        opt = topkast.wrap_optimizer(adamw(model), **SPARSITIES, refresh_every=2)
        for step in range(5):
            opt.zero_grad()
            for part in range(2):
                generator = torch.Generator().manual_seed(10 * step + part)
                model(torch.randn(2, 3, 6, generator=generator)).square().mean().backward()
            opt.step()
        runs.append(report(opt))
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
            topkast.OptionError,
            "param_dtype=torch.bfloat16.*reduce_dtype",
        ),
        ({"offload_policy": CPUOffloadPolicy()}, topkast.OptionError, "reservoir='host'"),
        ({"dp_mesh_dims": object()}, topkast.OptionError, "dp_mesh_dims is for DTensors"),
    ],
    ids=["mixed precision", "offload", "mesh of all dimensions"],
)
def test_options_of_fully_shard_are_refused(
    group: Any, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        make(group, **options)


def test_placements_are_asked_of_dense_layers_alone(group: Any) -> None:
    """The values of a sparse layer are cut by rows, whatever the function says."""
    torch.manual_seed(0)
    model = nn.Sequential(topkast_torch.SparseLinear(6, 4, **SPARSITIES), nn.Linear(4, 6))
    values = model[0].values

    def place(param: nn.Parameter) -> Any:
        assert param is not values
        return Shard(1) if param.dim() == 2 else None

    sharded: Any = topkast_torch.fully_shard(model, mesh=group, shard_placement_fn=place)
    assert sharded[1].weight.placements == (Shard(1),)
    assert sharded[1].bias.placements == sharded[0].values.placements == (Shard(0),)


def test_a_layer_that_was_not_sharded_is_as_before(group: Any) -> None:
    model = nn.Sequential(topkast_torch.SparseLinear(6, 4, **SPARSITIES))
    expected, shape = model(torch.ones(2, 6)), model[0].values.shape
    with pytest.raises(ValueError, match="reshard_after_forward"):  # PyTorch's own
        topkast_torch.fully_shard(model, mesh=group, reshard_after_forward="no")
    assert model[0].values.shape == shape
    assert torch.equal(model(torch.ones(2, 6)), expected)


def test_what_was_loaded_into_the_model_alone_is_refused(group: Any) -> None:
    """Sets and values are the optimizer's, too: its next step says what to load."""

    def step_after_loading(source: nn.Module, **options: Any) -> None:
        model = make(group)
        opt: Any = topkast.wrap_optimizer(adamw(model), **SPARSITIES)
        model.load_state_dict(source.state_dict(), **options)
        model(torch.ones(1, 6)).sum().backward()
        opt.step()

    same = make(group)
    step_after_loading(same)
    with pytest.raises(topkast.MismatchError, match="load state dicts without assign=True"):
        step_after_loading(same, assign=True)
    torch.manual_seed(1)
    other = nn.Sequential(topkast_torch.SparseLinear(6, 4, **SPARSITIES))
    with pytest.raises(topkast.MismatchError, match="load the optimizer's state dict too"):
        step_after_loading(topkast_torch.fully_shard(other, mesh=group))


def test_state_dicts_that_sharded_layers_cannot_take(group: Any) -> None:
    """Such an error leaves the optimizer as it was."""
    model = make(group)
    opt: Any = topkast.wrap_optimizer(adamw(model), **SPARSITIES)

    def load_into_sharded(state_dict: dict[str, Any], message: str) -> None:
        before = report(opt)
        with pytest.raises(topkast.StateDictError, match=message):
            opt.load_state_dict(state_dict)
        assert_same(report(opt), before)

    seeded = nn.Sequential(
        topkast_torch.SparseLinear(6, 4, **SPARSITIES, reservoir="seeded", seed=3)
    )
    other: Any = topkast.wrap_optimizer(adamw(seeded), **SPARSITIES, reservoir="seeded")
    message = "generates its weights from a seed .* load it in one process with reservoir='device'"
    load_into_sharded(other.state_dict(), message)
    whole = nn.Sequential(topkast_torch.SparseLinear(6, 4, **SPARSITIES))
    other = topkast.wrap_optimizer(adamw(whole), **SPARSITIES)
    saved = other.state_dict()
    theta = next(
        entry["topkast"]["params"]
        for entry in saved["state"].values()
        if "params" in entry.get("topkast", {})
    )
    theta.view(-1)[0] = torch.nan
    load_into_sharded(saved, r"0\.values: a saved weight is NaN or infinite")


def test_an_optimizer_whose_state_is_one_vector_is_refused(group: Any) -> None:
    """For a dense DTensor, whose parts of a vector of all weights nobody knows."""
    torch.manual_seed(0)
    layers = topkast_torch.SparseLinear(6, 4, **SPARSITIES), nn.Linear(4, 6)
    model = topkast_torch.fully_shard(nn.Sequential(*layers), mesh=group)
    with pytest.raises(topkast.UnsupportedOptimizerError, match=r"as one vector .* of 1\.weight"):
        topkast.wrap_optimizer(Flattened(model.named_parameters()), **SPARSITIES, dense="1.weight")


def test_layers_that_cannot_be_sharded_are_refused(group: Any) -> None:
    blocks = topkast_torch.SparseLinear(6, 4, **SPARSITIES, block=(2, 1))
    with pytest.raises(topkast.OptionError, match=r"block=\(2, 1\).*DistributedDataParallel"):
        topkast_torch.fully_shard(blocks, mesh=group)
    undrawn = topkast_torch.SparseLinear(6, 4, **SPARSITIES, device="meta")
    with pytest.raises(topkast.MismatchError, match=r"never drawn.*reservoir='seeded'"):
        topkast_torch.fully_shard(undrawn, mesh=group)
    layer = topkast_torch.SparseLinear(6, 4, **SPARSITIES)
    opt = topkast.wrap_optimizer(adamw(layer), **SPARSITIES)
    with pytest.raises(topkast.MismatchError, match="shard the model first"):
        topkast_torch.fully_shard(layer, mesh=group)
    topkast.unwrap(opt)
    topkast_torch.fully_shard(layer, mesh=group)


def test_pytorchs_own_function_is_refused(group: Any) -> None:
    model = nn.Sequential(topkast_torch.SparseLinear(6, 4, **SPARSITIES))
    shard_with_pytorch(model, mesh=group)
    with pytest.raises(topkast.UnsupportedTensorError, match="instead of PyTorch's fully_shard"):
        topkast.wrap_optimizer(adamw(model), **SPARSITIES)
    with pytest.raises(topkast.MismatchError, match="which leaves all values of a"):
        topkast_torch.fully_shard(model[0], mesh=group)


@pytest.mark.filterwarnings("ignore")  # of modules that PyTorch imports
def test_tensor_parallelism_is_refused(group: Any) -> None:
    parallel: Any = importlib.import_module("torch.distributed.tensor.parallel")
    styles = {"0": parallel.ColwiseParallel(), "1": parallel.RowwiseParallel()}
    dense = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    dense = parallel.parallelize_module(dense, group, styles)
    message = "0.weight cannot be kept sparse.* for tensor parallelism, keep it dense"
    with pytest.raises(topkast.UnsupportedTensorError, match=message):
        topkast.wrap_optimizer(adamw(dense), **SPARSITIES)
    sparse = nn.Sequential(topkast_torch.SparseLinear(6, 4, **SPARSITIES))
    with pytest.raises(NotImplementedError, match="only support"):  # PyTorch's own
        parallel.parallelize_module(sparse, group, styles | {"1": parallel.RowwiseParallel()})
    distribute_module(sparse, group)
    message = "leave sparse layers out of tensor parallelism"
    with pytest.raises(topkast.UnsupportedTensorError, match=message):
        topkast.wrap_optimizer(adamw(sparse), **SPARSITIES)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # when it is imported
def test_zero_is_refused(group: Any) -> None:
    zero: Any = importlib.import_module("torch.distributed.optim").ZeroRedundancyOptimizer
    model = nn.Sequential(nn.Linear(6, 4))

    def build_wrapped(params: Any, **defaults: Any) -> Any:
        return topkast.wrap_optimizer(torch.optim.AdamW(params, **defaults), **SPARSITIES)

    message = "ZeroRedundancyOptimizer.*topkast_torch.fully_shard"
    with pytest.raises(topkast.UnsupportedOptimizerError, match=message):
        zero(model.parameters(), build_wrapped, lr=0.1)
    with pytest.raises(topkast.UnsupportedOptimizerError, match=message):
        topkast.wrap_optimizer(zero(model.parameters(), torch.optim.AdamW, lr=0.1), **SPARSITIES)


def test_what_needs_whole_tensors_says_what_to_do(group: Any) -> None:
    model = make(group)
    opt: Any = topkast.wrap_optimizer(adamw(model), **SPARSITIES)
    with pytest.raises(topkast.OptionError, match="load it in one process, and unwrap there"):
        topkast.unwrap(opt)
    with pytest.raises(topkast.OptionError, match="WeightAverage selects from whole tensors"):
        topkast_torch.WeightAverage(opt)
    with pytest.raises(topkast.MismatchError, match="gather a full state dict"):
        topkast.densify(model)
    with pytest.raises(topkast.MismatchError, match="gather a full state dict"):
        _ = model[0].weight
    with pytest.raises(topkast.MismatchError, match=r"loading 0\.weight needs all values"):
        model.load_state_dict({"0.weight": torch.zeros(4, 6), "0.bias": torch.zeros(4)})
    model(torch.ones(1, 6))  # the outermost module keeps its values until the backward pass
    with pytest.raises(topkast.MismatchError, match=r"call model.reshard\(\)"):
        topkast.wrap_optimizer(adamw(model), **SPARSITIES)
