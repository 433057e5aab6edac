"""Between refreshes no step waits for the device: none looks at a value, or brings one there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import topkast

_LOOKING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"}
_BRINGING = "lift_fresh"  # a tensor made of numbers or of an array of the host


class NothingLooks(TorchDispatchMode):
    """Raises where an operation needs the values of a tensor.

    What is kept on the host may be looked at: the tensors `on_host`, and `flags` times a flag that
    was computed from a count. `bringing`: whether numbers of the host may become tensors, as the
    counts of PyTorch's own optimizers do, which stay there.
    """

    def __init__(self, *on_host: torch.Tensor, flags: int = 0, bringing: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_host = {tensor.data_ptr() for tensor in on_host}
        self.flags, self._bringing = flags, bringing

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        flag = name == "_local_scalar_dense" and args[0].dtype == torch.bool and self.flags > 0
        self.flags -= flag
        if name in _LOOKING and not flag and args[0].data_ptr() not in self._on_host:
            raise AssertionError(f"{name} of a {args[0].dtype} tensor {tuple(args[0].shape)}")
        brought = name == _BRINGING and not self._bringing
        assert not brought, f"{tuple(args[0].shape)} is copied from the host"
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for index in arg
        )
        assert not by_mask, f"{name} by a mask"
        return function(*args, **(kwargs or {}))


def test_the_mode_sees_what_looks() -> None:
    vector = torch.ones(3)
    for look in (lambda: float(vector[0]), lambda: vector[vector > 0], lambda: vector.nonzero()):
        with pytest.raises(AssertionError), NothingLooks():
            look()
    with pytest.raises(AssertionError, match="copied from the host"), NothingLooks():
        torch.asarray(1, device=vector.device)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("options", [{}, {"penalty_kind": "l1"}, {"explore_until": 2}], ids=str)
def test_pytorch(execution: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5))
    inner = torch.optim.AdamW(model.named_parameters(), 1e-3, foreach=True, capturable=False)
    opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, refresh_every=1000, **options)
    if execution == "sparse":
        topkast.sparsify(model, opt)
    for turn in range(5):
        opt.zero_grad()
        model(torch.ones(4, 30)).square().mean().backward()
        if turn:
            steps = [entries["step"] for entries in opt.state.values()]
            with NothingLooks(*steps, bringing=True):
                opt.step()
        else:
            opt.step()


@pytest.mark.parametrize("rule", [topkast.SGD(0.1, momentum=0.9), topkast.AdamW(1e-2)], ids=repr)
@pytest.mark.parametrize("options", [{}, {"explore_until": 2}], ids=str)
def test_plain_arrays(rule: Any, options: dict[str, Any]) -> None:
    params = {"w": torch.randn(30, 20), "b": torch.randn(20)}
    tx = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8, refresh_every=1000, **options)
    state = tx.init(params)
    assert state.updates.device.type == "cpu"  # wherever the weights are
    for _ in range(4):
        tx.update(params, state, params)  # the first update brings a table of ages there
        # Whether a refresh is due, and whether B∖A still moves.
        with NothingLooks(flags=2 * (1 + len(options))) as mode:
            grads = topkast.forward_params(params, state)
            params, state = tx.step(grads, state, params)
            updates, state = tx.update(grads, state, params)
            params = topkast.apply_updates(params, updates)
        assert mode.flags == 0
