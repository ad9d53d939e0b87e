"""Regions are measured under names that a survey knows again; a step is held against its prediction."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig

import muxcompile
from codegen import regions, tiling
from codegen.machine import machine
from codegen.regions import Measured
from passes.adapters import Adapter
from passes.cost import CostModel, Shape, cost_model, keys
from passes.measure import _borders, check, measure
from passes.survey import Survey, survey
from runtime.examples import Example
from runtime.pack import pack
from tests.backbones import CPU, llama, resolved

pytestmark = pytest.mark.usefixtures("one_capture")
TASKS: dict[str, Any] = {
    "alice": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4),
    "bob": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
ROW = Measured("0123", "forward", 512, 0.25, 0.01, 4096, 300.0)


@functools.cache
def model() -> Any:
    return llama(2)


def adapters() -> list[Adapter]:
    return resolved(model(), TASKS)


@functools.cache
def surveyed() -> Survey:
    return survey(model(), adapters(), device=CPU, target=None, checkpoint=(False,))


@pytest.mark.parametrize("lengths", [[1], [2], [3, 200, 7], [512], [700]])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_measured_sequences_fill_a_chunk_however_short_they_are(tokens: int, lengths: list[int]) -> None:
    geometry = tiling.geometry(torch.device("cuda"), tokens)
    borders, (longest, count) = _borders(lengths, geometry)
    assert len(borders) == geometry.sequences + 1
    assert borders[0] == 0
    assert borders[count] == borders[-1] == tokens
    assert all(0 <= stop - start <= longest for start, stop in itertools.pairwise(borders))
    assert borders[1] == min(lengths[0], tokens)


def test_a_table_is_read_as_it_was_written_and_rows_are_replaced(tmp_path: Path) -> None:
    other = replace(ROW, phase="backward", watts=None)
    path = regions.write("some device", [ROW, other], tmp_path)
    regions.write("some device", [replace(ROW, seconds=0.5)], tmp_path)
    assert path.name == "some_device.json"
    assert sorted(regions.read("some device", tmp_path), key=str) == sorted([replace(ROW, seconds=0.5), other], key=str)
    assert regions.seconds([ROW, other]) == {"0123.forward": {512: 0.25}, "0123.backward": {512: 0.25}}
    assert regions.read("another", tmp_path) == []


def test_figures_of_other_versions_do_not_count(tmp_path: Path) -> None:
    path = regions.write("cpu", [ROW], tmp_path)
    found = json.loads(path.read_text())
    found["tables"] = {"torch 1.0 triton none": found["tables"][regions.versions()]}
    path.write_text(json.dumps(found))
    assert regions.read("cpu", tmp_path) == []
    path.write_text(json.dumps({**found, "version": 0}))
    assert regions.read("cpu", tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 1, "tables": {"x": [{"key": "a"}]}}'])
def test_a_corrupt_table_is_an_error_by_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"cpu\.json: not a table of regions"):
        regions.read("cpu", tmp_path)


def test_a_row_with_a_senseless_figure_is_refused(tmp_path: Path) -> None:
    regions.write("cpu", [replace(ROW, seconds=-1.0)], tmp_path)
    with pytest.raises(ValueError, match=r"cpu\.json.*no number of at least 0"):
        regions.read("cpu", tmp_path)


def test_measured_regions_take_the_place_of_predicted_ones(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    measure(model(), adapters(), surveyed(), [64, 256], device=CPU, target=None, lengths=(20, 30), folder=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    rows = regions.read("cpu", tmp_path)
    parts = surveyed().parts[False]
    wanted = {(part.key, phase) for part in parts for phase in ("forward", "backward") if getattr(part, phase) is not None}
    assert {(row.key, row.phase) for row in rows} == wanted
    assert {row.tokens for row in rows} == {64, 256}
    found = cost_model(surveyed(), "cpu", [Shape(64)], folder=tmp_path)
    assert found.source(1, "backward") == "measured at 64, 256 tokens"
    assert CostModel(surveyed(), machine("cpu")).source(1, "backward") == "by the roofline"
    everything = surveyed().extras(list(TASKS))
    for row in rows:
        index = next(i for i, part in enumerate(parts) if part.key == row.key)
        cost = found.phase(index, row.phase, everything, Shape(row.tokens))
        # At the sizes that were measured the figure is the measured one, as far as it is not the host's.
        assert cost.seconds == pytest.approx(max(row.seconds, cost.host + 0.1 * row.seconds), rel=1e-6)


def test_watts_come_from_measurements(tmp_path: Path) -> None:
    regions.write("NVIDIA H200", [replace(ROW, watts=500.0), replace(ROW, tokens=1024, seconds=0.75, watts=600.0)], tmp_path)
    found = cost_model(surveyed(), "NVIDIA H200", [], folder=tmp_path, objective="energy")
    assert found.machine.busy == pytest.approx(575.0)
    extras, shape = surveyed().extras(["alice"]), Shape(64)
    seconds, used = found.seconds(extras, shape)
    assert found.chunk(extras, shape).cost == pytest.approx(seconds * (120 + (575 - 120) * used))


def test_a_device_that_was_never_measured_says_what_it_borrows() -> None:
    assert machine("NVIDIA H200").note == ""
    assert "H100's published peaks" in machine("NVIDIA H100 80GB HBM3").note
    assert "unknown" in machine("Some GPU", memory=7).note
    assert machine("Some GPU", memory=7).memory == 7


def test_keys_are_those_that_causal_rows_see() -> None:
    assert keys([4]) == 2.5
    assert keys([4, 2], [0, 10]) == (4 * 2.5 + 2 * 11.5) / 6
    assert keys([]) == 0.0


def test_a_step_is_held_against_its_prediction() -> None:
    compiled = muxcompile.compile(model(), TASKS, options=muxcompile.Options(chunk_tokens=128))
    executor = compiled._executors[0]
    examples = {name: [Example(np.arange(2, 40), np.arange(2, 40))] * 2 for name in TASKS}
    chunks = list(pack(examples, executor.compiled.geometry))
    found = check(
        CostModel(surveyed(), machine("cpu")), executor.compiled, executor.weights, compiled.state, executor.callables, chunks,
        list(TASKS), rounds=2,
    )  # fmt: skip
    for name in TASKS:
        compiled.state.clear_gradients(name)
    assert {line.name.split(" ")[0] for line in found.lines} == {
        "embed.forward", "model.layers.0.forward", "model.layers.0.backward", "model.layers.1.forward", "model.layers.1.backward",
        "final.forward", "final.backward", "head",
    }  # fmt: skip
    assert found.step.measured > 0
    assert found.step.predicted > 0
    assert found.peak is None
    assert f"step of {len(chunks)} chunks" in str(found)
    assert json.loads(json.dumps(found.to_json()))["step"]["error"] == pytest.approx(found.step.error)
