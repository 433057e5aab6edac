"""Units without weights, compared with a search of all paths; damaged states and odd steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topkast
from topkast import analysis
from topkast.analysis import EverActive, MaskHistory

NETWORKS: list[tuple[dict[str, tuple[int, int]], list[Any]]] = [
    ({"a": (4, 3), "b": (5, 4), "c": (2, 5)}, [("a", "b"), ("b", "c")]),
    # a dense tensor beside another one, as producer or as consumer
    ({"a": (4, 3), "b": (2, 4)}, [("a", "b"), (None, "b")]),
    ({"a": (4, 3), "b": (2, 4)}, [(None, "b"), ("a", "b")]),
    ({"a": (4, 3), "b": (2, 4)}, [("a", None), ("a", "b")]),
    # a residual stream: a dense embedding and two blocks, the first of which is dense in between
    (
        {"in": (5, 4), "out": (4, 5), "query": (3, 4), "value": (4, 3)},
        [
            (None, "in"),
            ("in", None),
            (None, "out"),
            ("out", "query"),
            ("in", "out"),
            ("query", "value"),
            ("value", "query"),
            ("value", "in"),
        ],
    ),
    ({"loop": (4, 4), "end": (2, 4)}, [("loop", "loop"), ("loop", "end")]),
]


def find_dead(
    sets: dict[str, Any], layers: list[Any], group: analysis.DeadUnits
) -> tuple[list[int], list[int], list[int]]:
    """Units of a group without inputs, without outputs, and on no path, by following all edges."""
    groups = analysis.match_units(sets, sets, layers).groups
    after = {name: n for n, one in enumerate(groups) for name in one.producers}
    before = {name: n for n, one in enumerate(groups) for name in one.consumers}
    edges: set[tuple[Any, Any]] = set()
    for name, mask in sets.items():
        for output, source in zip(*np.nonzero(mask), strict=True):
            start = (before[name], int(source)) if name in before else "start"
            end = (after[name], int(output)) if name in after else "end"
            edges.add((start, end))
    for producer, consumer in layers:
        if producer is None:
            number = before[consumer]
            edges |= {("start", (number, unit)) for unit in range(groups[number].size)}
        if consumer is None:
            number = after[producer]
            edges |= {((number, unit), "end") for unit in range(groups[number].size)}

    def spread(seen: Any, pairs: set[tuple[Any, Any]]) -> set[Any]:
        reached = {seen}
        while more := {b for a, b in pairs if a in reached} - reached:
            reached |= more
        return reached

    from_start = spread("start", edges)
    to_end = spread("end", {(b, a) for a, b in edges})
    number = next(
        n
        for n, one in enumerate(groups)
        if (one.producers, one.consumers) == (group.producers, group.consumers)
    )
    units = [(number, unit) for unit in range(group.units)]
    starts, ends = {a for a, _ in edges}, {b for _, b in edges}
    return (
        [unit for _, unit in units if (number, unit) not in ends],
        [unit for _, unit in units if (number, unit) not in starts],
        [unit for _, unit in units if not {(number, unit)} <= from_start & to_end],
    )


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("number", range(len(NETWORKS)))
def test_dead_units_are_those_on_no_path(number: int, seed: int) -> None:
    pytest.importorskip("scipy")
    shapes, layers = NETWORKS[number]
    rng = np.random.default_rng((number, seed))
    sets = {name: rng.random(shape) < rng.choice([0.2, 0.4]) for name, shape in shapes.items()}
    for mask in sets.values():
        mask[0, 0] = True
    for group in analysis.dead_units(sets, layers):
        found = (group.without_inputs, group.without_outputs, group.disconnected)
        assert tuple(units.tolist() for units in found) == find_dead(sets, layers, group)


def test_groups_name_their_dense_tensors() -> None:
    pytest.importorskip("scipy")
    sets = {"a": np.ones((4, 3), bool), "b": np.ones((2, 4), bool)}
    for layers, text in (
        ([("a", "b")], "a → b"),
        ([("a", "b"), (None, "b")], "a, dense → b"),
        ([(None, "b"), ("a", "b"), ("a", None)], "a, dense → b, dense"),
        ([(None, "b")], "dense → b"),
        ([("a", None)], "a → dense"),
    ):
        assert [str(group) for group in analysis.match_units(sets, sets, layers).groups] == [text]


def test_steps_are_whole_numbers() -> None:
    history = MaskHistory()
    history.record(np.int64(1), np.ones((2, 2), bool))  # type: ignore[arg-type]
    with pytest.raises(topkast.OptionError, match=r"step=1\.5: expected the number of a step"):
        history.record(1.5, np.ones((2, 2), bool))  # type: ignore[arg-type]
    assert [record.step for record in history.records] == [1]


def make_state() -> dict[str, Any]:
    history = MaskHistory()
    for step in range(2):
        history.record(step, {"w": np.arange(6).reshape(2, 3) % 2 == step})
    return json.loads(json.dumps(history.state_dict()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", [("records", 1, "change"), ("records", 0), ("records",)])
@pytest.mark.parametrize("value", [3, [3], "x", {"tensors": 3, "total": 4}])
def test_damaged_records_are_refused(tmp_path: Path, path: Any, value: Any) -> None:
    state: Any = make_state()
    *parents, last = path
    target = state
    for key in parents:
        target = target[key]
    target[last] = value
    history = MaskHistory()
    with pytest.raises(topkast.StateDictError, match="damaged"):
        history.load_state_dict(state)
    assert not history.records
    saved = {"format": "topkast mask history 1", "shapes": {}, "records": state["records"]}
    (tmp_path / "file").write_text(json.dumps(saved))
    with pytest.raises(topkast.MismatchError, match="is no file of mask records"):
        MaskHistory.read(tmp_path / "file")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shapes", {"w": 3}),
        ("shapes", {"w": ["x"]}),
        ("shapes", None),
        ("updates", "many"),
        ("ever_active", None),
        ("ever_active", {"w": 3}),
    ],
)
def test_damaged_sets_are_refused(key: str, value: Any) -> None:
    state = make_state()["ever_active"] | {key: value}
    with pytest.raises(topkast.StateDictError, match="damaged"):
        EverActive().load_state_dict(state)
