"""lower writes a form into every group of linears, and what is compiled ahead is what will be launched."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from codegen.kernels import build
from codegen.lower import Forms, Target
from codegen.ops import LINEARS
from passes.graph import MuxGraph
from passes.lower import choices, compile_kernels, kernels, lower
from tests.backbones import fused, llama, lora, normal, resolved

TARGET = Target("a GPU nobody measured", False)


@pytest.fixture(scope="module")
def graph() -> MuxGraph:
    model = llama()
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    mixed = {"alice": lora(*every), "bob": lora(*every, r=8, lora_dropout=0.1), "carol": lora("q_proj")}
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


def test_kernels_compiled_ahead_are_those_that_groups_launch(graph: MuxGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    after = lower(graph.copy(), target=TARGET)
    compiled: list[str] = []

    def load(source: str) -> Any:
        def launch(*tensors: Tensor, warmup: bool) -> None:
            assert warmup
            assert all(tensor.is_meta for tensor in tensors)
            compiled.append(source)

        return launch

    monkeypatch.setattr(build, "load", load)
    compile_kernels(after, TARGET)
    assert set(compiled) == {launch.source for launch in kernels(after, TARGET).values()} != set()
    compiled.clear()
    compile_kernels(after, None)
    assert not compiled
