"""What of a dictionary of tensors is sparsified, and how: a function of shapes and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topkast._errors import OptionError
from topkast._options import Options, kept_dense
from topkast._probe import Traits
from topkast._tensors import RankedTensors, rank_tensors
from topkast.functional._wrapped_rule import WrappedRule
from topkast.selection._distribution import Shape


@dataclass(frozen=True)
class TensorInfo:
    """What a predicate for `dense` is given of a tensor."""

    shape: Shape
    dtype: Any

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True)
class Plan:
    """What follows from names, shapes and options alone."""

    tensors: list[RankedTensors]
    options: dict[str, Options]  # by the key of the tensors, like the next
    traits: dict[str, Traits]
    copies: frozenset[int]  # entries of the inner state that started as copies of their tensor

    @property
    def inside(self) -> set[str]:
        """Names of all sparsified tensors."""
        return {name for ranked in self.tensors for name in ranked.shapes}

    def keys(self, params: Mapping[str, Any]) -> set[str]:
        """Keys of what the inner rule is given."""
        inside = self.inside
        return {ranked.key for ranked in self.tensors} | {n for n in params if n not in inside}


def make_plan(tensors: Mapping[str, TensorInfo], options: Options, rule: WrappedRule) -> Plan:
    """The plan for tensors by name; raises what :func:`topkast.wrap_optimizer` documents."""
    options.check_names(tensors)
    dense = kept_dense(tensors, options.dense, options.stacked)
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name not in dense}
    check_any(shapes, tensors, options)
    ranked = rank_tensors(shapes, options)
    _check_global(ranked, tensors)
    rows = {one.key: len(one.compact_shape) for one in ranked}
    rows |= {name: len(tensor.shape) for name, tensor in tensors.items() if name in dense}
    if options.probe:
        rule.probe({one.key: next(iter(one.shapes.values())) for one in ranked})
        for one in ranked:
            if len(one.shapes) > 1:
                rule.probe_joint(list(one.shapes), one.key)
    traits, copies = rule.observe(rows)
    return Plan(
        ranked,
        {one.key: options.for_tensor(one.key) for one in ranked},
        {one.key: traits.get(one.key, Traits()) for one in ranked},
        copies,
    )


def check_any(sparse: Mapping[str, Any], tensors: Mapping[str, Any], options: Options) -> None:
    """Raise :class:`topkast.OptionError` if nothing is sparsified, unless that was asked for."""
    if not sparse and options.dense is not True:
        raise OptionError(
            f"nothing is left to sparsify of {len(tensors)} tensors: each has fewer than two "
            "dimensions above one, or is kept dense by the option `dense`. dense=False "
            "sparsifies all, dense=True says that this is meant"
        )


def _check_global(tensors: list[RankedTensors], infos: Mapping[str, TensorInfo]) -> None:
    for ranked in tensors:
        dtypes = sorted({str(infos[name].dtype) for name in ranked.shapes})
        if len(dtypes) > 1:
            raise OptionError(
                "distribution='global' ranks tensors together, which must have one dtype, got "
                f"{', '.join(dtypes)}: convert them, or wrap those of each dtype by themselves"
            )
