"""The plan for a dictionary of tensors: what is sparsified and how, from shapes and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topkast._errors import OptionError
from topkast._method import Method
from topkast._options import Options
from topkast._patterns import kept_dense
from topkast._probe import Traits
from topkast._step import Step, decide, noise_key
from topkast._tensors import RankedTensors, rank_tensors
from topkast.functional._wrapped_rule import WrappedRule
from topkast.methods._chosen import method_of
from topkast.selection._distribution import Shape


@dataclass(frozen=True)
class TensorInfo:
    """The shape and dtype of a tensor, for predicates of the option `dense`."""

    shape: Shape
    dtype: Any

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True)
class Plan:
    """Everything that follows from names, shapes and options alone."""

    tensors: list[RankedTensors]
    options: dict[str, Options]  # by key of the tensors, as are traits
    traits: dict[str, Traits]
    copies: frozenset[int]  # numbers of entries of the inner state that started as copies of θ

    @property
    def inside(self) -> set[str]:
        """Names of all sparsified tensors."""
        return {name for ranked in self.tensors for name in ranked.shapes}

    @property
    def forgetting(self) -> list[RankedTensors]:
        """The tensors whose weights outside A become zero at each refresh."""
        methods = [(ranked, self.method(ranked)) for ranked in self.tensors]
        return [ranked for ranked, method in methods if method.forgets and method.refreshes]

    def method(self, ranked: RankedTensors) -> Method:
        """The method that chooses the sets of these tensors."""
        return method_of(self.options[ranked.key])

    def explores(self, ranked: RankedTensors) -> bool:
        """Whether B∖A is updated."""
        return self.method(ranked).explores

    def decide(self, updates: Any) -> dict[str, Step]:
        """The next update of each tensor, by key, after `updates` updates."""
        steps = {}
        for ranked in self.tensors:
            options, traits = self.options[ranked.key], self.traits[ranked.key]
            steps[ranked.key] = decide(
                penalty=options.penalty,
                penalty_kind=options.penalty_kind,
                density=ranked.density,
                ascends=traits.ascends,
                explore_until=options.explore_until if self.explores(ranked) else 0,
                updates=updates,
                betas=traits.betas,
                power=options.power,
                noise=self.method(ranked).noise,
                key=noise_key(options, ranked.key),
            )
        return steps

    def keys(self, params: Mapping[str, Any]) -> set[str]:
        """Keys of the arrays that the inner rule gets."""
        inside = self.inside
        return {ranked.key for ranked in self.tensors} | {n for n in params if n not in inside}


def make_plan(tensors: Mapping[str, TensorInfo], options: Options, rule: WrappedRule) -> Plan:
    """Make the plan for tensors by name; raises what :func:`topkast.wrap_optimizer` documents."""
    options.check_names(tensors)
    dense = kept_dense(tensors, options.dense, options.stacked)
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name not in dense}
    check_any(shapes, tensors, options)
    groups = rank_tensors(shapes, options)
    _check_dtypes(groups, tensors)
    dimensions = {ranked.key: len(ranked.compact_shape) for ranked in groups}
    dimensions |= {name: len(tensor.shape) for name, tensor in tensors.items() if name in dense}
    if options.probe:
        rule.check_contract(dimensions, {ranked.key for ranked in groups})
        rule.probe({ranked.key: next(iter(ranked.shapes.values())) for ranked in groups})
        for ranked in groups:
            if len(ranked.shapes) > 1:
                rule.probe_joint(list(ranked.shapes), ranked.key)
    traits, copies = rule.observe(dimensions)
    if options.power != 1 and copies:
        raise OptionError(
            f"power={options.power} cannot be combined with a rule whose state holds copies of the "
            "weights: pass power=1, or choose a rule without averages, such as Adam"
        )
    return Plan(
        groups,
        {ranked.key: options.for_tensor(ranked.key) for ranked in groups},
        {ranked.key: traits.get(ranked.key, Traits()) for ranked in groups},
        copies,
    )


def check_any(sparse: Mapping[str, Any], tensors: Mapping[str, Any], options: Options) -> None:
    """Raise :class:`topkast.OptionError` if nothing is sparsified, unless ``dense=True``."""
    if not sparse and options.dense is not True:
        raise OptionError(
            f"nothing is left to sparsify of {len(tensors)} tensors: each has fewer than two "
            "dimensions above one, or is kept dense by the option `dense`. Pass dense=False to "
            "sparsify all tensors, or dense=True to confirm that all stay dense"
        )


def _check_dtypes(groups: list[RankedTensors], infos: Mapping[str, TensorInfo]) -> None:
    for ranked in groups:
        dtypes = sorted({str(infos[name].dtype) for name in ranked.shapes})
        if len(dtypes) > 1:
            raise OptionError(
                "distribution='global' ranks tensors together, which must have one dtype, got "
                f"{', '.join(dtypes)}: convert them, or wrap the tensors of each dtype separately"
            )
