"""From masked to sparse execution and back, in the framework of the model."""

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
    r"""Compute with sparse weights for real: replace a model's layers by always-sparse ones.

    Layers whose weight `optimizer` keeps sparse change in place: the values on B become their
    Parameter, of shape (1, …, \|B\|); the forward pass multiplies by A alone, the input gradient
    by A's transpose, and the gradient is formed on B alone. No dense weight and no dense gradient
    exist any more. Training goes on with the same optimizer, its state and its sets. A refresh
    costs as much as several steps: sparse layers gain time where `refresh_every` is large.

    ``torch.nn.Linear`` and ``torch.nn.Conv2d`` have a sparse form, in float32 and float64. What
    has none (``torch.nn.MultiheadAttention``, subclasses, tied weights, blocks of weights, tensors
    that are ranked together) stays masked, and the report says why.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, before or during training.
    optimizer
        What :func:`topkast.wrap_optimizer` returned for its parameters.
    only
        Names or globs of the tensors to make sparse; None: all.
    auto
        With `example`: keep a layer masked where that is faster. The layers are timed alone, in a
        forward and a backward pass.
    example
        An input of the model, or a tuple of them, of the size of a batch in training.

    Returns
    -------
    ExecutionReport
        Which tensor is computed with in which way, and why. Prints as a table.

    Raises
    ------
    OptionError
        If `optimizer` is not wrapped or belongs to another model, if `only` matches nothing, or if
        the model does not take `example`.
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
    """The inverse of :func:`sparsify`, for export: dense layers that hold the forward view α.

    Parameters
    ----------
    model
        A model, whose sparse layers change in place; what an optimizer does afterwards no longer
        reaches them. Or a state dict of a sparse model, which stays as it is.

    Returns
    -------
    object
        The model, or a new state dict for a dense one.

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
    """End a wrapped optimizer: the one inside goes on alone, with the whole tensors.

    Hooks are gone, gradients are dense, and what the inner optimizer kept on B it keeps for every
    weight, as a fresh one would start outside B.

    Parameters
    ----------
    optimizer
        What :func:`topkast.wrap_optimizer` returned for a PyTorch optimizer. It refuses to step
        from now on.
    weights
        What the model is left with: ``"forward"``, the forward view α, or ``"dense"``, the weights
        θ. Layers that :func:`sparsify` made sparse stay sparse under the first, and become dense
        under the second.

    Returns
    -------
    torch.optim.Optimizer
        The optimizer that was wrapped.

    Raises
    ------
    OptionError
        If `optimizer` is not wrapped, or is a functional one, which holds nothing that could end:
        go on with the inner transformation.

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
            f"unwrap takes what topkast.wrap_optimizer returned for a PyTorch optimizer, got "
            f"{type(optimizer).__qualname__}"
        )
    inner: Optimizer = method(weights)
    return inner


def _function_for(model: Any, name: str) -> Any:
    """What the adapter of a model's framework has under a name."""
    entry = find_entry(model)
    if entry is None:
        raise AdapterNotFoundError(
            f"no adapter has sparse layers for {type(model).__module__}."
            f"{type(model).__qualname__}: expected a torch.nn.Module"
        )
    return load(entry, name)
