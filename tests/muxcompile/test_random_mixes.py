"""Any mix of tasks, ranks, lengths and masks: every task gets what it would have got alone, or is skipped with a warning."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import muxcompile

from .peft_reference import (
    Example,
    count_labelled,
    example,
    fill,
    llama,
    loss_and_gradients,
    peft_model,
    trainable,
    wrong_gradients,
    wrong_loss,
)

pytestmark = pytest.mark.usefixtures("one_capture")

# Linear schedule with warm-up: the learning rate tells how many steps a task has really taken.
TRAINING: dict[str, Any] = {"learning_rate": 1e-2, "lr_schedule": "linear", "warmup_steps": 3, "total_steps": 1000}
POOL = {
    "one": LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"),
    "two": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "eight": LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    "nine": LoraConfig(r=9, target_modules=["down_proj", "o_proj"], use_rslora=True),
    "seventeen": LoraConfig(r=17, target_modules=r".*layers\.1\..*_proj"),
    "thirty-three": LoraConfig(r=33, target_modules="all-linear"),
}


@functools.cache
def backbone() -> Any:
    return llama(41)


@functools.cache
def pool() -> tuple[Any, dict[str, Any]]:
    """One compiled model with every task of the pool, and each task alone in PEFT's hands."""
    tasks = [muxcompile.Task(name, config, **TRAINING) for name, config in POOL.items()]
    model = muxcompile.compile(backbone(), tasks, muxcompile.Options(chunk_tokens=128))
    return model, {name: peft_model(backbone(), config) for name, config in POOL.items()}


@dataclass(frozen=True)
class Sequence:
    """One drawn sequence: `labelled` is the fraction of labels that are kept."""

    length: int
    labelled: float
    seed: int

    def example(self) -> Example:
        return example(torch.Generator().manual_seed(self.seed), self.length, self.labelled)


sequences = st.builds(Sequence, st.integers(1, 70), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 10**6))
batches = st.lists(sequences.map(Sequence.example), min_size=1, max_size=3)


def reference(alone: Any, weights: dict[str, torch.Tensor], given_examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    with torch.no_grad():
        for key, parameter in trainable(alone).items():
            parameter.copy_(weights[key])
    return loss_and_gradients(alone, given_examples)


def check_step(model: Any, alone: dict[str, Any], data: dict[str, list[Example]]) -> None:
    """forward_backward and optim_step of these data: everything that a task may see of it."""
    weights = {name: model.state_dict(name) for name in model.tasks}
    steps, seen = model.steps, model.examples_seen
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = model.forward_backward(data)
    skipped = {name for name, examples in data.items() if count_labelled(examples) == 0}
    told = [str(warning.message) for warning in caught if "no labelled token" in str(warning.message)]
    assert sorted(told) == sorted(f"task {name!r}: no labelled token in this batch; the task is skipped" for name in skipped)
    for name, examples in data.items():
        assert result.tokens[name] == count_labelled(examples)
        if name in skipped:
            assert math.isnan(float(result.losses[name]))
            continue
        loss, gradients = reference(alone[name], weights[name], examples)
        assert wrong_loss(float(result.losses[name]), loss) + wrong_gradients(model.gradients(name), gradients) == [], name
    for name in set(model.tasks) - set(data) | skipped:
        assert not any(gradient.any() for gradient in model.gradients(name).values()), name
    active = [name for name in data if name not in skipped]
    model.optim_step(active)
    assert result.quarantined == {}
    for name in model.tasks:
        took = name in active
        assert model.steps[name] == steps[name] + took
        assert model.examples_seen[name] == seen[name] + took * len(data.get(name, []))
        rate = TRAINING["learning_rate"] * min((steps[name] + took) / 3, 1 - (steps[name] + took - 3) / 997)
        assert model.learning_rate(name) == pytest.approx(rate, rel=1e-12)  # float64, one formula written in two ways
        # The first step of a warm-up has a rate of 0: weights move from the second on.
        moves = took and steps[name] > 0
        assert all(torch.equal(model.state_dict(name)[key], value) != moves for key, value in weights[name].items()) or moves, name


@given(data=st.dictionaries(st.sampled_from(sorted(POOL)), batches, min_size=1, max_size=6), seed=st.integers(0, 100))
def test_any_mix_of_data_gives_every_task_what_it_would_have_got_alone(data: dict[str, list[Example]], seed: int) -> None:
    model, alone = pool()
    for index, name in enumerate(POOL):
        fill(model, name, seed=10 * seed + index)
    check_step(model, alone, data)


targets = st.one_of(
    st.lists(
        st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        min_size=1,
        max_size=4,
        unique=True,
    ),
    st.just("all-linear"),
)
adapters = st.builds(
    lambda r, alpha, target, rslora, patterns: LoraConfig(
        r=r, lora_alpha=alpha, target_modules=target, use_rslora=rslora, rank_pattern=patterns
    ),
    st.integers(1, 33),
    st.integers(1, 40),
    targets,
    st.booleans(),
    st.dictionaries(st.sampled_from(["q_proj", "layers.1.self_attn.v_proj", "down_proj"]), st.integers(1, 33), max_size=2),
)


# Every example is compiled: a failure is reported as it was drawn, to shrink it would take minutes.
@settings(max_examples=max(1, settings().max_examples // 6), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(mix=st.dictionaries(st.text("abXY é-_", min_size=1, max_size=6), st.tuples(adapters, batches), min_size=1, max_size=6))
@pytest.mark.filterwarnings("ignore:task .* which matches none of its")
def test_any_mix_of_adapters_gives_every_task_what_it_would_have_got_alone(
    mix: dict[str, tuple[LoraConfig, list[Example]]],
) -> None:
    assume(len({name.casefold() for name in mix}) == len(mix) and all(name == name.strip() for name in mix))
    tasks = [muxcompile.Task(name, config, **TRAINING) for name, (config, _) in mix.items()]
    model = muxcompile.compile(backbone(), tasks, muxcompile.Options(chunk_tokens=96))
    alone = {}
    for index, (name, (config, _)) in enumerate(mix.items()):
        fill(model, name, seed=index)
        alone[name] = peft_model(backbone(), config)
    check_step(model, alone, {name: data for name, (_, data) in mix.items()})


def masked(length: int) -> Example:
    return {"input_ids": list(range(length)), "labels": [-100] * length}


def test_a_step_skips_a_task_with_no_labelled_token_and_takes_the_others() -> None:
    model, _ = pool()
    for index, name in enumerate(POOL):
        fill(model, name, seed=index)
    before = {name: model.state_dict(name) for name in ("one", "two")}
    steps, seen, rate = model.steps, model.examples_seen, model.learning_rate("one")
    full = Sequence(9, 1.0, 1).example()
    # The first label predicts nothing: a sequence whose only label is the first has none.
    first_only = {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}
    for _ in range(2):
        with pytest.warns(UserWarning, match="task 'one': no labelled token") as caught:
            result = model.step({"one": [masked(30), first_only], "two": [full]})
        assert len([warning for warning in caught if "no labelled" in str(warning.message)]) == 1
        assert math.isnan(float(result.losses["one"]))
        assert math.isfinite(float(result.losses["two"]))
        assert result.tokens == {"one": 0, "two": 8}
        assert set(result.grad_norms) == {"two"}
        assert result.quarantined == {}
    assert model.steps["one"] == steps["one"]
    assert model.steps["two"] == steps["two"] + 2
    assert (model.examples_seen["one"], model.learning_rate("one")) == (seen["one"], rate)
    assert all(torch.equal(model.state_dict("one")[key], value) for key, value in before["one"].items())
    assert all(not torch.equal(model.state_dict("two")[key], value) for key, value in before["two"].items())


def test_a_call_in_which_no_task_has_a_labelled_token_runs_nothing() -> None:
    model, _ = pool()
    steps = model.steps
    with pytest.warns(UserWarning, match="no labelled token") as caught:
        result = model.step({"one": [masked(3)], "nine": [masked(1), masked(70)]})
    assert len([warning for warning in caught if "no labelled" in str(warning.message)]) == 2
    assert all(math.isnan(float(loss)) for loss in result.losses.values())
    assert result.tokens == {"one": 0, "nine": 0}
    assert model.steps == steps
    assert len(model.executed) == 0


def test_a_sequence_without_labels_beside_labelled_ones_changes_no_gradient() -> None:
    model, _ = pool()
    found = []
    labelled = [Sequence(21, 1.0, 3).example(), Sequence(8, 0.3, 4).example()]
    for extra in ([], [masked(40)], [masked(1), masked(1)]):
        fill(model, "nine", seed=5)
        result = model.forward_backward({"nine": [*labelled, *extra]})
        found.append((float(result.losses["nine"]), model.gradients("nine")))
        model.state.clear_gradients("nine")
    for loss, gradients in found[1:]:
        assert wrong_loss(loss, found[0][0]) + wrong_gradients(gradients, found[0][1]) == []
