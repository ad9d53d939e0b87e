"""The program of a micro-batch: text that is reviewed, that the simulator accepts, and of which no action can be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.differentiate import differentiate
from passes.partition import partition, share
from passes.schedule import schedule, step_action
from runtime.program import Action, Kind, Program
from runtime.region import RegionSpec, TemplateSpec
from runtime.simulate import ProgramError, Timeline, simulate
from tests.backbones import Attention, Plain, fused, llama, lora, made, normal, resolved
from tests.golden import check_golden


class Parts:
    """What `schedule` is called with, for one backbone."""

    def __init__(self, model: nn.Module, **tasks: Any) -> None:
        bodies, head = partition(fused(normal(model), resolved(model, tasks)))
        self.templates: dict[str, TemplateSpec] = {}
        self.regions: list[RegionSpec] = []
        names: dict[str, str] = {}
        for first, group in share(bodies).items():
            self.templates[first] = differentiate(first, group[0]).spec
            names.update({body.spec.name: first for body in group})
        self.regions = [replace(body.spec, template=names[body.spec.name]) for body in bodies]
        self.head_value = head.spec.inputs[0].removeprefix("value:")
        self.tasks = tuple(tasks)

    def program(self, *, train: bool = True) -> Program:
        return schedule(self.regions, self.templates, self.head_value, tasks=self.tasks, train=train)

    def step(self) -> Program:
        """A step of two chunks: both micro-batches, then each task's optimizer."""
        steps = [replace(step_action(task, self.regions, self.templates), micro=1) for task in self.tasks]
        return Program((*self.program().unroll([self.tasks, self.tasks[:1]]).actions, *steps))


class Skipping(Plain):
    """The first layer's output is read by the second, by the sum behind it and by the end."""

    def make(self) -> None:
        del self.attention
        self.layers = nn.ModuleList([Attention(), Attention(), Attention()])

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        first = torch.tanh(self.layers[0](self.tokens(input_ids)))
        second = torch.tanh(self.layers[1](first))
        return self.head(torch.tanh(self.layers[2](second + first) * first))


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts(llama(), alice=lora("q_proj", "v_proj"), bob=lora("q_proj"))


@pytest.fixture(scope="module")
def skipping() -> Parts:
    return Parts(made(Skipping), alice=lora("q"))


def play(program: Program) -> Timeline:
    return simulate(program, seconds=lambda action: 1.0, nbytes={})


def without(program: Program, index: int) -> Program:
    return Program(program.actions[:index] + program.actions[index + 1 :])


def test_the_programs_of_a_two_layer_llama(parts: Parts) -> None:
    check_golden("llama-2.train.program", str(parts.program()))
    check_golden("llama-2.evaluate.program", str(parts.program(train=False)))
    assert Program.parse(str(parts.program())) == parts.program()


def test_all_forwards_the_loss_then_all_backwards_in_reverse(parts: Parts) -> None:
    assert [(str(action.kind), action.region) for action in parts.program()] == [
        ("LOAD", "chunk"),
        ("F", "embed"),
        ("F", "model.layers.0"),
        ("F", "model.layers.1"),
        ("F", "final"),
        ("LOSS", "head"),
        ("B", "final"),
        ("B", "model.layers.1"),
        ("B", "model.layers.0"),
    ]
    assert all(action.tasks == ("alice", "bob") and action.rank == action.micro == 0 for action in parts.program())


@pytest.mark.parametrize("backbone", ["parts", "skipping"])
def test_the_simulator_accepts_what_is_scheduled(backbone: str, request: pytest.FixtureRequest) -> None:
    parts = request.getfixturevalue(backbone)
    for program in (parts.program(), parts.program(train=False), parts.step()):
        assert play(program).seconds == len(program)


@pytest.mark.parametrize("backbone", ["parts", "skipping"])
def test_no_action_can_be_left_out(backbone: str, request: pytest.FixtureRequest) -> None:
    parts = request.getfixturevalue(backbone)
    program = Program((*parts.program().actions, step_action("alice", parts.regions, parts.templates)))
    play(program)
    for index in range(len(program) - 1):  # nobody waits for the optimizer's step
        with pytest.raises(ProgramError, match="nobody has written"):
            play(without(program, index))


@pytest.mark.parametrize("backbone", ["parts", "skipping"])
def test_no_action_can_run_before_one_that_it_reads_from(backbone: str, request: pytest.FixtureRequest) -> None:
    actions = list(request.getfixturevalue(backbone).program())
    for late in range(1, len(actions)):
        for early in range(late):
            if set(actions[late].reads) & set(actions[early].writes):
                moved = [*actions[:early], actions[late], *actions[early:late], *actions[late + 1 :]]
                with pytest.raises(ProgramError):
                    play(Program(tuple(moved)))


def test_no_action_can_run_twice(parts: Parts) -> None:
    program = parts.program()
    for index, action in enumerate(program):
        if not all(name.startswith("grad.") for name in action.writes):  # gradients accumulate
            doubled = Program((*program.actions[: index + 1], action, *program.actions[index + 1 :]))
            with pytest.raises(ProgramError, match="already written"):
                play(doubled)


def writes(program: Program, kind: Kind) -> list[tuple[str, ...]]:
    return [action.writes for action in program if action.kind is kind]


def test_evaluation_saves_nothing_and_asks_for_no_gradient(parts: Parts) -> None:
    program = parts.program(train=False)
    assert {action.kind for action in program} == {Kind.LOAD, Kind.F, Kind.LOSS}
    assert not any(name.startswith(("s.", "d.", "grad.")) for action in program for name in action.writes)
    assert writes(program, Kind.LOSS) == [("loss",)]


def test_every_saved_tensor_and_gradient_is_read_and_every_value_too(parts: Parts, skipping: Parts) -> None:
    for program in (parts.program(), skipping.program()):
        read = {name for action in program for name in action.reads}
        for action in program:
            if action.kind is Kind.LOAD:
                continue
            unread = {name for name in action.writes if name not in read and not name.startswith("grad.") and name != "loss"}
            assert not unread, f"{action.kind} {action.region} writes what nobody reads"


def test_a_gradient_has_a_part_from_each_of_its_readers(skipping: Parts) -> None:
    first = skipping.regions[1].outputs[0]
    backward = next(action for action in skipping.program() if action.kind is Kind.B and action.region == "layers.0")
    readers = [name for name in backward.reads if name.startswith(f"d.{first}@")]
    assert readers == [f"d.{first}@layers.1", f"d.{first}@final"]
    made_by = {name: action.region for action in skipping.program() for name in action.writes}
    assert all(made_by[name] == name.partition("@")[2] for name in readers)


def test_a_step_reads_what_every_backward_accumulates(parts: Parts) -> None:
    action = step_action("alice", parts.regions, parts.templates)
    assert action == Action(
        0, "compute", Kind.STEP, "optimizer", ("alice",), 0, ("grad.model.layers.0", "grad.model.layers.1", "grad.final"), ()
    )


def test_nothing_below_the_first_adapter_runs_backward() -> None:
    model = llama()
    parts = Parts(model, alice=lora("model.layers.1.self_attn.q_proj"))
    assert [action.region for action in parts.program() if action.kind is Kind.B] == ["final", "model.layers.1"]
    below = [action for action in parts.program() if action.kind is Kind.F and action.region in ("embed", "model.layers.0")]
    assert not any(name.startswith("s.") for action in below for name in action.writes)


def test_a_chunk_is_loaded_with_the_routes_that_the_regions_read(parts: Parts) -> None:
    load = parts.program().actions[0]
    routes = {reference for region in parts.regions for reference in region.inputs if reference.startswith("route:")}
    assert routes == {"route:alice", "route:bob"}
    assert routes <= set(load.writes)
    assert {
        "chunk:input_ids",
        "chunk:cu_seqlens",
        "chunk:bounds",
        "chunk:rows",
        "chunk:targets",
        "chunk:weights",
        "route:",
    } <= set(load.writes)


def test_weights_and_tables_are_no_values(parts: Parts) -> None:
    assert not any(name.startswith(("weight:", "table:")) for action in parts.program() for name in (*action.reads, *action.writes))
