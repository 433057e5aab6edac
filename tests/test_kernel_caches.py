"""The sizes of caches, and what is chosen from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from topkast.kernels import LinearProducts
from topkast.kernels.runtime import _partition
from topkast.kernels.runtime._caches import Caches, max_chunk_rows, panel_columns, read_caches


def describe(folder: Path, *caches: tuple[str, str, str]) -> Path:
    """Write a folder as Linux has it, from level, type and size of each cache."""
    for number, cache in enumerate(caches):
        (folder / f"index{number}").mkdir()
        for name, text in zip(("level", "type", "size"), cache, strict=True):
            (folder / f"index{number}" / name).write_text(text + "\n")
    return folder


def test_sizes_are_read_from_the_description_of_linux(tmp_path: Path) -> None:
    caches = (
        ("1", "Data", "48K"),
        ("1", "Instruction", "64K"),
        ("2", "Unified", "2M"),
        ("3", "Unified", "32768K"),
    )
    assert read_caches(describe(tmp_path, *caches)) == Caches(48 << 10, 2 << 20)


@pytest.mark.parametrize("size", ["", "0K", "unknown", "-1K"])
def test_unknown_sizes_are_the_defaults(tmp_path: Path, size: str) -> None:
    folder = describe(tmp_path, ("1", "Data", size), ("2", "Unified", "512K"))
    (folder / "index2").mkdir()  # without files
    assert read_caches(folder) == Caches(second=512 << 10)
    assert read_caches(tmp_path / "missing") == Caches()


def test_what_is_worked_on_at_a_time_fits_the_caches() -> None:
    avx512, avx2 = 8 * 64, 8 * 32  # bytes of a row of the widest tile
    zen4, zen5, haswell = (
        Caches(*sizes) for sizes in ((32768, 1 << 20), (49152, 1 << 20), (32768, 1 << 18))
    )
    assert [panel_columns(caches, avx512) for caches in (zen4, zen5)] == [64, 96]
    assert [max_chunk_rows(caches, avx512) for caches in (zen4, zen5)] == [512, 512]
    assert (panel_columns(haswell, avx2), max_chunk_rows(haswell, avx2)) == (128, 256)
    assert (panel_columns(Caches(100, 100), avx512), max_chunk_rows(Caches(100, 100), avx512)) == (
        1,
        1,
    )


def test_products_do_not_depend_on_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    indices = np.sort(rng.choice(90 * 300, 9000, replace=False)).astype(np.int32)
    values, x = rng.standard_normal(9000), rng.standard_normal((40, 300))
    outputs = []
    for panel, rows in ((96, 512), (64, 16), (7, 5)):
        monkeypatch.setattr(_partition, "_MIN_PANEL", panel)
        monkeypatch.setattr(_partition, "_CHUNK_ROWS", rows)
        products = LinearProducts(indices, 9000, shape=(90, 300))
        packed = np.empty(products.packed_shape(x.shape, x.dtype))
        products.pack(x, packed)
        outputs.append(np.empty((40, 90)))
        products.forward(values, packed, outputs[-1])
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], rtol=1e-12, atol=1e-12)
