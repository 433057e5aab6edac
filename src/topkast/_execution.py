"""Switching a model between masked and sparse execution, in its own framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from topkast._adapters import find_entry, load
from topkast._errors import AdapterNotFoundError, OptionError

if TYPE_CHECKING:
    from topkast_torch import ExecutionReport
    from torch.optim import Optimizer


def sparsify(
    model: Any,
    optimizer: Any,
    /,
    *,
    only: str | Sequence[str] | None = None,
    auto: bool = True,
    example: Any = None,
) -> ExecutionReport:
    r"""Replace a model's layers by sparse ones, which compute with the sparse weights only.

    Layers whose weight `optimizer` keeps sparse change in place. Their Parameter becomes the values
    on B, of shape (1, …, \|B\|); the forward pass multiplies by A, the input gradient by A's
    transpose, and the weight gradient is computed on B alone. No dense weight and no dense gradient
    remain. Training continues with the same optimizer, state and sets. A refresh can take as long
    as several steps: sparse layers save most time if `refresh_every` is large.

    ``torch.nn.Linear`` and ``torch.nn.Conv2d`` have a sparse form in float32 and float64. All else
    (``torch.nn.MultiheadAttention``, subclasses, tied weights, tensors that are ranked together)
    stays masked, and the report says why. Linear layers in a row, with or without
    ``torch.nn.ReLU`` between them, run together: a ``torch.nn.Sequential`` with such layers becomes
    a ``topkast_torch.SparseSequential``. So do layers that read the same activations, in a
    ``topkast_torch.SparseParallel``.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, before or during training.
    optimizer
        The wrapped optimizer of its parameters.
    only
        Names or globs of the tensors to make sparse; None: all.
    auto
        With `example`, keep a layer masked if that is faster. Each layer is timed by itself, in a
        forward and a backward pass.
    example
        An input of the model, or a tuple of inputs, as large as a batch in training.

    Returns
    -------
    ExecutionReport
        The execution of each tensor, and the reason for it. Prints as a table.

    Raises
    ------
    OptionError
        If `optimizer` is not wrapped or belongs to another model, if `only` matches nothing, or if
        the model does not accept `example`.
    MismatchError
        If the model was made dense by :func:`densify`.
    AdapterNotFoundError
        For a model of another framework.

    Examples
    --------
    >>> import torch, topkast
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    >>> opt = torch.optim.AdamW(model.named_parameters(), 1e-3)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8)
    >>> print(topkast.sparsify(model, opt))
    tensor    execution  masked  sparse  why
    0.weight  sparse                     not timed
    2.weight  sparse                     not timed
    >>> model[0].values.shape
    torch.Size([1, 120])
    >>> model(torch.ones(8, 20)).square().mean().backward()
    >>> opt.step()
    """
    run = _function_for(model, "sparsify")
    report: ExecutionReport = run(model, optimizer, only=only, auto=auto, example=example)
    return report


@overload
def densify(model: Mapping[str, Any], /) -> dict[str, Any]: ...
@overload
def densify(model: Any, /) -> Any: ...
def densify(model: Any, /) -> Any:
    """Undo :func:`sparsify` for export: replace sparse layers by dense ones that hold α.

    Parameters
    ----------
    model
        A model, whose sparse layers change in place and are no longer trained by its optimizer. Or
        a state dict of a sparse model, which is not changed.

    Returns
    -------
    object
        The model, or a new state dict for a dense model.

    Raises
    ------
    AdapterNotFoundError
        For a model of another framework.

    Examples
    --------
    >>> import torch, topkast
    >>> model = torch.nn.Linear(20, 30)
    >>> opt = topkast.wrap_optimizer(
    ...     torch.optim.SGD(model.named_parameters(), 0.1), fwd=0.9, bwd=0.8)
    >>> report = topkast.sparsify(model, opt)
    >>> sorted(topkast.densify(model.state_dict()))
    ['bias', 'weight']
    >>> type(topkast.densify(model)), int((model.weight != 0).sum())
    (<class 'torch.nn.modules.linear.Linear'>, 60)
    """
    if isinstance(model, Mapping):
        entries = (find_entry(value) for value in model.values())
        entry = next((entry for entry in entries if entry is not None), None)
        return dict(model) if entry is None else load(entry, "densify")(model)
    return _function_for(model, "densify")(model)


def unwrap(optimizer: Any, /, *, weights: Literal["forward", "dense"] = "forward") -> Optimizer:
    """End Top-KAST and return the inner optimizer, which then trains whole tensors.

    Hooks are removed and gradients are dense. The inner optimizer's state grows from B to every
    weight; outside B it starts as in a fresh optimizer.

    Parameters
    ----------
    optimizer
        A wrapped PyTorch optimizer. Its ``step`` raises an error from now on.
    weights
        The weights that the model keeps: ``"forward"``, the forward view α, or ``"dense"``, θ.
        Layers that :func:`sparsify` made sparse stay sparse with the first and become dense with
        the second.

    Returns
    -------
    torch.optim.Optimizer
        The optimizer that was wrapped.

    Raises
    ------
    OptionError
        If `optimizer` is not wrapped, or is a functional one, which has no hooks to remove: use the
        inner transformation instead.

    Examples
    --------
    >>> import torch, topkast
    >>> model = torch.nn.Linear(20, 30)
    >>> opt = torch.optim.SGD(model.named_parameters(), 0.1)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8)
    >>> opt = topkast.unwrap(opt)
    >>> type(opt), int((model.weight != 0).sum())
    (<class 'torch.optim.sgd.SGD'>, 60)
    """
    method = getattr(optimizer, "__topkast_unwrap__", None)
    if method is None:
        raise OptionError(
            f"unwrap expects a PyTorch optimizer that topkast.wrap_optimizer returned, got "
            f"{type(optimizer).__qualname__}"
        )
    inner: Optimizer = method(weights)
    return inner


def _function_for(model: Any, name: str) -> Any:
    """Find a function of the adapter of the model's framework."""
    entry = find_entry(model)
    if entry is None:
        raise AdapterNotFoundError(
            f"no adapter has sparse layers for a model of type {type(model).__module__}."
            f"{type(model).__qualname__}: expected a torch.nn.Module (in JAX, call "
            f"topkast_jax.{name})"
        )
    return load(entry, name)
