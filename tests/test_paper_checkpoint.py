"""Checkpoints of the paper's experiments: written whole, refused where they do not belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the experiments train with PyTorch")

import torch

from topkast_paper import PaperError, checkpoint

IDENTITY = {"seed": "0", "data": "enwik8"}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, IDENTITY) is None
    for step in (1, 2):
        checkpoint.save(tmp_path, IDENTITY, {"step": step, "model": {"w": torch.arange(3.0)}})
    content = checkpoint.load(tmp_path, IDENTITY)
    assert content is not None
    assert content["step"] == 2
    assert torch.equal(content["model"]["w"], torch.arange(3.0))
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"seed": "1", "data": "enwik8"}, "seed is 0 there, and 1 here"),
        ({"seed": "0"}, "data is enwik8 there, and None here"),
        ({**IDENTITY, "block": "4"}, "block is None there, and 4 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, identity: dict[str, str], message: str
) -> None:
    checkpoint.save(tmp_path, IDENTITY, {})
    with pytest.raises(PaperError, match=f"belongs to another run: {message}. Choose another"):
        checkpoint.load(tmp_path, identity)


@pytest.mark.parametrize(
    "content",
    [b"", b"some text\n", b"PK\x03\x04half", [1, 2], torch.zeros(3), {"step": 1}, {"identity": 1}],
    ids=["empty", "text", "half", "list", "tensor", "no identity", "odd identity"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / checkpoint.NAME
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(PaperError, match=r"checkpoint\.pt is no checkpoint, or is damaged"):
        checkpoint.load(tmp_path, IDENTITY)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    taken = tmp_path / checkpoint.NAME
    taken.mkdir()
    with pytest.raises(PaperError, match=r"the checkpoint .*checkpoint\.pt cannot be written"):
        checkpoint.save(tmp_path, IDENTITY, {"step": 1})
    with pytest.raises(PaperError, match=r"checkpoint\.pt cannot be written: Is a directory"):
        checkpoint.write_json(taken, [1, 2])
    with pytest.raises(PaperError, match=r"curve\.json cannot be written: No such file"):
        checkpoint.write_json(tmp_path / "missing" / "curve.json", [])
    assert list(tmp_path.iterdir()) == [taken]
