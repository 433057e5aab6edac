"""``optimizer.state`` as users know it: the inner optimizer's, by Parameter of the model."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topkast_torch.optimizer._groups import WrapperState


class StateView(MutableMapping[Any, Any]):
    """A live view: reading and writing it reads and writes the inner optimizer's ``state``.

    It is true even while it is empty: libraries take a step to fill the state of an optimizer that
    has none, and asking for a state dict must not move weights.
    """

    def __init__(self, wrapper_state: WrapperState) -> None:
        self._wrapper_state = wrapper_state

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, param: Any) -> Any:
        return self._wrapper_state.inner.state[self._given(param)]

    def __setitem__(self, param: Any, entries: Any) -> None:
        self._wrapper_state.inner.state[self._given(param)] = entries

    def __delitem__(self, param: Any) -> None:
        del self._wrapper_state.inner.state[self._given(param)]

    def __contains__(self, param: Any) -> bool:
        return self._given(param) in self._wrapper_state.inner.state

    def __iter__(self) -> Iterator[Any]:
        inner = self._wrapper_state.inner.state
        pairs = list(self._wrapper_state.pairs())
        given = {compact for _, compact in pairs}
        yield from (param for param, compact in pairs if compact in inner)
        yield from (key for key in inner if key not in given)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _given(self, param: Any) -> Any:
        return dict(self._wrapper_state.pairs()).get(param, param)
