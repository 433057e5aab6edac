"""``wrap_optimizer``, which dispatches to the adapter and imports no other framework."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack, overload

from topkast._adapters import EXTRAS, find_entry, known_packages, load
from topkast._errors import AdapterNotFoundError, OptionError, UnsupportedOptimizerError
from topkast._method import Method
from topkast._options import (
    Distribution,
    Explore,
    FolderPath,
    Options,
    Overrides,
    PenaltyKind,
    ReservoirKind,
)
from topkast._patterns import Dense, Patterns
from topkast.functional._rules import SGD, Adam
from topkast.functional._transform import TopKASTTransform
from topkast.selection._units import BlockScore

if TYPE_CHECKING:
    from topkast_jax import TopKASTGradientTransformation
    from topkast_torch import TopKASTOptimizer


class _OptionalArguments(TypedDict, total=False):
    refresh_every: int | None
    penalty: float | None
    penalty_kind: PenaltyKind | None
    explore: Explore
    explore_until: int | None
    distribution: Distribution
    block: tuple[int, int] | None
    block_score: BlockScore
    pattern: tuple[int, int] | None
    dense: Dense
    stacked: Patterns
    method: Method | None
    reservoir: ReservoirKind
    reservoir_path: FolderPath
    overrides: Overrides
    power: float
    seed: int
    probe: bool


class _TorchOptimizer(Protocol):
    """The attributes of ``torch.optim.Optimizer``, for type checkers without PyTorch."""

    param_groups: list[dict[str, Any]]

    def add_param_group(self, param_group: dict[str, Any]) -> None: ...


class _GradientTransformation(Protocol):
    """The attributes of ``optax.GradientTransformation``, a NamedTuple of two functions."""

    @property
    def init(self) -> Callable[..., Any]: ...
    @property
    def update(self) -> Callable[..., Any]: ...
    def _asdict(self) -> dict[str, Any]: ...


@overload
def wrap_optimizer(
    optimizer: _TorchOptimizer, *, fwd: float, bwd: float, **options: Unpack[_OptionalArguments]
) -> TopKASTOptimizer: ...
@overload
def wrap_optimizer(
    optimizer: SGD | Adam, *, fwd: float, bwd: float, **options: Unpack[_OptionalArguments]
) -> TopKASTTransform: ...
@overload
def wrap_optimizer(
    optimizer: _GradientTransformation,
    *,
    fwd: float,
    bwd: float,
    **options: Unpack[_OptionalArguments],
) -> TopKASTGradientTransformation: ...
@overload
def wrap_optimizer(
    optimizer: Any, *, fwd: float, bwd: float, **options: Unpack[_OptionalArguments]
) -> Any: ...
def wrap_optimizer(
    optimizer: Any,
    *,
    fwd: float,
    bwd: float,
    refresh_every: int | None = None,
    penalty: float | None = None,
    penalty_kind: PenaltyKind | None = None,
    explore: Explore = "magnitude",
    explore_until: int | None = None,
    distribution: Distribution = "uniform",
    block: tuple[int, int] | None = None,
    block_score: BlockScore = "sum",
    pattern: tuple[int, int] | None = None,
    dense: Dense = None,
    stacked: Patterns = None,
    method: Method | None = None,
    reservoir: ReservoirKind = "device",
    reservoir_path: FolderPath = None,
    overrides: Overrides = None,
    power: float = 1.0,
    seed: int = 0,
    probe: bool = True,
) -> Any:
    r"""Wrap an optimizer so that it trains always-sparse weights by Top-KAST.

    Every tensor with at least two dimensions above one is sparsified. The forward pass sees its
    ``1 - fwd`` largest magnitudes (set A); gradient, update and optimizer state exist for its
    ``1 - bwd`` largest (set B). The optimizer gets the values on B as one vector per tensor.

    Parameters
    ----------
    optimizer
        A ``torch.optim.Optimizer``, which must then not be used directly; an
        ``optax.GradientTransformation``; or :class:`topkast.SGD`, :class:`topkast.Adam` or
        :class:`topkast.AdamW` for plain arrays.
    fwd
        Forward sparsity: share of zeros in the forward pass, in [0, 1).
    bwd
        Backward sparsity: share of weights without a gradient, ``0 <= bwd <= fwd``.
    refresh_every
        Number of updates between two selections of A and B. None: what `method` wants; 1 for
        Top-KAST, the paper's main setting. 100, from its appendix C, takes less time and suits long
        runs.
    penalty
        Coefficient λ of the exploration penalty. None: 1e-4, or 0 if `method` has no such penalty.
    penalty_kind
        ``"l2"`` or ``"l1"``; see :func:`topkast.exploration_penalty`. None: ``"l2"``, or what
        `method` wants.
    explore
        How B∖A is chosen: ``"magnitude"``, the next largest; or ``"random"``. Shorthands for two
        of the methods.
    explore_until
        Number of updates after which B∖A is no longer updated; None: B∖A is always updated.
    distribution
        ``"uniform"``: the same density for every tensor; ``"erk"``: thin layers are denser, see
        :func:`topkast.densities`; ``"global"``: all tensors are ranked as if they were one.
    block
        Rows and columns of a unit. A and B consist of whole blocks of each tensor as a matrix, its
        first axis × all others; each layer of a `stacked` tensor is a matrix. Out of n blocks, A
        holds ``max(1, n - floor(fwd * n))``; likewise B with `bwd`. None: single weights.
    block_score
        The score by which blocks are ranked: ``"sum"`` or ``"max"`` of their magnitudes.
    pattern
        N:M sparsity, ``(n, m)``, such as ``(2, 4)``: A is the n largest of each group of m
        consecutive weights in a row of each tensor as a matrix, as for `block`. `fwd` must be
        ``1 - n / m``, and B holds the ``(1 - bwd) * m`` largest of each group, a whole number.
        None: all weights of a tensor are ranked together.
    dense
        The tensors to keep dense besides those with fewer than two dimensions above one: a name or
        glob (``"head.*"``), a sequence of them, or a predicate ``(name, tensor) -> bool``. True
        keeps all tensors dense; False sparsifies one-dimensional tensors too.
    stacked
        Names or globs of tensors whose first axis numbers layers, as for ``jax.lax.scan``, or
        experts. Each layer is ranked separately, and the first axis does not count as a dimension.
    method
        How A and B are chosen: one of :mod:`topkast.methods`, or your own. None: by `explore`.
    reservoir
        Where the weights outside B are kept (PyTorch): ``"device"``, beside the model; ``"host"``,
        in host memory; ``"disk"``, in files under `reservoir_path`; ``"seeded"``, nowhere: they are
        generated again from a seed. It changes memory and time, not the training.
    reservoir_path
        Folder of the files of ``reservoir="disk"``.
    overrides
        Options of single tensors, by name or glob: ``{"head.*": {"fwd": 0.5, "bwd": 0.2}}``. If
        several globs match, the last one wins. Can set ``fwd``, ``bwd``, ``refresh_every``,
        ``penalty``, ``penalty_kind``, ``explore``, ``explore_until``, ``block``, ``block_score``,
        ``pattern``, ``method`` and ``reservoir``.
    power
        Powerpropagation (Schwarz et al., 2021): the inner optimizer updates φ, and the weight is
        ``φ * abs(φ) ** (power - 1)``. Above 1, large weights learn faster and small ones slower,
        so that fewer matter. 2 is a good first try. Not for methods that grow weights from zero.
    seed
        Seed of the hash that ranks equal magnitudes, and of random choices.
    probe
        Check that the optimizer treats a tensor as a bag of coordinates, by trial steps on tensors
        like the given ones and on their permuted entries. Switch it off for rules that add noise.

    Returns
    -------
    TopKASTOptimizer, TopKASTGradientTransformation or TopKASTTransform
        A ``torch.optim.Optimizer`` for PyTorch; an ``optax.GradientTransformationExtraArgs`` for
        optax; for the rules of this package, an object with optax's ``init(params)`` and
        ``update(grads, state, params)``. The functional forms raise :class:`NonFiniteError` and
        :class:`UnsupportedTensorError` in ``init``, which gets the weights.

    Raises
    ------
    OptionError
        If an option has an invalid value, or `block` or `pattern` does not divide a tensor
        (functional forms: in ``init``).
    AdapterNotFoundError
        If no installed adapter supports the optimizer's framework.
    UnsupportedOptimizerError
        If the optimizer is not elementwise (Muon, Adafactor, Shampoo), or cannot work on vectors of
        fixed length (LBFGS, SparseAdam).
    NonFiniteError
        If a weight is NaN or infinite.
    ReservoirError
        If a file of ``reservoir="disk"`` cannot be written.
    UnsupportedTensorError
        If a tensor cannot be kept sparse (sharded, quantised, integer).

    Examples
    --------
    >>> import torch, topkast
    >>> model = torch.nn.Linear(100, 10)
    >>> opt = topkast.wrap_optimizer(
    ...     torch.optim.AdamW(model.named_parameters(), 1e-3), fwd=0.9, bwd=0.8)
    >>> int((model.weight != 0).sum())
    100
    >>> model(torch.ones(2, 100)).sum().backward()
    >>> opt.step()
    >>> opt.state[model.weight]["exp_avg"].shape
    torch.Size([1, 200])

    In blocks of 2 × 5 weights:

    >>> model = torch.nn.Linear(100, 10)
    >>> opt = topkast.wrap_optimizer(
    ...     torch.optim.AdamW(model.named_parameters(), 1e-3), fwd=0.9, bwd=0.8, block=(2, 5))
    >>> blocks = model.weight.detach().reshape(5, 2, 20, 5)
    >>> int((blocks != 0).all(dim=(1, 3)).sum())  # out of 100 blocks
    10

    The largest 2 of each 4 inputs of an output; gradients exist for 3 of them:

    >>> model = torch.nn.Linear(100, 10)
    >>> opt = topkast.wrap_optimizer(
    ...     torch.optim.AdamW(model.named_parameters(), 1e-3), fwd=0.5, bwd=0.25, pattern=(2, 4))
    >>> set((model.weight.reshape(-1, 4) != 0).sum(dim=1).tolist())
    {2}

    References
    ----------
    Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020.
    """
    _refuse_arrays(
        fwd=fwd,
        bwd=bwd,
        refresh_every=refresh_every,
        penalty=penalty,
        explore_until=explore_until,
        power=power,
        seed=seed,
    )
    options = Options(
        fwd=fwd,
        bwd=bwd,
        refresh_every=(
            getattr(method, "default_refresh_every", 1) if refresh_every is None else refresh_every
        ),
        penalty=getattr(method, "default_penalty", 1e-4) if penalty is None else penalty,
        penalty_kind=(
            getattr(method, "default_penalty_kind", "l2") if penalty_kind is None else penalty_kind
        ),
        explore=explore,
        explore_until=explore_until,
        distribution=distribution,
        block=block,
        block_score=block_score,
        pattern=pattern,
        dense=dense,
        stacked=stacked,
        method=method,
        reservoir=reservoir,
        reservoir_path=reservoir_path,
        overrides=overrides,
        power=power,
        seed=seed,
        probe=probe,
    )
    if reservoir_path is not None and "disk" not in options.reservoir_kinds():
        raise OptionError(
            "reservoir_path is the folder of reservoir='disk', which no tensor has: pass both, or "
            "neither"
        )
    return _find_adapter(optimizer)(optimizer, options)


def _refuse_arrays(**numbers: Any) -> None:
    """Raise :class:`topkast.OptionError` for an array in place of a number."""
    for name, value in numbers.items():
        if hasattr(value, "dtype") and not isinstance(value, Real):
            raise OptionError(
                f"{name} must be a Python number, got an array ({type(value).__name__}): options "
                "are fixed when the optimizer is wrapped. Pass float(...) or int(...) of it, or "
                "name it in static_args of optax.inject_hyperparams, which makes arrays of all "
                "other arguments"
            )


def _find_adapter(optimizer: Any) -> Callable[[Any, Options], Any]:
    if isinstance(optimizer, type):
        raise AdapterNotFoundError(
            f"wrap_optimizer expects an optimizer, got the class {optimizer.__name__}: "
            f"construct it first, {optimizer.__name__}(...)"
        )
    if inspect.isroutine(optimizer):
        raise AdapterNotFoundError(
            f"wrap_optimizer expects an optimizer, got the function {optimizer.__name__}: call it "
            f"first, {optimizer.__name__}(...)"
        )
    if isinstance(optimizer, TopKASTTransform):
        raise UnsupportedOptimizerError(
            "the rule is wrapped already: use the transform that wrap_optimizer returned"
        )
    entry = find_entry(optimizer)
    if entry is not None:
        wrap: Callable[[Any, Options], Any] = load(entry)
        return wrap
    if all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        return TopKASTTransform  # a rule for plain arrays
    raise AdapterNotFoundError(
        f"no adapter for {type(optimizer).__module__}.{type(optimizer).__qualname__}: expected an "
        f"optimizer of {', '.join(known_packages())} (pip install 'topkast[EXTRA]', "
        f"one of the extras {', '.join(sorted(EXTRAS.values()))}), topkast.SGD, topkast.Adam or "
        "topkast.AdamW, or a rule of your own with init(params) and update(grads, state, params)"
    )
