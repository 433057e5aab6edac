"""Dispatch from an optimizer to its adapter."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

import topkast
from topkast import _adapters


def foreign(package: str) -> Any:
    """Make an optimizer whose class belongs to another package."""
    return type("Optimizer", (), {"__module__": f"{package}.optim"})()


def test_third_party_adapter_is_found_by_the_root_package(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("toolkit", "test_wrap:fake_adapter", _adapters.ENTRY_POINTS)
    monkeypatch.setattr(_adapters, "entry_points", lambda group: [entry])
    wrapped = topkast.wrap_optimizer(foreign("toolkit"), fwd=0.9, bwd=0.8)
    assert wrapped[1].fwd == 0.9
    derived = type("Mine", (type(foreign("toolkit")),), {"__module__": "my_project"})()
    assert topkast.wrap_optimizer(derived, fwd=0.9, bwd=0.8)[0] is derived


def fake_adapter(optimizer: Any, options: Any) -> Any:
    return optimizer, options


def test_unknown_framework_lists_the_known_ones() -> None:
    with pytest.raises(
        topkast.AdapterNotFoundError,
        match=r"no adapter for tensorflow\.optim\.Optimizer: .* torch .*pip install 'topkast\[",
    ):
        topkast.wrap_optimizer(foreign("tensorflow"), fwd=0.9, bwd=0.8)


def test_missing_adapter_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_adapters, "entry_points", lambda group: [])
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], 0.1)
    with pytest.raises(topkast.AdapterNotFoundError, match=r"pip install 'topkast\[torch\]'"):
        topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5)


def test_missing_dependency_of_an_adapter_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("torch", "topkast_not_there:wrap", _adapters.ENTRY_POINTS)
    monkeypatch.setattr(_adapters, "entry_points", lambda group: [entry])
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], 0.1)
    with pytest.raises(
        topkast.AdapterNotFoundError, match=r"needs topkast_not_there.*'topkast\[torch\]'"
    ):
        topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5)


def test_faults_of_adapters_of_others_name_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, message in (
        ("toolkit_not_there:wrap", "the adapter for toolkit needs toolkit_not_there.*: install to"),
        ("test_wrap:wrapp", "toolkit has the entry point test_wrap:wrapp.*no attribute 'wrapp'"),
    ):
        entry = EntryPoint("toolkit", value, _adapters.ENTRY_POINTS)
        monkeypatch.setattr(_adapters, "entry_points", lambda group, entry=entry: [entry])
        with pytest.raises(topkast.AdapterNotFoundError, match=message) as caught:
            topkast.wrap_optimizer(foreign("toolkit"), fwd=0.5, bwd=0.5)
        assert "topkast[" not in str(caught.value)


def test_class_instead_of_an_optimizer() -> None:
    with pytest.raises(topkast.AdapterNotFoundError, match=r"got the class AdamW: construct it"):
        topkast.wrap_optimizer(torch.optim.AdamW, fwd=0.9, bwd=0.8)


def test_wrapping_twice_is_an_error() -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], 0.1)
    optimizer = topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5)
    with pytest.raises(topkast.UnsupportedOptimizerError, match="wrapped already"):
        topkast.wrap_optimizer(optimizer, fwd=0.5, bwd=0.5)


def test_scheduler_is_not_an_optimizer() -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)
    with pytest.raises(topkast.UnsupportedOptimizerError, match=r"expected a torch\.optim\.Opt"):
        topkast.wrap_optimizer(scheduler, fwd=0.5, bwd=0.5)
