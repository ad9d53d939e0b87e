"""What the planner decides from tasks' lengths, options and a survey: chunk sizes, groups, checkpointing, admission."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig

import muxcompile
import muxcompile.driver
import muxcompile.forecast
from muxcompile import planner
from muxcompile.calibrate import neighbours
from muxcompile.check import check, known_data
from muxcompile.optimum import optimum
from muxcompile.planner import Planned
from passes.adapters import Adapter, resolve
from passes.loads import Shape, flight
from passes.survey import survey
from runtime.examples import Example

from .peft_reference import examples, fill, llama

CPU = torch.device("cpu")
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
DORA = LoraConfig(r=16, target_modules="all-linear", use_dora=True)
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
# By name: so a survey of some tasks is known by their names.
CONFIGS = {"ann": LORA, "ben": LORA, "cid": LORA, "dora": DORA, "prefix": PREFIX}
LIGHT, HEAVY = {"lengths": (10, 20), "batch_size": 2}, {"lengths": (100, 120), "batch_size": 16}


@functools.cache
def backbone() -> Any:
    return llama(41)


@pytest.fixture(scope="module", autouse=True)
def one_survey(one_capture: None) -> Iterator[None]:
    """Export once for each size of chunk, survey once for each set of tasks."""
    known: dict[Any, Any] = {}

    def remembered(model: Any, adapters: Sequence[Adapter], **asked: Any) -> Any:
        key = tuple(adapter.task.name for adapter in adapters), tuple(asked["checkpoint"])
        if key not in known:
            known[key] = survey(model, adapters, **asked)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muxcompile.forecast, "survey", remembered)
        yield


def tasks_of(loads: Mapping[str, dict[str, Any]]) -> list[muxcompile.Task]:
    return [muxcompile.Task(name, CONFIGS[name], **load) for name, load in loads.items()]


def planned(loads: Mapping[str, dict[str, Any]], **options: Any) -> Any:
    adapters = [resolve(task, backbone()) for task in tasks_of(loads)]
    return planner.plan(backbone(), CPU, adapters, muxcompile.Options(**options))


def groups(found: Planned) -> set[tuple[str, ...]]:
    return {group.tasks for group in found.groups}


def test_light_loads_take_small_chunks_and_heavy_ones_large() -> None:
    (light,), (heavy,) = (planned({"ann": load}).groups for load in (LIGHT, HEAVY))
    assert light.tokens == 64, "the smallest there is holds a step of 20 tokens"
    assert heavy.tokens >= 768
    assert not light.checkpoint
    assert not heavy.checkpoint


def test_what_is_known_of_no_task_leaves_the_devices_default() -> None:
    found = planned({"ann": {}, "ben": {"lengths": (700,)}})
    assert [(group.tokens, group.tasks) for group in found.groups] == [(704, ("ann", "ben"))]
    assert found.forecast is None


def test_an_asked_chunk_size_is_kept_and_longer_examples_are_cut() -> None:
    for found in (planned({"ann": HEAVY}, chunk_tokens=96), planned({"ann": {"max_length": 120}}, chunk_tokens=96)):
        (group,) = found.groups
        assert (group.tokens, group.fixed, group.carried) == (96, True, True)


def test_tasks_of_like_adapters_share_chunks_and_dear_ones_stay_among_themselves() -> None:
    loads = {"ann": HEAVY, "dora": HEAVY, "ben": HEAVY}
    found = planned(loads)
    assert groups(found) == {("ann", "ben"), ("dora",)}
    reasons = "; ".join(reason for group in found.groups for reason in group.reasons)
    assert "one group with group" in reasons, "what the alternative costs is said"
    assert found.grouping.cost < planned(loads, groups=(("ann", "ben", "dora"),)).grouping.cost
    assert optimum(found, "time").gap < 0.02


def test_light_tasks_fuse_until_a_chunk_is_full() -> None:
    assert len(planned({"ann": LIGHT, "ben": LIGHT, "cid": LIGHT}).groups) == 1


def test_more_than_fits_is_refused_with_the_numbers_and_the_largest_set_that_does() -> None:
    loads = {"ann": LIGHT, "dora": LIGHT, "ben": LIGHT}
    found = planned(loads).forecast
    base, by_name = found.model.resident([]), {load.task: load for load in found.loads}
    # Room for the two of little memory, in the smallest chunk, and one byte too few for all three.
    most = max(flight(load, found.model) for load in found.loads)
    cap = base + sum(load.resident for load in found.loads) + int(most) - 1
    assert by_name["dora"].resident > by_name["ann"].resident
    with pytest.raises(
        ValueError, match=rf"^memory: 3 tasks need {cap + 1:,} bytes, cap {cap:,}; the largest set that fits has 2: ann ben;"
    ):
        planned(loads, memory_cap=cap)
    assert planned(loads, memory_cap=cap + 1).grouping.bytes <= cap + 1


def test_a_task_whose_one_sequence_cannot_fit_is_refused_by_name() -> None:
    long = {"lengths": (10, 100_000), "batch_size": 1}
    assert planned({"ann": LIGHT, "cid": long}).groups, "without a limit it is cut"
    with pytest.raises(ValueError, match=r"^task 'cid': needs [\d,]+ bytes even alone in the smallest chunk"):
        planned({"ann": LIGHT, "cid": long}, memory_cap=5_000_000)


def test_the_least_memory_takes_the_smallest_chunks_and_then_the_least_time() -> None:
    loads = {"ann": LIGHT, "ben": HEAVY}
    small, fast = planned(loads, objective="memory"), planned(loads)
    assert small.grouping.bytes < fast.grouping.bytes
    assert small.grouping.cost > fast.grouping.cost
    assert {group.tokens for group in small.groups} == {64}
    assert optimum(small, "memory").gap < 0.02


def test_a_memory_cap_is_met_by_smaller_chunks_or_checkpointing_with_the_same_bits() -> None:
    loads = {"ann": {"lengths": (60, 64), "batch_size": 8}, "ben": {"lengths": (30,), "batch_size": 8}}
    free = planned(loads)
    # Half of what the free choice needs in flight.
    base = free.grouping.bytes - max(own.bytes for own in free.grouping.groups)
    cap = base + (free.grouping.bytes - base) // 2

    def trained(**options: Any) -> tuple[Any, list[torch.Tensor]]:
        model = muxcompile.compile(backbone(), tasks_of(loads), muxcompile.Options(**options))
        for number, name in enumerate(loads):
            fill(model, name, seed=number)
        given = {"ann": examples(1, (60, 64, 12)), "ben": examples(2, (30, 30))}
        losses = [loss for _ in range(2) for loss in model.step(given).losses.values()]
        return model, losses + [tensor for name in loads for tensor in model.state_dict(name).values()]

    model, capped = trained(memory_cap=cap)
    chosen = model._compiler.planned
    assert chosen.grouping.bytes <= cap
    assert [(own.tokens, own.checkpoint) for own in chosen.groups] != [(own.tokens, own.checkpoint) for own in free.groups]
    assert re.search(r"room for more tasks: ann: \d+, ben: \d+", model.plan.text())
    assert any("are left" in reason for own in chosen.groups for reason in own.reasons), "the shape that does not fit is named"
    (size,) = {own.tokens for own in chosen.groups}
    _, plain = trained(chunk_tokens=size, gradient_checkpointing=not any(own.checkpoint for own in chosen.groups))
    assert all(torch.equal(one, other) for one, other in zip(capped, plain, strict=True))


def test_checkpointing_is_chosen_where_it_fits_more_and_only_if_nobody_decided() -> None:
    loads = {"ann": HEAVY}
    found = planned(loads).forecast
    sizes = [found.model.chunk(found.loads[0].extras, Shape(64, variant)).bytes for variant in (True, False)]
    assert sizes[0] < sizes[1]
    cap = found.model.resident(["ann"]) + sum(sizes) // 2
    (group,) = planned(loads, memory_cap=cap).groups
    assert (group.tokens, group.checkpoint) == (64, True)
    with pytest.raises(ValueError, match="task 'ann': needs"):
        planned(loads, memory_cap=cap, gradient_checkpointing=False)
    assert planned(loads, gradient_checkpointing=True).groups[0].checkpoint


def test_forwards_of_cut_sequences_are_kept_where_they_fit_with_the_same_bits() -> None:
    loads = {"ann": {"lengths": (90, 20), "batch_size": 4}, "ben": {"lengths": (30,), "batch_size": 4}}
    tight = planned(loads, chunk_tokens=32, gradient_checkpointing=False)
    assert [(group.carried, group.kept) for group in tight.groups] == [(True, 0)], "without a limit nobody knows what fits"
    model, shape = tight.forecast.model, Shape(32, False)
    more = 2 * model.forward(model.survey.extras(["ann", "ben"]), shape).bytes  # of three pieces the last is there anyway
    cap = tight.grouping.bytes + more
    wide = planned(loads, chunk_tokens=32, gradient_checkpointing=False, memory_cap=cap)
    assert [group.kept for group in wide.groups] == [3]
    assert wide.grouping.bytes == cap
    assert wide.grouping.cost < tight.grouping.cost
    for options in ({"memory_cap": cap - 1}, {"memory_cap": cap, "objective": "memory"}):
        assert planned(loads, chunk_tokens=32, gradient_checkpointing=False, **options).groups[0].kept == 0

    def trained(limit: int) -> list[torch.Tensor]:
        compiled = muxcompile.compile(
            backbone(), tasks_of(loads), muxcompile.Options(chunk_tokens=32, gradient_checkpointing=False, memory_cap=limit)
        )
        text = compiled.plan.text()
        assert ("forwards of up to 3 pieces are kept" in text) == (limit == cap)
        for number, name in enumerate(loads):
            fill(compiled, name, seed=number)
        given = {"ann": examples(1, (90, 20)), "ben": examples(2, (30,))}
        losses = [loss for _ in range(2) for loss in compiled.step(given).losses.values()]
        return losses + [tensor for name in loads for tensor in compiled.state_dict(name).values()]

    assert all(torch.equal(one, other) for one, other in zip(trained(cap), trained(cap - 1), strict=True))


def test_light_tasks_have_more_turns_where_device_time_is_shared() -> None:
    turns = planned({"ann": LIGHT, "ben": HEAVY}, fairness="proportional").forecast.turns
    assert turns.steps("ben") == 1
    assert turns.steps("ann") == 16, "the most that a period has"
    weighted = planned({"ann": LIGHT, "ben": HEAVY}, fairness={"ann": 1, "ben": 10}).forecast.turns
    assert 1 < weighted.steps("ann") < turns.steps("ann")


def test_turns_stay_when_tasks_come_and_go() -> None:
    options = muxcompile.Options(fairness="proportional", chunk_tokens=128)
    model = muxcompile.compile(backbone(), tasks_of({"ann": LIGHT, "ben": HEAVY}), options)
    before = model.turns
    assert len(before) == 16
    with pytest.warns(UserWarning, match="task 'cid': Options: fairness='proportional' was planned without it: it steps in every"):
        model.add_task(muxcompile.Task("cid", LORA))
    assert model.turns == tuple((*names, "cid") for names in before)
    model.remove_task("ann")
    assert set(model.turns) == {("ben", "cid"), ("cid",)}
    model.remove_task("cid")
    assert model.turns == (("ben",),)
    model.remove_task("ben")
    assert model.turns == ((),)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fairness": {"ann": 1, "ben": 1, "zoe": 1}}, "fairness names 'zoe', which is no task (tasks: ann, ben)"),
        ({"fairness": {"ann": 1}}, "fairness has no weight for task 'ben'"),
        ({"fairness": {}}, "fairness has no weight for task 'ann'"),
        ({"groups": (("ann", "zoe"),)}, "groups names 'zoe', which is no task"),
    ],
)
def test_options_that_name_wrong_tasks_are_refused_before_anything_is_surveyed(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muxcompile.forecast, "survey", None)
    both: tuple[dict[str, Any], ...] = ({"ann": LIGHT, "ben": HEAVY}, {"ann": {}, "ben": {}})
    for loads in both:
        with pytest.raises(ValueError, match=re.escape(f"Options: {reason}")):
            planned(loads, **options)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_weight_that_is_none_is_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"Options: fairness=.* for task 'ann' must be a number above 0"):
        muxcompile.Options(fairness={"ann": weight})


def test_a_thousand_tasks_of_any_lengths_are_planned_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: resolve(muxcompile.Task(name, CONFIGS[name]), backbone()) for name in ("ann", "dora", "prefix")}
    found = survey(backbone(), list(few.values()), device=CPU, target=None)
    draw = random.Random(7)
    adapters, tenants = [], {}
    for number in range(1000):
        like = draw.choice(list(few))
        lengths = [round(10 ** draw.uniform(1, 5)) for _ in range(20)]
        task = replace(few[like].task, name=f"t{number}", lengths=lengths, batch_size=draw.choice((1, 4, 16)))
        adapters.append(replace(few[like], task=task))
        tenants[task.name] = found.tasks[like]
    monkeypatch.setattr(muxcompile.forecast, "survey", lambda *_, **__: replace(found, tasks=tenants))
    for options in (muxcompile.Options(memory_cap=10**12, fairness="proportional"), muxcompile.Options()):
        answer = planner.plan(backbone(), CPU, adapters, options)
        assert sorted(name for group in answer.groups for name in group.tasks) == sorted(tenants)
        assert all(group.fixed for group in answer.groups)
    assert answer.grouping is not None
    with pytest.raises(
        ValueError, match=r"^memory: 1000 tasks need [\d,]+ bytes, cap [\d,]+; the largest set that fits has \d+: t"
    ):
        planner.plan(backbone(), CPU, adapters, muxcompile.Options(memory_cap=answer.grouping.bytes // 2))


def test_a_step_of_cut_sequences_is_held_against_all_the_forwards_it_runs() -> None:
    model = muxcompile.compile(
        backbone(), [muxcompile.Task("ann", LORA, lengths=(60,), batch_size=1)], muxcompile.Options(chunk_tokens=32)
    )
    (whole,), (cut,) = (check(model, {"ann": examples(1, (length,))}) for length in (30, 60))
    forwards = [found.lines[0].predicted for found in (whole, cut)]
    assert whole.lines[0].name == "embed.forward x 1"
    assert forwards[1] == pytest.approx(3 * forwards[0]), "two pieces, and the first one's forward again"
    assert cut.step.predicted > 2 * whole.step.predicted + forwards[0]
    assert not any(tensor.any() for tensor in model.gradients("ann").values())


def test_a_step_is_predicted_for_the_sequences_it_has_and_not_for_those_that_were_sampled() -> None:
    found = planned({"ann": LIGHT}).forecast.model
    shape, extras = Shape(64), found.survey.extras(["ann"])
    before = found.seconds(extras, shape)
    given = {"ann": [Example(np.zeros(60, dtype=np.int64), np.zeros(60, dtype=np.int64))]}
    assert known_data(found, given).seconds(extras, shape)[0] > before[0], "more keys for each row"
    assert found.seconds(extras, shape) == before


def test_regions_are_timed_at_the_plans_sizes_and_beside_them() -> None:
    assert neighbours(CPU, [64]) == [32, 64, 128]
    assert neighbours(CPU, [64, 192]) == [32, 64, 96, 128, 192, 384]
    assert neighbours(CPU, [1024]) == [512, 1024], "no larger than the planner may choose"
    assert neighbours(CPU, [16]) == [16, 32]


def test_a_run_goes_on_in_the_chunk_sizes_of_its_checkpoint(tmp_path: Path) -> None:
    def start(load: dict[str, Any], **options: Any) -> Any:
        model = muxcompile.compile(backbone(), tasks_of({"ann": load, "ben": LIGHT}), muxcompile.Options(**options))
        for name in model.tasks:
            fill(model, name, seed=len(name))
        return model

    first, later = ({name: examples(step, (9, 14)) for name in ("ann", "ben")} for step in (1, 2))
    gone = start(LIGHT)
    gone.step(first)
    gone.save_checkpoint(tmp_path / "at")
    # Today's data would be run in larger chunks.
    on = start(HEAVY)
    assert on.chunks != gone.chunks
    on.load_checkpoint(tmp_path / "at")
    assert on.chunks == gone.chunks
    expected, found = gone.step(later).losses, on.step(later).losses
    for name in gone.tasks:
        assert torch.equal(found[name], expected[name])
        assert all(torch.equal(value, on.state_dict(name)[key]) for key, value in gone.state_dict(name).items())
    asked = start(LIGHT, chunk_tokens=256)
    asked.load_checkpoint(tmp_path / "at")
    assert set(asked.chunks.values()) == {256}


def test_a_newcomer_that_does_not_fit_is_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    first, later = ({name: examples(step, (9, 14)) for name in ("ann", "ben")} for step in (1, 2))

    def start(**options: Any) -> Any:
        model = muxcompile.compile(backbone(), tasks_of({"ann": LIGHT, "ben": LIGHT}), muxcompile.Options(**options))
        for name in model.tasks:
            fill(model, name, seed=len(name))
        model.step(first)
        return model

    free = start()
    compiled = free._compiler.planned
    # One byte too few for a third task of the same adapter, in the chunks that there are.
    cap = compiled.grouping.bytes + compiled.forecast.loads[0].resident - 1
    model, (cid,) = start(memory_cap=cap), tasks_of({"cid": LIGHT})
    assert model.chunks == free.chunks, "else other bits are no fault"
    with monkeypatch.context() as patch:
        for name in ("capture", "run_passes", "partition"):
            patch.setattr(muxcompile.driver, name, None)
        with pytest.raises(
            ValueError, match=rf"^task 'cid': memory: 3 tasks need {cap + 1:,} bytes .*cap {cap:,}; room for more like it: 0"
        ):
            model.add_task([cid])
    assert model.tasks == ("ann", "ben")
    model.remove_task("ben")
    model.add_task([cid])
    assert model.tasks == ("ann", "cid"), "there is room for as many as before"
    with pytest.raises(ValueError, match=r"^task 'dora': memory: 3 tasks need [\d,]+ bytes"):
        model.add_task(tasks_of({"dora": LIGHT}))
    expected, found = free.step(later), model.step({"ann": later["ann"]})
    assert torch.equal(found.losses["ann"], expected.losses["ann"])
    assert all(torch.equal(value, model.state_dict("ann")[key]) for key, value in free.state_dict("ann").items())
    free.add_task([cid])
    assert "cid" in free.tasks, "without a limit nobody asks"


def test_a_newcomer_with_an_adapter_of_its_own_is_surveyed_and_admitted_where_it_fits() -> None:
    model = muxcompile.compile(backbone(), tasks_of({"ann": LIGHT}), muxcompile.Options(memory_cap=10**9))
    model.add_task(tasks_of({"prefix": LIGHT}))
    model.add_task(tasks_of({"ben": LIGHT}))
    assert model.tasks == ("ann", "prefix", "ben")
    assert set(model._compiler.survey.tasks) == {"ann", "prefix", "ben"}


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2", "tp=2"])
@pytest.mark.parametrize("longest", [230, 5000])
def test_chunks_of_several_ranks_hold_the_longest_sequence_however_short_the_others(mesh: str, longest: int) -> None:
    task = muxcompile.Task(
        "a", LoraConfig(r=4, target_modules=["q_proj"]), lengths=[20] * 9 + [30], batch_size=2, max_length=longest
    )
    given = resolve(task, backbone())
    for own in planner.plan(backbone(), CPU, [given], muxcompile.Options(mesh=mesh)).groups:
        assert own.tokens >= longest
        assert not own.carried
    assert planner.plan(backbone(), CPU, [given], muxcompile.Options()).groups[0].carried
