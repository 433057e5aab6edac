"""``cost``: FLOPs and bytes of sparse training, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from topkast._adapters import find_entry, load
from topkast._errors import AdapterNotFoundError, OptionError
from topkast._method import Method
from topkast._options import Distribution, Options, Overrides, ReservoirKind
from topkast._patterns import Dense, Patterns
from topkast.analysis.costs._arguments import (
    check_choice,
    check_fraction,
    find_formula,
    find_pruning,
    make_options,
)
from topkast.analysis.costs._formulas import Formula, Products, Schedule
from topkast.analysis.costs._layers import Layer, Sets, is_count, sets_of
from topkast.analysis.costs._memory import OPTIMIZERS, Storage, dense_bytes, sparse_bytes
from topkast.analysis.costs._methods import describe_method
from topkast.analysis.costs._report import Cost, LayerCost


def cost(
    model: Any,
    example: Any = None,
    /,
    *,
    method: str | Method = "topkast",
    fwd: float | None = None,
    bwd: float | None = None,
    distribution: Distribution = "uniform",
    dense: Dense = None,
    block: tuple[int, int] | None = None,
    stacked: Patterns = None,
    overrides: Overrides = None,
    refresh_every: int | None = None,
    steps: int | None = None,
    window: tuple[int, int] | None = None,
    initial: float | None = None,
    dense_share: float | None = None,
    sample_ratio: float | None = None,
    optimizer: str = "adam",
    execution: Literal["sparse", "masked"] = "sparse",
    reservoir: ReservoirKind = "device",
) -> Cost:
    r"""Compute what training a model with a method of sparse training costs: FLOPs and bytes.

    FLOPs follow the convention of RigL (Evci et al., 2020): the products of linear and
    convolutional layers alone, a multiplication and an addition for each weight and position, for
    one sample. The backward pass of a dense layer takes twice its forward pass. Densities are those
    of :func:`topkast.wrap_optimizer` with the same options, as exact counts. Bytes are those that
    :func:`topkast.summary` reports after a step, when the sets are largest.

    Parameters
    ----------
    model
        Shape of each tensor by name, ``{"hidden.weight": (300, 784)}``, or a
        :class:`topkast.analysis.Layer` where a sample uses each weight more than once. Or a
        ``torch.nn.Module``, with `example`.
    example
        An input of the ``torch.nn.Module``, or a tuple of inputs. The first axis of the first
        tensor numbers samples. It is run forward once.
    method
        Name of the method: one of ``"dense"``, ``"topkast"``, ``"static"``, ``"set"``,
        ``"deepr"``, ``"dsr"``, ``"snip"``, ``"mest"``, ``"smet"``, ``"rigl"``, ``"srigl"``,
        ``"granet"``, ``"gse"``, ``"snfs"``, ``"dnw"``, ``"iht"``, ``"acdc"``, ``"gmp"``,
        ``"gmp_dense_gradient"``. Or one of :mod:`topkast.methods`, which sets `refresh_every`,
        `window`, `initial`, `dense_share` and `sample_ratio` unless they are given.
    fwd
        Forward sparsity, in [0, 1): the final one, if it changes. Needed except for ``"dense"``.
    bwd
        Backward sparsity, ``0 <= bwd <= fwd``, of ``"topkast"``, which needs it, and of
        ``"static"``, where None means `fwd`. Other methods train A alone or all weights: leave it
        out, or pass the one that :func:`topkast.wrap_optimizer` asks for.
    distribution, dense, block, stacked, overrides
        As for :func:`topkast.wrap_optimizer`, without ``"global"``. Of overrides, ``fwd``, ``bwd``,
        ``block`` and ``reservoir`` matter.
    refresh_every
        Steps between two refreshes, ΔT. None: 100 for RigL and SRigL, 1000 for GSE and GMP, 4000
        for GraNet. Other formulas do not depend on it.
    steps
        Steps of the run, which GMP and GraNet need, and a :class:`topkast.methods.IHT` whose
        sparsity changes: their FLOPs are means over the steps. A :class:`topkast.methods.ACDC` has
        its exact share of dense steps with it, and that of two phases in the middle without it.
    window
        First and last step of the cubic schedule of GMP and GraNet, whose changes are counted from
        the first. None: from 10/32 to 25/32 of the steps for GMP, over the first three tenths for
        GraNet; of an object, its own schedule at each refresh.
    initial
        Sparsity at the start of that schedule. None: 0 for GMP, 0.5 for GraNet.
    dense_share
        Share of AC/DC's steps in dense phases. None: half.
    sample_ratio
        Positions at which GSE computes the gradient at a refresh, for each weight of A: γ. None: 1.
    optimizer
        The inner optimizer: ``"sgd"``, ``"momentum"``, ``"adam"`` or ``"adamw"``.
    execution
        ``"sparse"``: :func:`topkast.sparsify` has made the layers of all sparsified tensors sparse;
        ``"masked"``: of none. It changes the bytes; FLOPs are the useful ones in both cases.
    reservoir
        Where weights outside B are, for methods that keep them; see
        :func:`topkast.wrap_optimizer`.

    Returns
    -------
    Cost
        Prints as a table; ``fraction`` is the fraction of dense training.

    Raises
    ------
    OptionError
        If the method is not known, an option is out of range or does not belong to the method, a
        name matches no tensor, or the model does not accept the example.
    AdapterNotFoundError
        If `model` is neither a mapping nor a model of a framework with an adapter.

    Examples
    --------
    The last layer is dense, as in the paper:

    >>> import topkast
    >>> shapes = {"hidden": (300, 784), "output": (10, 300), "bias": (300,)}
    >>> print(topkast.cost(shapes, fwd=0.9, bwd=0.8, dense="output"))
    ... # doctest: +NORMALIZE_WHITESPACE
    layer   shape    positions     |A|     |B|  forward  training  of dense
    hidden  300×784          1  23,520  47,040     47 k     188 k    0.1333
    output  10×300           1   3,000   3,000      6 k      18 k    1.0000
    in all                      26,820  50,340     53 k     206 k    0.1442
    topkast, 2 f_A + f_B: 0.1442 of the training FLOPs of dense training, 0.1113 of the forward
    FLOPs
    bytes: values 201,360, gradient 201,360, state 402,720, indices 188,160, layouts 164,640, ages
    94,080, reserve 47,040, reservoir 940,800; 2,240,160 in all, dense 3,816,000 (0.59 ×), adam

    A convolution with 32 × 32 output positions:

    >>> conv = {"conv": topkast.analysis.Layer((64, 64, 3, 3), positions=32 * 32)}
    >>> round(topkast.cost(conv, method="rigl", fwd=0.9, refresh_every=100).fraction, 4)
    0.103
    >>> round(topkast.cost(conv, method=topkast.methods.RigL(), fwd=0.9).fraction, 4)
    0.103

    References
    ----------
    Evci et al., "Rigging the Lottery", 2020; Jayakumar et al., "Top-KAST", 2020.
    """
    if steps is not None and not (is_count(steps) and steps):
        raise OptionError(f"steps must be a positive integer, got {steps!r}")
    method_name, settings = describe_method(method, steps, refresh_every)
    formula = find_formula(method_name, fwd, bwd, overrides)
    if refresh_every is None:
        refresh_every = settings.get("refresh_every")
    sample_ratio = settings.get("sample_ratio", 1.0) if sample_ratio is None else sample_ratio
    dense_share = settings.get("dense_share", 0.5) if dense_share is None else dense_share
    options = make_options(
        method_name,
        formula,
        fwd=fwd,
        bwd=bwd,
        distribution=distribution,
        dense=dense,
        block=block,
        stacked=stacked,
        overrides=overrides,
        refresh_every=refresh_every,
        reservoir=reservoir,
    )
    schedule = Schedule(
        options.refresh_every,
        check_fraction("sample_ratio", sample_ratio, max=None),
        check_fraction("dense_share", dense_share, max=1),
    )
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    check_choice("execution", execution, ("sparse", "masked"))
    storage = Storage(
        OPTIMIZERS[optimizer],
        is_masked=execution == "masked",
        keeps_resting=formula.keeps_resting,
        has_momentum=formula.has_momentum,
        has_reserve=method_name == "topkast" and getattr(method, "takes_largest", True),
    )
    pruning = find_pruning(
        method_name,
        formula,
        options,
        steps=steps,
        window=window,
        initial=initial,
        linear=settings.get("linear"),
        cubic=settings.get("cubic"),
    )
    layers = _layers_of(model, example)
    sizes = _sizes_of(layers, options, formula, pruning)
    rows = []
    for name, layer in layers.items():
        dense_parts = dense_bytes(layer, storage.optimizer)
        sets, parts, training = Sets.full(layer), dense_parts, 3 * layer.flops
        if name in sizes:
            sets, mean, largest = sizes[name]
            products = Products(layer.flops_of(mean), layer.flops_of(sets.backward), layer.flops)
            training = formula.training(products, schedule)
            kind = options.for_tensor(name).reservoir
            parts = sparse_bytes(layer, largest, storage, kind)
        row = LayerCost(
            name=name,
            shape=layer.shape,
            positions=float(layer.positions),
            forward=sets.forward,
            backward=sets.backward,
            forward_flops=float(layer.flops_of(sets.forward)),
            training_flops=float(training),
            dense_forward_flops=float(layer.flops),
            bytes=parts,
            dense_bytes=sum(dense_parts.values()),
        )
        rows.append(row)
    return Cost(method_name, formula.text, optimizer, tuple(rows))


class _Sizes(NamedTuple):
    """Sizes of the sets of one tensor: final ones, the mean of |A| over the steps, largest ones."""

    final: Sets
    mean: Fraction
    largest: Sets


def _sizes_of(
    layers: Mapping[str, Layer],
    options: Options,
    formula: Formula,
    pruning: Sequence[tuple[int, Options]],
) -> dict[str, _Sizes]:
    """Sizes of the sets of the sparsified tensors, by name."""
    final = sets_of(layers, options, formula.trains)
    sizes = {}
    steps = sum(count for count, _ in pruning)
    stages = [(count, sets_of(layers, stage, formula.trains)) for count, stage in pruning]
    for name, sets in final.items():
        mean, largest = Fraction(sets.forward), sets
        if formula.has_dense_phases:
            largest = Sets.full(layers[name])
        elif stages:
            mean = Fraction(sum(count * stage[name].forward for count, stage in stages), steps)
            largest = max((stage[name] for _, stage in stages), key=lambda stage: stage.forward)
        if formula.holds is not None:
            held = layers[name].size if formula.holds == "all" else largest.forward
            largest = replace(largest, backward=held)
        sizes[name] = _Sizes(sets, mean, largest)
    return sizes


def _layers_of(model: Any, example: Any) -> dict[str, Layer]:
    """The tensors of a model by name."""
    if isinstance(model, Mapping):
        if example is not None:
            raise OptionError(
                "example is an input of a torch.nn.Module: for shapes, give the positions of each "
                "layer as topkast.analysis.Layer(shape, positions=...)"
            )
        if not model:
            raise OptionError("the mapping has no tensors: expected {name: shape}")
        return {
            name: shape if isinstance(shape, Layer) else Layer(shape)
            for name, shape in model.items()
        }
    entry = find_entry(model)
    if entry is None:
        raise AdapterNotFoundError(
            f"cost expects a mapping {{name: shape}} or a torch.nn.Module with an example, got "
            f"{type(model).__module__}.{type(model).__qualname__}: give the shapes of its tensors, "
            "as topkast.analysis.Layer(shape, positions=...) for convolutions and sequences"
        )
    layers: dict[str, Layer] = load(entry, "measure_layers")(model, example)
    return layers
