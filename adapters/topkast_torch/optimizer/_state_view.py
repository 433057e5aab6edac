"""``optimizer.state``: the inner optimizer's state, keyed by the model's Parameters."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topkast_torch.optimizer._groups import WrapperState


class StateView(MutableMapping[Any, Any]):
    """A live view: reading and writing it reads and writes the inner optimizer's ``state``.

    It is true even if empty: libraries take a step to fill an empty state before they ask for a
    state dict, and that would move weights.
    """

    def __init__(self, wrapper_state: WrapperState) -> None:
        self._wrapper_state = wrapper_state

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, param: Any) -> Any:
        return self._wrapper_state.inner.state[self._inner_param(param)]

    def __setitem__(self, param: Any, entries: Any) -> None:
        self._wrapper_state.inner.state[self._inner_param(param)] = entries

    def __delitem__(self, param: Any) -> None:
        del self._wrapper_state.inner.state[self._inner_param(param)]

    def __contains__(self, param: Any) -> bool:
        return self._inner_param(param) in self._wrapper_state.inner.state

    def __iter__(self) -> Iterator[Any]:
        inner = self._wrapper_state.inner.state
        pairs = list(self._wrapper_state.param_pairs())
        known = {compact for _, compact in pairs}
        yield from (param for param, compact in pairs if compact in inner)
        yield from (key for key in inner if key not in known)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _inner_param(self, param: Any) -> Any:
        return dict(self._wrapper_state.param_pairs()).get(param, param)
