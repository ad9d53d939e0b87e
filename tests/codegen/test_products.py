"""Tables of measured products: what comes with the project, what a user adds, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from codegen import costs, products

H200 = "NVIDIA H200"


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(costs, "OWN", tmp_path)
    products.table.cache_clear()
    return tmp_path


def test_the_shipped_table_has_the_linears_of_an_8b_model_whole_and_in_two_shards() -> None:
    found = products.table(H200)
    linears = [(4096, 4096), (4096, 1024), (4096, 14336), (4096, 2048), (4096, 512), (4096, 7168)]
    for product in products.of_linears(linears):
        rows, rates = zip(*found[product], strict=True)
        assert list(rows) == sorted(rows)
        assert rows[0] <= 512
        assert rows[-1] == 16384
        assert all(3e13 < rate < 9e14 for rate in rates), product
    assert [rows for rows, _ in found[4096, 128256]] == [64, 128, 192, 256]


def test_products_of_a_device_that_was_never_measured_are_unknown() -> None:
    assert products.table("cpu") == {}


def test_a_linear_is_multiplied_by_both_ways() -> None:
    assert products.of_linears([(4096, 1024), (1024, 4096), (64, 64)]) == [(64, 64), (1024, 4096), (4096, 1024)]


def test_a_users_products_go_before_the_shipped_ones_and_are_added_to(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H200)
    shipped = products.table(H200)
    path = products.write({(4096, 4096): {1024: 100.0, 512: 80.0}})
    assert path.parent == own
    assert path == products.write({(8, 16): {64: 2.0}})
    found = products.table(H200)
    assert [rows for rows, _ in found[4096, 4096]] == [512, 1024]
    assert [rate for _, rate in found[4096, 4096]] == pytest.approx([2 * 512 * 4096**2 / 80e-6, 2 * 1024 * 4096**2 / 100e-6])
    assert found[8, 16] == ((64, pytest.approx(2 * 64 * 8 * 16 / 2e-6)),)
    assert {key: curve for key, curve in shipped.items() if key != (4096, 4096)}.items() <= found.items()
    assert json.loads(path.read_text())["device"] == H200


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"products": {"64": {"1": 2}}}', '{"products": {"64x64": {"1": 0}}}', '{"sites": {}}']
)
def test_a_file_that_is_no_table_is_named(own: Path, text: str) -> None:
    path = own / products.file_name(H200)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: not a table of products"):
        products.table(H200)
