"""Top-KAST as a ``torch.optim.Optimizer`` around another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter

from topkast import MismatchError, OptionError, UnsupportedOptimizerError
from topkast.adapter import Inspection, Method, Options
from topkast_torch._reservoirs import discarding
from topkast_torch.checkpoint._load import load
from topkast_torch.checkpoint._save import save
from topkast_torch.distributed._replicas import check_new
from topkast_torch.execution._execution import Execution
from topkast_torch.execution._profile import Trials
from topkast_torch.inner._fresh import DISABLED_METHODS, class_name
from topkast_torch.optimizer._checks import check_inner, check_names, name_params
from topkast_torch.optimizer._groups import (
    Group,
    WrapperState,
    check_overlap,
    prepare_group,
    restrict_state,
    watched,
)
from topkast_torch.optimizer._inner_optimizer import Refusal, clear_state
from topkast_torch.optimizer._inspection import inspect
from topkast_torch.optimizer._loop import step
from topkast_torch.optimizer._state_view import StateView
from topkast_torch.sparse._parametrizations import check_parametrizations


class TopKASTOptimizer(torch.optim.Optimizer):
    r"""A ``torch.optim.Optimizer`` that trains sparse weights; made by ``topkast.wrap_optimizer``.

    Training loops, schedulers, gradient clipping and scalers work unchanged. Between steps the
    model's Parameters hold the forward view α, and the optimizer holds the weights θ
    (:func:`topkast.dense_params`). ``p.grad`` is zeroed outside B as soon as it is accumulated.

    ``param_groups`` are those of the wrapped optimizer with the options ``fwd``, ``bwd``,
    ``refresh_every``, ``penalty``, ``penalty_kind``, ``explore``, ``explore_until``,
    ``distribution``, ``block``, ``block_score`` and ``pattern`` added; all but the sparsities, the
    distribution, the block and the pattern may change during training.
    ``state[p]`` is the inner optimizer's state, with entries of shape (1, …, \|B\|). Other methods
    and attributes of the wrapped optimizer, such as ``train`` and ``eval`` of schedule-free ones,
    are available too: they act on the values on B, and the new values on A reach the model.

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
        check_inner(inner)
        state = WrapperState(inner, options)
        options_by_group, trials = [], Trials(inner)
        with discarding(state.executions):
            for param_group in inner.param_groups:
                group_options = options.override(param_group)
                state.groups.append(prepare_group(state, param_group, group_options, trials))
                options_by_group.append(group_options)
            check_names(state.groups, inner.param_groups, options)
            check_overlap(state.groups)
            masked = [group.masked() for group in state.groups]
            check_parametrizations(
                {name: param for group in masked for name, param in group.items()}
            )
            check_new(zip(state.groups, options_by_group, strict=True))
            restricted = [
                restrict_state(inner.state, group, group.params) for group in state.groups
            ]
        super().__init__([Parameter(torch.zeros(0))], inner.defaults)
        del self.__dict__["_early_groups"]
        # So far, none of the user's objects was changed. Nothing below fails.
        self._wrapper_state = state
        state.handle.take_over(self)
        clear_state(inner, state.stores)
        for group, param_group, group_options, entries in zip(
            state.groups, inner.param_groups, options_by_group, restricted, strict=True
        ):
            inner.state.update(entries)
            self._install(group, param_group, group_options.for_group())

    @staticmethod
    def _install(group: Group, param_group: dict[str, Any], options: Mapping[str, Any]) -> None:
        param_group.pop("dense", None)
        if isinstance(param_group.get("method"), Method):
            del param_group["method"]  # executions hold the method, which cannot be saved
        param_group.update(options)
        group.checked = watched(param_group)
        with torch.no_grad():
            for execution in group.executions:
                execution.install()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the wrapped optimizer, which hold the Parameters of the model."""
        state = self._find_wrapper_state()
        if state is not None:
            groups: list[dict[str, Any]] = state.inner.param_groups
            return groups
        # Here the base class is being constructed; otherwise `self` is a stand-in that was made
        # without __init__ (by Lightning), and its own __getattr__ answers.
        try:
            early: list[dict[str, Any]] = self.__dict__["_early_groups"]
        except KeyError:
            raise AttributeError("param_groups") from None
        return early

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        state = self._find_wrapper_state()
        if state is not None:
            state.inner.param_groups = groups
        else:
            self.__dict__["_early_groups"] = groups

    def _find_wrapper_state(self) -> WrapperState | None:
        """The state of the wrapper, None while the base class is being constructed."""
        state: WrapperState | None = getattr(self, "_wrapper_state", None)
        return state

    @property
    def state(self) -> Any:
        """State of the inner optimizer, keyed by the model's Parameters; a live view."""
        return StateView(self._wrapper_state)

    @state.setter
    def state(self, entries: Mapping[Any, Any]) -> None:
        if self._find_wrapper_state() is not None:  # the base class's constructor sets an empty one
            new_entries = dict(entries)
            view = self.state
            for key in list(view):
                del view[key]
            view.update(new_entries)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights in B, and A and B if a refresh is due.

        A step that raises before the inner optimizer has moved a weight changes nothing.

        Parameters
        ----------
        closure
            Re-evaluates the model and returns the loss, as for any PyTorch optimizer.

        Returns
        -------
        object
            The loss that `closure` returned, or None.

        Raises
        ------
        OptionError
            If an option of a group has an invalid value, or ``fwd``, ``bwd``, ``distribution``,
            ``block`` or ``pattern`` was changed.
        MismatchError
            If other code has written weights outside A, or replaced or converted Parameters.
        UnsupportedTensorError
            If a gradient is a sparse tensor.
        NonFiniteError
            If a weight is NaN or infinite at a refresh. The weights have moved then, but no set has
            changed; repair them and call ``step`` again.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _step_uncompiled(self)
        else:
            self._step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any PyTorch optimizer; from here on, changed options of groups apply."""
        super().zero_grad(set_to_none)
        state = self._find_wrapper_state()
        if state is None:  # a stand-in that was made without __init__
            return
        with suppress(OptionError, MismatchError):  # which the next step raises
            for group, param_group in zip(state.groups, self.param_groups, strict=True):
                group.check(param_group, state.options)
            for execution, param_group in self._executions_with_options():
                # The backward pass drops what the next step does not need of a gradient.
                execution.decide(param_group, state.updates, overdue=state.overdue)

    @torch.no_grad()
    def _step(self) -> None:
        state = self._wrapper_state
        pairs = list(self._executions_with_options())
        for group, param_group in zip(state.groups, self.param_groups, strict=True):
            group.check(param_group, state.options)
        step(state, pairs)

    def _executions_with_options(self) -> Iterator[tuple[Execution, dict[str, Any]]]:
        count, expected = len(self.param_groups), len(self._wrapper_state.groups)
        if count != expected:
            raise MismatchError(
                f"param_groups has {count} groups, but the optimizer has {expected}: add groups "
                "with add_param_group; to remove one, build and wrap a new optimizer"
            )
        for group, param_group in zip(self._wrapper_state.groups, self.param_groups, strict=True):
            for execution in group.executions:
                yield execution, param_group

    @torch.no_grad()
    def _accept_external_writes(self) -> None:
        """Accept external writes before the weights are read.

        Raises nothing: the next step refuses writes that cannot be accepted.
        """
        for execution in self._wrapper_state.executions:
            with suppress(MismatchError):
                execution.accept_external_writes()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, sparsified under the wrapper's options and the group's own.

        Raises
        ------
        OptionError, NonFiniteError, UnsupportedTensorError, UnsupportedOptimizerError
            As in ``topkast.wrap_optimizer``; no group is added then.
        """
        state = self._find_wrapper_state()
        if state is None:  # called by the constructor of the base class
            super().add_param_group(param_group)
            return
        options = state.options.override(param_group)
        name_params(param_group, len(state.groups), self.param_groups)
        super().add_param_group(param_group)  # checks the group and fills in defaults
        try:
            group = prepare_group(state, param_group, options, Trials(state.inner))
            with discarding(group.executions):
                check_overlap([*state.groups, group])
                check_parametrizations(group.masked())
                check_new([(group, options)])
                self._add_inner_group(param_group, group)
        except Exception:
            del self.param_groups[len(state.groups) :]
            raise
        state.groups.append(group)
        self._install(group, param_group, options.for_group())

    def _add_inner_group(self, param_group: dict[str, Any], group: Group) -> None:
        """Call the inner optimizer's own ``add_param_group``, if any, with compact vectors."""
        inner = self._wrapper_state.inner
        if type(inner).add_param_group is torch.optim.Optimizer.add_param_group:
            return
        self.param_groups.pop()
        try:
            with self._wrapper_state.handle.with_compact_params():
                param_group["params"] = group.inner_params()
                type(inner).add_param_group(inner, param_group)
        finally:
            param_group["params"] = group.params

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of the inner optimizer's state on B, the options, the sets and θ.

        It has only tensors, numbers, strings and containers of them, so that
        ``torch.load(weights_only=True)`` reads it.

        Returns
        -------
        dict
            ``"state"`` and ``"param_groups"``, as for any PyTorch optimizer. Top-KAST's entries
            are under ``"topkast"`` in the state of each Parameter and in the first group.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._accept_external_writes()
        with torch.no_grad():
            state_dict = save(self._wrapper_state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; writes the saved forward view into the Parameters.

        Raises
        ------
        StateDictError
            If it is corrupt, or has other tensors or sparsities; nothing is changed then.
        ReservoirError
            If it needs a file of ``reservoir="disk"`` that is missing, damaged, or of another run.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        with torch.inference_mode(False), torch.no_grad():
            load(self._wrapper_state, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __topkast_unwrap__(self, weights: Any) -> torch.optim.Optimizer:
        """See :func:`topkast.unwrap`."""
        from topkast_torch.optimizer._unwrap import unwrap

        return unwrap(self, weights)

    def retire(self) -> None:
        """Disable this wrapper, after :func:`topkast.unwrap`."""
        refusal = Refusal(
            "this TopKASTOptimizer was ended by topkast.unwrap: use the optimizer that it returned"
        )
        for name in DISABLED_METHODS:
            setattr(self, name, refusal)

    def _find_attribute(self, name: str) -> Any:
        """An attribute of the wrapped optimizer; its methods act on the values on B."""
        state = self.__dict__.get("_wrapper_state")
        if state is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            value = getattr(state.inner, name)
        except AttributeError:
            raise AttributeError(
                f"neither {type(self).__name__} nor its {class_name(state.inner)} has an attribute "
                f"{name!r}"
            ) from None
        if not callable(value) or isinstance(value, Refusal):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            self._accept_external_writes()
            try:
                with state.handle.with_compact_params():
                    return value(*arguments, **named)
            finally:
                with torch.no_grad():
                    for execution in state.executions:
                        execution.write_forward_view()

        return call

    def __getstate__(self) -> dict[str, Any]:
        self._wrapper_state.check_whole()
        self._accept_external_writes()
        return {"defaults": self.defaults, "_wrapper_state": self._wrapper_state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._wrapper_state = state["_wrapper_state"]
        super().__setstate__({"defaults": state["defaults"]})

    def __repr__(self) -> str:
        return (
            super()
            .__repr__()
            .replace(
                f"{type(self).__name__} (",
                f"{type(self).__name__} around {class_name(self._wrapper_state.inner)} (",
                1,
            )
        )

    def __topkast_inspect__(self, params: None = None) -> Inspection:
        self._accept_external_writes()
        return inspect(self._wrapper_state)

    if not TYPE_CHECKING:  # so that type checkers find misspelt names
        __getattr__ = _find_attribute


_step_uncompiled: Any = torch.compiler.disable(TopKASTOptimizer._step)


def wrap(optimizer: Any, options: Options) -> TopKASTOptimizer:
    """Implements ``topkast.wrap_optimizer`` for the package ``torch``."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedOptimizerError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__qualname__}"
        )
    if options.reservoir_path is not None:  # the same folder if the process changes its own
        options = replace(options, reservoir_path=Path(options.reservoir_path).absolute())
    with torch.inference_mode(False):  # inference tensors cannot be trained
        return TopKASTOptimizer(optimizer, options)
