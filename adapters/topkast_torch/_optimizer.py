"""Top-KAST as a ``torch.optim.Optimizer`` around another one."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import UnsupportedOptimizerError
from topkast._inspect import Inspection
from topkast._options import GROUP_OPTIONS, Options, check_patterns
from topkast_torch import _checkpoint
from topkast_torch._groups import Core, Group, check_overlap, gather_state, install, prepare
from topkast_torch._probe import probe, step_without_hooks

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class TopKASTOptimizer(torch.optim.Optimizer):
    r"""A ``torch.optim.Optimizer`` that trains sparse weights; made by ``topkast.wrap_optimizer``.

    Training loops, schedulers, gradient clipping and scalers work unchanged. Between steps the
    model's Parameters hold the forward view α; the weights θ are here
    (:func:`topkast.dense_params`). ``p.grad`` vanishes outside B as soon as it is accumulated.

    ``param_groups`` are those of the wrapped optimizer with the options ``fwd``, ``bwd``,
    ``refresh_every``, ``penalty``, ``penalty_kind``, ``explore``, ``explore_until`` and
    ``distribution`` added; all but the sparsities and the distribution may change while training.
    ``state[p]`` is the inner optimizer's, with entries of shape (1, …, \|B\|).

    Examples
    --------
    >>> import torch, topkast
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    >>> opt = topkast.wrap_optimizer(
    ...     torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9),
    ...     fwd=0.9, bwd=0.8, refresh_every=1, dense="2.*")
    >>> isinstance(opt, torch.optim.Optimizer)
    True
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     model(torch.ones(4, 20)).square().mean().backward()
    ...     opt.step()
    >>> [int((p != 0).sum()) for p in model.parameters()]
    [60, 30, 150, 5]
    """

    def __init__(self, inner: torch.optim.Optimizer, options: Options) -> None:
        _check_inner(inner)
        if options.probe:
            probe(inner)
        core = Core(inner, options)
        outer_groups = []
        for inner_group in inner.param_groups:
            group_options = options.override(inner_group)
            core.groups.append(prepare(core, inner_group, group_options))
            outer_groups.append(
                {name: value for name, value in inner_group.items() if name != "dense"}
                | group_options.for_group()
                | {"params": list(inner_group["params"])}
            )
        names = (
            name
            for group, inner_group in zip(core.groups, inner.param_groups, strict=True)
            if "dense" not in inner_group
            for name in group.names
        )
        check_patterns(names, options.dense)
        check_overlap(core.groups, inner.param_groups)
        carried = [
            gather_state(inner.state, group, inner_group["params"])
            for group, inner_group in zip(core.groups, inner.param_groups, strict=True)
        ]
        super().__init__(outer_groups, inner.defaults)
        # Nothing was changed so far, and nothing below fails.
        for name in _HOOKS:
            setattr(self, name, getattr(inner, name))
            setattr(inner, name, OrderedDict())
        self._core = core
        inner.state = defaultdict(dict)
        for group, inner_group, state in zip(core.groups, inner.param_groups, carried, strict=True):
            inner.state.update(state)
            install(group, inner_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the weights in B, and of A and B when a refresh is due.

        Parameters
        ----------
        closure
            Reevaluates the model and returns the loss, as for any PyTorch optimizer.

        Returns
        -------
        object
            What `closure` returned, or None.

        Raises
        ------
        NonFiniteError
            If a weight is NaN or infinite when A and B are chosen anew.
        OptionError
            If ``fwd``, ``bwd`` or ``distribution`` of a group was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        core = self._core
        self._push_options()
        moved = any(
            param.grad is not None for group in self.param_groups for param in group["params"]
        )
        for group, options in zip(core.groups, self.param_groups, strict=True):
            for compact in group.compact:
                compact.adopt_changes()
                compact.load_gradient(penalty=options["penalty"], kind=options["penalty_kind"])
        try:
            step_without_hooks(core.inner)
        except BaseException:
            for compact in core.compact:
                compact.unload_gradient()
            raise
        if not moved:
            return
        core.updates += 1
        for group, options in zip(core.groups, self.param_groups, strict=True):
            for compact in group.compact:
                if compact.values.grad is not None:
                    compact.settle()
                compact.set_exploring(options["explore_until"], core.updates)
            if core.updates % options["refresh_every"] == 0:
                self._refresh(group, options)

    def _push_options(self) -> None:
        """Learning rates and the like may have been changed here, by a scheduler, say."""
        core = self._core
        for group, inner, outer in zip(
            core.groups, core.inner.param_groups, self.param_groups, strict=True
        ):
            group.check_fixed(outer)
            inner.update((name, value) for name, value in outer.items() if name not in _NOT_PUSHED)

    def _refresh(self, group: Group, values: Mapping[str, Any]) -> None:
        options = self._core.options.override(values)
        for compact in group.compact:
            state = self._core.inner.state.get(compact.values, {})
            compact.refresh(options, self._core.updates, state, group.initial)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, sparsified under the wrapper's options and those that it has of its own.

        Raises
        ------
        OptionError, NonFiniteError, UnsupportedTensorError
            As ``topkast.wrap_optimizer``; no group is added then.
        """
        if not hasattr(self, "_core"):  # called by the constructor of the base class
            super().add_param_group(param_group)
            return
        core = self._core
        options = core.options.override(param_group)
        super().add_param_group(param_group)
        try:
            param_group |= options.for_group()
            prepared = prepare(core, param_group, options)
            check_overlap([*core.groups, prepared], self.param_groups)
            inner_group = {
                name: value for name, value in param_group.items() if name not in _NOT_PUSHED
            }
            inner_group["params"] = prepared.inner_params(param_group["params"])
            if "param_names" in param_group:
                inner_group["params"] = list(
                    zip(prepared.inner_names(), inner_group["params"], strict=True)
                )
            core.inner.add_param_group(inner_group)
        except Exception:
            self.param_groups.pop()
            raise
        param_group.pop("dense", None)
        core.groups.append(prepared)
        for compact in prepared.compact:
            compact.install()

    @property
    def state(self) -> Any:
        """State of the inner optimizer, by Parameter of the model."""
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for param, given in self._pairs():
            if given in self._core.inner.state:
                state[param] = self._core.inner.state[given]
        return state

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        if hasattr(self, "_core"):  # the constructor of the base class sets an empty one
            given: dict[Tensor, Tensor] = dict(self._pairs())
            inner = self._core.inner.state
            inner.clear()
            inner.update({given.get(param, param): entries for param, entries in state.items()})

    def state_dict(self) -> dict[str, Any]:
        """State of the inner optimizer on B, options, and under ``"topkast"`` the sets and θ.

        Tensors, numbers, strings and containers of them: ``torch.load`` with
        ``weights_only=True`` reads it.

        Returns
        -------
        dict
            ``"state"`` and ``"param_groups"`` as of any PyTorch optimizer, numbered by compact
            tensor; ``"topkast"``.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with torch.no_grad():
            state_dict = _checkpoint.save(self._core, self.param_groups)
        for after in self._optimizer_state_dict_post_hooks.values():
            state_dict = after(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; writes the saved forward view into the Parameters.

        Raises
        ------
        StateDictError
            If it is corrupt or fits other tensors or sparsities; nothing is changed then.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        with torch.no_grad():
            _checkpoint.load(self._core, self.param_groups, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "_core": self._core,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self._core.inner!r}"

    def __topkast_inspect__(self, params: None = None) -> Inspection:
        core = self._core
        theta: dict[str, Tensor] = {}
        held: dict[str, int] = {}
        with torch.no_grad():
            for group, outer in zip(core.groups, self.param_groups, strict=True):
                for name, param in zip(group.names, outer["params"], strict=True):
                    theta[name] = param.detach()
                    if name not in group.owner:
                        theta[name] = theta[name].clone()
                        entries = core.inner.state.get(param, {}).values()
                        held[name] = sum(
                            entry.numel() * entry.element_size()
                            for entry in (*entries, param)
                            if isinstance(entry, Tensor)
                        )
                for compact in group.compact:
                    theta |= compact.block.unflatten(compact.theta().clone())
                    held[compact.block.key] = compact.held_bytes(
                        core.inner.state.get(compact.values, {})
                    )
        compacts = list(core.compact)
        return Inspection(
            core.updates,
            theta,
            {compact.block.key: compact.block for compact in compacts},
            {compact.block.key: compact.support for compact in compacts},
            {compact.block.key: compact.changed for compact in compacts},
            held,
        )

    def _pairs(self) -> Iterator[tuple[Parameter, Parameter]]:
        """Each Parameter of the model, with what the inner optimizer holds in its place."""
        for group, outer in zip(self._core.groups, self.param_groups, strict=True):
            for name, param in zip(group.names, outer["params"], strict=True):
                yield param, group.owner[name].values if name in group.owner else param


_NOT_PUSHED = frozenset({"params", "param_names", "dense", *GROUP_OPTIONS})


def wrap(optimizer: Any, options: Options) -> TopKASTOptimizer:
    """Adapter of ``topkast.wrap_optimizer`` for the package ``torch``."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedOptimizerError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__qualname__}"
        )
    return TopKASTOptimizer(optimizer, options)


def _check_inner(inner: torch.optim.Optimizer) -> None:
    if isinstance(inner, TopKASTOptimizer):
        raise UnsupportedOptimizerError("this optimizer is wrapped already")
    if hasattr(inner.step, "_wrapped_by_lr_sched"):
        raise UnsupportedOptimizerError(
            f"a learning-rate scheduler was built on this {type(inner).__name__} and would not "
            "reach the wrapper: wrap the optimizer first, then build the scheduler on the result"
        )
