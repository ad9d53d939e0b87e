"""Products timed on this GPU: figures that can be true, of the products that were asked for, and a table of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from codegen import costs, products, tiling
from muxcompile import calibrate
from muxcompile.options import Options
from passes.task import Task
from tests.backbones import llama, lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_products_are_timed_by_rows_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "OWN", tmp_path)
    before = torch.cuda.get_rng_state()
    rows = (128, 1024, 4096)
    found = products.measure({(1024, 2048): rows, (2048, 1024): (256,)})
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert {product: tuple(times) for product, times in found.items()} == {(1024, 2048): rows, (2048, 1024): (256,)}
    products.write(found)
    curve = products.table(torch.cuda.get_device_name())[1024, 2048]
    assert tuple(size for size, _ in curve) == rows
    # No GPU multiplies faster than this, and more rows are multiplied faster than few.
    assert all(1e10 < rate < 5e15 for _, rate in curve)
    assert curve[-1][1] > curve[0][1]
    products.table.cache_clear()


def test_a_calibrated_plan_has_its_own_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "OWN", tmp_path)
    monkeypatch.setattr(calibrate, "measure", lambda *given, **known: tmp_path)  # regions are timed elsewhere
    model = llama(2).to("cuda", torch.bfloat16)
    task = Task("alice", lora("q_proj", "down_proj"), lengths=[30, 50, 100], batch_size=4)
    calibrate.calibrate(model, [task], Options())
    found = products.table(torch.cuda.get_device_name())
    width, inner, vocabulary = model.config.hidden_size, model.config.intermediate_size, model.config.vocab_size
    sizes = tiling.chunk_sizes(torch.device("cuda"))
    assert tuple(rows for rows, _ in found[width, inner]) == tuple(rows for rows, _ in found[inner, width]) == sizes
    assert [rows for rows, _ in found[width, vocabulary]] == [tiling.HEAD_ROWS["cuda"]]
    products.table.cache_clear()
