"""Groups of tasks: each has chunks and a program of its own; all read one layout of tables. A task's bits do not depend on it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import muxcompile
from runtime.program import Kind, Program
from runtime.simulate import simulate

from .kinds import FAMILIES, batches, task
from .peft_reference import examples, fill, llama

pytestmark = pytest.mark.usefixtures("one_capture")
NAMES = ("ann", "ben", "cid", "dot")


@functools.cache
def backbone() -> Any:
    return llama(41)


def small(groups: Any = None, names: tuple[str, ...] = NAMES, **options: Any) -> Any:
    targets = {"ann": "all-linear", "ben": ["q_proj"], "cid": ["q_proj", "down_proj"], "dot": ["v_proj"]}
    tasks = [muxcompile.Task(name, LoraConfig(r=2 + len(targets[name]), target_modules=targets[name])) for name in names]
    model = muxcompile.compile(backbone(), tasks, muxcompile.Options(chunk_tokens=64, groups=groups, **options))
    for name in names:
        fill(model, name, seed=ord(name[0]))
    return model


def data(step: int, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    return {name: examples(100 * ord(name[0]) + step, (9, 30, 5)) for name in names}


def bits(model: Any, given: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """Everything that each task sees of some steps and of an evaluation."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in given[0]}
    for batch in given:
        losses = model.forward_backward(batch).losses
        for name, seen in found.items():
            seen += [losses[name], *model.gradients(name).values()]
        norms = model.optim_step(batch)
        for name, seen in found.items():
            seen += [norms[name], *model.state_dict(name).values(), model.evaluate({name: batch[name]}).losses[name]]
    return found


def same(one: dict[str, list[torch.Tensor]], other: dict[str, list[torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        len(one[name]) == len(other[name]) and all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))
        for name in one
    )


def test_tasks_of_any_kind_keep_their_bits_in_groups_of_their_own() -> None:
    made = FAMILIES["llama"]
    names = tuple(made.adapters)[::2]  # of every kind one at least

    def run(groups: Any) -> Any:
        options = muxcompile.Options(chunk_tokens=256, groups=groups)
        model = muxcompile.compile(made.backbone, [task(name, made.adapters[name]) for name in names], options)
        for number, name in enumerate(names):
            fill(model, name, seed=number)
        given = batches(made, 0)
        return bits(model, [{name: given[name] for name in names}])

    assert same(run(None), run((names[::3], names[1::3]))), "the third group is of those that are in none"


def test_the_program_that_ran_has_each_group_in_chunks_of_its_own() -> None:
    model = small((("ann", "cid"), ("ben",)))
    assert model.plan.groups == (("ann", "cid"), ("ben",), ("dot",))
    model.step(data(0))
    losses = [action.tasks for action in model.executed if action.kind is Kind.LOSS]
    groups = list(dict.fromkeys(next(group for group in model.plan.groups if set(tasks) <= set(group)) for tasks in losses))
    assert groups == list(model.plan.groups), "one group after another"
    assert {name for tasks in losses for name in tasks} == set(NAMES)
    text = model.plan.text()
    assert "group 1: ben" in text
    assert "group 2: tasks: Options.groups" in text


def test_a_groups_program_has_no_tables_of_others() -> None:
    model = small((("ann", "cid"), ("ben",), ("dot",)))
    tables = [
        {name for region in own.regions.values() for name in region.inputs if "table:" in name} for own in model._build.groups
    ]
    rows = [{row for name in own for row in model.state.tables[name.removeprefix("table:")].rows} for own in tables]
    # ben and cid are in one table: their sites and rank buckets are equal.
    assert rows == [{"ann", "ben", "cid"}, {"ben", "cid"}, {"dot"}]


def test_a_plan_of_groups_is_one_program_that_the_simulator_accepts() -> None:
    plan = small((("ann", "cid"), ("ben",))).plan
    assert Program.parse(str(plan.program)) == plan.program
    timeline = simulate(plan.program, seconds=lambda action: 1.0, nbytes={})
    assert timeline.seconds == len(plan.program)
    assert {action.micro: action.tasks for action in plan.program} == dict(enumerate(plan.groups))
    assert {event["pid"] for event in plan.trace["traceEvents"]} == {0}


def test_tasks_come_and_go_between_groups() -> None:
    model = small((("ann",), ("ben", "cid")), names=("ann", "ben", "cid"))
    first = bits(model, [data(0, ("ann", "ben", "cid"))])
    model.remove_task("ben")
    model.add_task(muxcompile.Task("dot", LoraConfig(r=3, target_modules=["v_proj"])))
    fill(model, "dot", seed=ord("d"))
    later = bits(model, [data(1, ("dot", "cid", "ann"))])
    assert set(model.plan.groups) == {("ann", "dot"), ("cid",)}
    together = small()
    expected = bits(together, [data(0)])
    assert same({name: first[name] for name in ("ann", "cid")}, {name: expected[name] for name in ("ann", "cid")})
    fresh = small(names=("dot",))
    assert same({"dot": later["dot"]}, bits(fresh, [data(1, ("dot",))]))


def test_an_artifact_and_a_checkpoint_hold_every_group(tmp_path: Path) -> None:
    model = small((("ann", "cid"), ("ben",)))
    bits(model, [data(0)])
    model.save_artifact(tmp_path / "artifact")
    model.save_checkpoint(tmp_path / "checkpoint")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", llama(41))
    again = small((("dot", "ann"),))
    again.load_checkpoint(tmp_path / "checkpoint")
    expected = bits(model, [data(1)])
    assert same(expected, bits(loaded, [data(1)]))
    assert same(expected, bits(again, [data(1)]))


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ((("ann", "zoe"),), "'zoe', which is no task"),
        ((("ann",), ("ben", "ann")), "'ann' twice"),
        ("ann", "tuple of tuples"),
        ((("ann", 3),), "tuple of tuples"),
    ],
)
def test_wrong_groups_are_refused(groups: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"Options: groups.*{reason}"):
        small(groups)
