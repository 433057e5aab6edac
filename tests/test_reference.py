"""The reference itself, against numbers calculated by hand from the paper."""

from __future__ import annotations

import numpy as np
import pytest

from topkast.reference import SGD, AdamW, TopKAST, top_k


def test_top_k() -> None:
    theta = np.asarray([[1.0, -3.0], [3.0, 2.0]])
    assert top_k(theta, 0.5).tolist() == [[False, True], [True, False]]
    assert top_k(theta, 0.75).tolist() == [[False, True], [False, False]]
    assert top_k(theta, 0.999).sum() == 1


def test_top_k_of_blocks() -> None:
    theta = np.asarray([[1.0, -3.0, 2.0, 2.0], [0.0, 0.0, -1.0, 0.0]])
    left = [[True, True, False, False]] * 2
    right = [[False, False, True, True]] * 2
    assert top_k(theta, 0.5, block=(2, 2)).tolist() == right  # 4 against 5
    assert top_k(theta, 0.5, block=(2, 2), block_score="max").tolist() == left  # 3 against 2
    assert top_k(theta, 0.5, block=(2, 1)).tolist() == [[False, True, True, False]] * 2


def test_one_step_by_hand() -> None:
    # D = 1/4: A = {0}, B = {0, 1}. Gradient 1 everywhere, lr 0.1, penalty 0.5.
    layer = TopKAST(
        np.asarray([4.0, 3.0, 2.0, 1.0]), SGD(0.1), fwd=0.75, bwd=0.5, refresh_every=1, penalty=0.5
    )
    assert layer.alpha.tolist() == [4, 0, 0, 0]
    layer.step(np.ones(4))
    # 4 - 0.1 (1 + 0.5 * 4); 3 - 0.1 (1 + 0.5 * 3 / D); the reservoir does not move
    assert layer.theta == pytest.approx([3.7, 2.3, 2, 1])
    layer.step(np.ones(4))
    assert layer.theta == pytest.approx([3.415, 1.74, 2, 1])
    assert layer.backward.tolist() == [True, False, True, False]


def test_entries_that_leave_lose_their_momentum() -> None:
    layer = TopKAST(
        np.asarray([4.0, 3.0, 2.9]), SGD(0.1, momentum=0.5), fwd=0.6, bwd=0.4, penalty=0.0
    )
    layer.step(np.asarray([0.0, 2.0, 9.0]))  # 3.0 -> 2.8: index 2 enters B
    assert layer.backward.tolist() == [True, False, True]
    assert layer.rule.moments["velocity"].tolist() == [0, 0, 0]
    layer.step(np.asarray([0.0, 9.0, 1.0]))
    assert layer.theta == pytest.approx([4, 2.8, 2.8])


def test_adamw_by_hand() -> None:
    layer = TopKAST(
        np.asarray([2.0, 1.0]), AdamW(0.1, weight_decay=0.5), fwd=0.5, bwd=0.5, penalty=0.0
    )
    layer.step(np.asarray([3.0, 3.0]))
    assert layer.theta == pytest.approx([2 - 0.1 * (1 + 0.5 * 2), 1])
