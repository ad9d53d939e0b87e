"""lower writes a form into every group of linears, and what is compiled ahead is what will be launched."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen.kernels import build
from codegen.lower import Forms, Target
from codegen.ops import LINEARS
from passes.graph import MuxGraph
from passes.lower import choices, kernels, lower
from tests.backbones import fused, llama, lora, normal, resolved

TARGET = Target("a GPU nobody measured", False)


@pytest.fixture(scope="module")
def graph() -> MuxGraph:
    model = llama()
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    mixed = {
        "alice": lora(*every),
        "bob": lora(*every, r=8, lora_dropout=0.1),
        "carol": lora("q_proj"),
        "dave": lora("v_proj", use_dora=True),
    }
    return fused(normal(model), resolved(model, mixed))


def forms(graph: MuxGraph) -> list[Any]:
    return [node.args[-1] for node in graph.gm.graph.find_nodes(op="call_function", target=LINEARS)]


def test_every_group_gets_the_lowering_of_its_outputs_and_of_its_input(graph: MuxGraph) -> None:
    assert set(forms(graph)) == {""}
    found = [Forms.parse(form) for form in forms(lower(graph.copy(), target=TARGET))]
    assert {len(form.y) for form in found} == {1, 2, 3}  # o and down; gate and up; q, k and v
    assert lower(graph.copy(), target=None).gm.code == graph.gm.code


def test_the_plan_names_each_kind_of_group_once_with_the_reasons(graph: MuxGraph) -> None:
    after = lower(graph.copy(), target=TARGET)
    text = choices(after, TARGET)
    assert len(text) == 4
    assert all("accumulate" in line and "not fused: needs TMA" in line for line in text.values()), text


def test_kernels_known_ahead_are_those_that_run(graph: MuxGraph) -> None:
    after = lower(graph.copy(), target=TARGET)
    found = kernels(after, TARGET)
    families = Counter(launch.name.rpartition("_")[0] for launch, _ in found)
    assert set(families) == {"contract", "expand", "outer", "affine", "total"}
    assert len({launch.name for launch, _ in found}) == len(found)
    assert all(tensor.is_meta for _, tensors in found for tensor in tensors if isinstance(tensor, Tensor))
    assert kernels(after, None) == []


def test_each_known_kernel_is_compiled_with_arguments_like_its_own(graph: MuxGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def load(source: str) -> Any:
        def launch(*tensors: Tensor, warmup: bool) -> None:
            assert warmup
            compiled.append(source)

        return launch

    monkeypatch.setattr(build, "load", load)
    found = kernels(lower(graph.copy(), target=TARGET), TARGET)
    build.compile_all(found)
    assert compiled == [launch.source for launch, _ in found]


def test_a_kernel_over_meta_tensors_is_noted_and_does_not_run() -> None:
    launch = build.Launch("key", "name", "raise AssertionError")
    tensor = torch.empty(2, device="meta")
    with build.noted() as outer:
        launch(tensor)
        with build.noted() as inner:
            launch(tensor, 3)
    assert outer == [(launch, (tensor,))]
    assert inner == [(launch, (tensor, 3))]
