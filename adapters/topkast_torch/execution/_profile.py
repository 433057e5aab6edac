"""What an execution has to know about the inner optimizer, and the trials that find it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from topkast.adapter import Options, Traits
from topkast_torch.distributed._sharding import is_sharded
from topkast_torch.inner._fresh import LEAST_LEARNING_RATE
from topkast_torch.inner._inner_state import Layout
from topkast_torch.inner._learn_layout import device_of, learn_layout
from topkast_torch.inner._probe import find_traits, probe, probe_parts


@dataclass(frozen=True)
class InnerProfile:
    """What trials found about the inner optimizer, for tensors of one number of dimensions."""

    layout: Layout
    traits: Traits

    @property
    def needs_ages(self) -> bool:
        """Whether the step of an entry depends on how long it has been in B."""
        return self.traits.betas is not None or not self.layout.starts_suffice


class Trials:
    """Trials of an inner optimizer, made once for groups that differ in the learning rate alone."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._inner = inner
        self._found: list[tuple[Any, dict[int, InnerProfile]]] = []

    def find_profiles(
        self, param_group: Mapping[str, Any], shapes: list[tuple[int, ...]], options: Options
    ) -> dict[int, InnerProfile]:
        """Profiles of the inner optimizer for `shapes`, by number of dimensions of a tensor."""
        joint = options.distribution == "global" and len(shapes) > 1
        sharded = any(map(is_sharded, param_group["params"]))
        settings = _plain_settings(param_group)
        key = settings, device_of(param_group), sorted(set(shapes)), joint, sharded, options.probe
        for known, profiles in self._found:
            if settings is not None and known == key:
                return dict(profiles)
        profiles = self._find(param_group, shapes, options, joint=joint, sharded=sharded)
        self._found.append((key, profiles))
        return profiles

    def _find(
        self,
        param_group: Mapping[str, Any],
        shapes: list[tuple[int, ...]],
        options: Options,
        *,
        joint: bool,
        sharded: bool,
    ) -> dict[int, InnerProfile]:
        if options.probe and sharded:
            probe_parts(self._inner, param_group)
        if options.probe:
            probe(self._inner, param_group, shapes, joint=joint)
        profiles = {}
        for dimensions in {len(shape) for shape in shapes}:
            layout = learn_layout(self._inner, param_group, dimensions)
            traits = find_traits(self._inner, param_group, layout, dimensions)
            profiles[dimensions] = InnerProfile(layout, traits)
        return profiles

    def find_layout(
        self,
        param_group: Mapping[str, Any],
        dimensions: int,
        profiles: Mapping[int, InnerProfile],
    ) -> Layout:
        """The layout of the inner optimizer's entries for tensors of some number of dimensions."""
        if dimensions in profiles:
            return profiles[dimensions].layout
        return learn_layout(self._inner, param_group, dimensions)


def _plain_settings(param_group: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of a group, without an ordinary learning rate; None if they hold objects."""
    settings = {
        name: value for name, value in param_group.items() if name not in ("params", "param_names")
    }
    rate = settings.get("lr")
    if isinstance(rate, float) and LEAST_LEARNING_RATE <= rate <= 1:
        del settings["lr"]
        settings.pop("initial_lr", None)
    return settings if _is_plain(settings) else None


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers and strings, which compare as such."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
