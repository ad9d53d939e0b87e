"""Slot tables train each task as torch.optim trains its tensors alone, and tasks come and go without touching one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from runtime.checkpoint import read_checkpoint, write_checkpoint
from runtime.state import State, Training
from runtime.tables import Param, Table, routes_of

CPU = torch.device("cpu")
BUCKET, WIDTH, HEIGHT = 8, 6, 10
KEY_A, KEY_B = "site.lora_A.weight", "site.lora_B.weight"


def layout(
    ranks: Mapping[str, int], *, rows: tuple[str, ...] | None = None, dtype: str = "float32"
) -> tuple[dict[str, Table], list[Param]]:
    """A bank of LoRA tables of one site: A [S, 8, 6], B [S, 8, 10] (transposed), scale [S]."""
    rows = rows or tuple(ranks)
    tables = {
        "A": Table("A", (len(rows), BUCKET, WIDTH), rows, True, "r", dtype),
        "B": Table("B", (len(rows), BUCKET, HEIGHT), rows, True, "r", dtype),
        "scale": Table(
            "scale", (len(rows),), rows, False, "r", values=tuple(1.0 + index if row else 0.0 for index, row in enumerate(rows))
        ),
    }
    params = []
    for task, rank in ranks.items():
        row = rows.index(task)
        params.append(Param(task, KEY_A, "A", row, 0, rank, False, bound=0.5))
        params.append(Param(task, KEY_B, "B", row, 0, rank, True, std=0.1))
    return tables, params


def state_of(ranks: Mapping[str, int], training: Mapping[str, Training] | None = None, **kwargs: Any) -> State:
    tables, params = layout(ranks, **kwargs)
    return State(tables, params, training or dict.fromkeys(ranks, Training()), CPU)


def accumulate(state: State, task: str, scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Put random gradients where the executor would; returns them in PEFT's shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key in state.tasks[task].keys:
        param = state.params[task, key]
        gradient = scale * torch.randn(state.shape(task, key), generator=generator)
        state.grads[param.table][param.row, param.start : param.stop] += gradient.T if param.transposed else gradient
        found[key] = gradient
    state.tasks[task].pending = 4
    return found


def weights(state: State, task: str) -> dict[str, Tensor]:
    return {key: state.read(task, key) for key in state.tasks[task].keys}


def everything(state: State, task: str) -> dict[str, Tensor]:
    """All that makes a task: weights, gradients, moments, counters."""
    found = weights(state, task) | {f"grad {key}": state.read(task, key, gradient=True) for key in state.tasks[task].keys}
    own = state.tasks[task]
    for key, view in zip(own.keys, own.views, strict=True):
        found |= {f"{name} {key}": value.clone() for name, value in own.optimizer.state[view].items() if isinstance(value, Tensor)}
    counters = (own.steps, own.examples, own.pending or -1, int(own.alive), len(own.unread))
    return found | {"counters": torch.tensor(counters)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# --- tensors by PEFT's keys -------------------------------------------------------------------------------------------


def test_tensors_are_written_and_read_in_pefts_shapes() -> None:
    state = state_of({"alice": 3, "bob": 8})
    a, b = torch.randn(3, WIDTH), torch.randn(HEIGHT, 3)
    state.write("alice", KEY_A, a)
    state.write("alice", KEY_B, b)
    assert torch.equal(state.read("alice", KEY_A), a)
    assert torch.equal(state.read("alice", KEY_B), b)
    assert state.shape("alice", KEY_B) == (HEIGHT, 3)
    assert torch.equal(state.masters["A"][0, :3], a)
    assert torch.equal(state.masters["B"][0, :3], b.T)
    assert not state.masters["A"][0, 3:].any(), "ranks beyond the task's own stay zero"


def test_what_is_read_is_a_copy() -> None:
    state = state_of({"alice": 3})
    before = state.read("alice", KEY_A)
    state.read("alice", KEY_A).zero_()
    assert torch.equal(state.read("alice", KEY_A), before)
    assert state.read("alice", KEY_B).is_contiguous()


def test_regions_read_copies_in_their_dtype_and_masters_stay_float32() -> None:
    state = state_of({"alice": 3}, dtype="bfloat16")
    value = torch.randn(3, WIDTH)
    state.write("alice", KEY_A, value)
    assert state.copies["A"].dtype == torch.bfloat16
    assert torch.equal(state.copies["A"][0, :3], value.bfloat16())
    assert torch.equal(state.read("alice", KEY_A), value)
    accumulate(state, "alice")
    state.step("alice")
    assert torch.equal(state.copies["A"], state.masters["A"].bfloat16())
    assert torch.equal(state.copies["B"], state.masters["B"].bfloat16())


def test_constants_are_float32_whatever_regions_compute_in() -> None:
    state = state_of({"alice": 3, "bob": 3}, dtype="bfloat16")
    assert torch.equal(state.copies["scale"], torch.tensor([1.0, 2.0]))
    assert "scale" not in state.grads


# --- fresh weights ----------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_depends_on_seed_name_and_key_alone() -> None:
    alone = weights(state_of({"alice": 3}), "alice")
    assert same(alone, weights(state_of({"bob": 8, "alice": 3}), "alice"))
    other_seed = weights(state_of({"alice": 3}, {"alice": Training(seed=1)}), "alice")
    other_name = weights(state_of({"bob": 3}), "bob")
    assert not torch.equal(alone[KEY_A], other_seed[KEY_A])
    assert not torch.equal(alone[KEY_A], other_name[KEY_A])


def test_drawing_neither_reads_nor_moves_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = weights(state_of({"alice": 3}), "alice")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert same(first, weights(state_of({"alice": 3}), "alice"))


def test_draws_follow_the_given_bound_or_deviation() -> None:
    tables = {"A": Table("A", (1, 256, 512), ("a",), True, "r")}
    params = [
        Param("a", "uniform", "A", 0, 0, 100, False, bound=0.25),
        Param("a", "normal", "A", 0, 100, 200, False, std=0.5),
        Param("a", "zeros", "A", 0, 200, 256, False),
    ]
    state = State(tables, params, {"a": Training()}, CPU)
    uniform, normal, zeros = (state.read("a", key) for key in ("uniform", "normal", "zeros"))
    assert uniform.abs().max() <= 0.25
    assert uniform.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.02)
    assert normal.std().item() == pytest.approx(0.5, rel=0.02)
    assert abs(normal.mean().item()) < 0.01
    assert not zeros.any()


def test_a_transposed_tensor_is_drawn_in_pefts_shape() -> None:
    # So the same numbers stand in the same places of PEFT's tensor, whatever the table looks like.
    flat = State(
        {"A": Table("A", (1, 3, 10), ("a",), True, "r")}, [Param("a", "k", "A", 0, 0, 3, True, bound=1.0)], {"a": Training()}, CPU
    )
    wide = State(
        {"A": Table("A", (1, 10, 3), ("a",), True, "r")}, [Param("a", "k", "A", 0, 0, 10, False, bound=1.0)], {"a": Training()}, CPU
    )
    assert torch.equal(flat.read("a", "k"), wide.read("a", "k"))


# --- optimizers -------------------------------------------------------------------------------------------------------

SETTINGS = [
    Training(),
    Training(learning_rate=0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3),
    Training(learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.5),
    Training(learning_rate=0.1, max_grad_norm=1e6),
    Training(learning_rate=0.05, lr_schedule="linear", warmup_steps=2, total_steps=5),
    Training(learning_rate=0.05, lr_schedule="cosine", warmup_steps=1, total_steps=6),
    Training(learning_rate=0.05, warmup_steps=3),
    Training(learning_rate=0.0),
    Training(optimizer="sgd", learning_rate=0.1),
    Training(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01),
    Training(optimizer="sgd", learning_rate=0.1, momentum=0.9, max_grad_norm=0.3, lr_schedule="linear", total_steps=5),
]


def torch_optimizer(tensors: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(tensors, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(
        tensors, lr=training.learning_rate, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay
    )


def schedule(optimizer: torch.optim.Optimizer, training: Training) -> Any:
    import transformers

    if training.lr_schedule == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, training.warmup_steps)
    make = {"linear": transformers.get_linear_schedule_with_warmup, "cosine": transformers.get_cosine_schedule_with_warmup}
    return make[training.lr_schedule](optimizer, training.warmup_steps, training.total_steps)


@pytest.mark.parametrize("training", SETTINGS, ids=str)
def test_a_task_trains_as_torch_trains_its_tensors_alone(training: Training) -> None:
    state = state_of({"other": 8, "alice": 3}, {"other": Training(learning_rate=0.7), "alice": training})
    tensors = {key: nn.Parameter(value.clone()) for key, value in weights(state, "alice").items()}
    optimizer = torch_optimizer(list(tensors.values()), training)
    rates = schedule(optimizer, training)
    for step in range(5):
        for key, gradient in accumulate(state, "alice", seed=step).items():
            tensors[key].grad = gradient
        accumulate(state, "other", seed=100 + step)
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), training.max_grad_norm or math.inf)
        optimizer.step()
        rates.step()
        state.step("other")
        torch.testing.assert_close(state.step("alice"), norm, rtol=1e-6, atol=0)
        for key, value in weights(state, "alice").items():
            torch.testing.assert_close(value, tensors[key].detach(), rtol=2e-6, atol=2e-7)
    assert state.tasks["alice"].steps == 5
    assert state.tasks["alice"].examples == 20


@pytest.mark.parametrize("total", [1, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_transformers(name: str, warmup: int, total: int) -> None:
    warmup = min(warmup, total)
    training = Training(learning_rate=0.3, lr_schedule=name, warmup_steps=warmup, total_steps=total)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    rates = schedule(optimizer, training)
    for step in range(total + 1):
        assert training.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        optimizer.step()
        rates.step()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_past_its_last_step_a_falling_rate_stays_at_zero(name: str) -> None:
    training = Training(learning_rate=0.3, lr_schedule=name, total_steps=4)
    assert [training.rate(step) for step in (4, 5, 6, 100)] == pytest.approx([0.0] * 4, abs=1e-15)


def test_the_learning_rate_is_read_at_the_tasks_own_step() -> None:
    training = Training(optimizer="sgd", learning_rate=1.0, lr_schedule="linear", total_steps=4)
    state = state_of({"alice": 3, "bob": 3}, dict.fromkeys(("alice", "bob"), training))
    for _ in range(2):
        accumulate(state, "bob")
        state.step("bob")
    before = weights(state, "alice")
    gradient = accumulate(state, "alice")
    state.step("alice")  # its first: the full rate
    for key, value in weights(state, "alice").items():
        torch.testing.assert_close(value, before[key] - gradient[key])


def test_the_norm_that_is_returned_is_the_one_before_clipping() -> None:
    state = state_of({"alice": 3}, {"alice": Training(max_grad_norm=0.1)})
    gradients = accumulate(state, "alice", scale=10)
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(state.step("alice"), expected)


def test_a_norm_counts_a_tasks_own_ranks_only() -> None:
    state = state_of({"alice": 3, "bob": 8})
    accumulate(state, "alice")
    expected = torch.cat([state.read("alice", key, gradient=True).flatten() for key in (KEY_A, KEY_B)]).norm()
    state.grads["A"][0, 3:] = 1e6  # padding of the bucket
    state.grads["A"][1] = 1e6  # a neighbour
    torch.testing.assert_close(state.step("alice"), expected)


def test_a_step_leaves_the_other_tasks_and_the_padding_alone() -> None:
    state = state_of({"alice": 3, "bob": 5}, dict.fromkeys(("alice", "bob"), Training(weight_decay=0.5, learning_rate=1.0)))
    accumulate(state, "bob", seed=1)
    bob = everything(state, "bob")
    accumulate(state, "alice")
    state.step("alice")
    assert same(everything(state, "bob"), bob)
    assert not state.masters["A"][0, 3:].any()
    assert not state.masters["B"][0, 3:].any()


def test_gradients_are_zero_after_a_step_and_gone_after_clearing() -> None:
    state = state_of({"alice": 3, "bob": 3})
    for task in ("alice", "bob"):
        accumulate(state, task)
    state.step("alice")
    assert not state.grads["A"][0].any()
    assert state.grads["A"][1].any()
    assert state.tasks["alice"].pending is None
    state.clear_gradients("bob")
    assert not state.grads["A"].any()
    assert state.tasks["bob"].pending is None
    assert state.tasks["bob"].steps == 0


def test_a_task_steps_the_same_whoever_steps_beside_it() -> None:
    alone, among = state_of({"alice": 3}), state_of({"bob": 8, "alice": 3, "carol": 1})
    for step in range(4):
        accumulate(alone, "alice", seed=step)
        alone.step("alice")
        for task in ("bob", "alice", "carol"):
            accumulate(among, task, seed=step if task == "alice" else 50 + step)
            among.step(task)
    assert same(everything(alone, "alice"), everything(among, "alice"))


# --- containment ------------------------------------------------------------------------------------------------------


def spoil_gradient(state: State) -> None:
    state.grads["A"][0, 1, 2] = math.nan


def spoil_loss(state: State) -> None:
    state.tasks["alice"].losses.append(torch.tensor(math.inf))


@pytest.mark.parametrize("spoil", [spoil_gradient, spoil_loss])
@pytest.mark.parametrize(
    "training", [Training(), Training(max_grad_norm=1.0), Training(optimizer="sgd", momentum=0.9, weight_decay=0.1)], ids=str
)
def test_a_step_that_is_not_finite_writes_nothing_and_is_final(spoil: Any, training: Training) -> None:
    state = state_of({"alice": 3, "bob": 3}, {"alice": training, "bob": Training()})
    accumulate(state, "alice")
    state.step("alice")
    state.poll(["alice"], wait=True)
    before = everything(state, "alice")

    accumulate(state, "alice", seed=1)
    spoil(state)
    state.step("alice")
    accumulate(state, "alice", seed=2)  # a good one, taken before the host knows
    state.step("alice")
    accumulate(state, "bob")
    state.step("bob")
    reasons = state.poll(["alice", "bob"], wait=True)
    assert reasons == {"alice": "step 1: loss, gradient or update is not finite; the step was not taken"}
    assert state.tasks["alice"].quarantined == reasons["alice"]
    assert state.tasks["alice"].steps == 1
    assert state.tasks["alice"].examples == 4
    after = everything(state, "alice")
    del before["counters"], after["counters"]
    assert same(after, before)
    assert state.tasks["bob"].steps == 1
    assert all(table.isfinite().all() for table in (*state.masters.values(), *state.copies.values(), *state.grads.values()))


def test_a_first_step_that_is_not_finite_leaves_the_fresh_adapter() -> None:
    for training in (Training(), Training(optimizer="sgd", momentum=0.9)):
        state = state_of({"alice": 3}, {"alice": training})
        before = weights(state, "alice")
        accumulate(state, "alice")
        spoil_gradient(state)
        state.step("alice")
        assert list(state.poll(["alice"], wait=True)) == ["alice"]
        assert same(weights(state, "alice"), before)
        assert state.tasks["alice"].steps == 0


def test_a_first_step_that_is_refused_leaves_momentum_that_is_zero(
    nan_memory: Callable[[], AbstractContextManager[None]], tmp_path: Path
) -> None:
    training = {"alice": Training(optimizer="sgd", momentum=0.9)}
    state, other = state_of({"alice": 3}, training), state_of({"alice": 3}, training)
    accumulate(state, "alice")
    spoil_gradient(state)
    with nan_memory():
        state.step("alice")
    assert list(state.poll(["alice"], wait=True)) == ["alice"]
    own = state.tasks["alice"]
    assert [float(own.optimizer.state[view]["momentum_buffer"].abs().max()) for view in own.views] == [0.0, 0.0]
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    read_checkpoint(tmp_path / "at", other).apply()
    assert other.tasks["alice"].quarantined == own.quarantined


def test_a_checkpoint_without_momentum_is_one_whose_momentum_is_zero(tmp_path: Path) -> None:
    training = {"alice": Training(optimizer="sgd", momentum=0.9)}
    state, other = state_of({"alice": 3}, training), state_of({"alice": 3}, training)
    state.tasks["alice"].optimizer.state.clear()  # as a checkpoint of a task without steps once was
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    accumulate(other, "alice")
    other.step("alice")
    read_checkpoint(tmp_path / "at", other).apply()
    own = other.tasks["alice"]
    assert [float(own.optimizer.state[view]["momentum_buffer"].abs().max()) for view in own.views] == [0.0, 0.0]


def test_losses_are_forgotten_with_their_step() -> None:
    state = state_of({"alice": 3})
    accumulate(state, "alice")
    state.tasks["alice"].losses.append(torch.tensor(1.0))
    state.step("alice")
    assert state.tasks["alice"].losses == []


def test_a_weight_that_a_step_would_make_infinite_is_not_committed() -> None:
    # Finite gradient, finite norm: only the updated weight overflows.
    training = Training(optimizer="sgd", learning_rate=1e30)
    state = state_of({"alice": 3}, {"alice": training})
    before = weights(state, "alice")
    accumulate(state, "alice", scale=1e15)
    state.step("alice")
    assert list(state.poll(["alice"], wait=True)) == ["alice"]
    assert same(weights(state, "alice"), before)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_clipped_gradient_is_judged_by_what_is_left_of_it(dtype: str) -> None:
    training = Training(optimizer="sgd", learning_rate=1.0 if dtype == "float16" else 1e25, max_grad_norm=1e-3)
    state = state_of({"alice": 3}, {"alice": training}, dtype=dtype)
    before = weights(state, "alice")
    accumulate(state, "alice", scale=1e15 if dtype == "float32" else 1e8)
    state.step("alice")
    assert state.poll(["alice"], wait=True) == {}
    assert not same(weights(state, "alice"), before)
    assert all(table.isfinite().all() for table in state.copies.values())


def test_a_weight_that_only_the_copies_dtype_cannot_hold_is_not_committed() -> None:
    state = state_of({"alice": 3}, {"alice": Training(optimizer="sgd", learning_rate=1.0)}, dtype="float16")
    before = weights(state, "alice")
    accumulate(state, "alice", scale=1e6)
    state.step("alice")
    assert list(state.poll(["alice"], wait=True)) == ["alice"]
    assert same(weights(state, "alice"), before)


def test_polling_reports_a_task_once_it_is_known_and_ever_after() -> None:
    state = state_of({"alice": 3})
    assert state.poll(["alice"], wait=True) == {}
    accumulate(state, "alice")
    spoil_gradient(state)
    state.step("alice")
    first = state.poll(["alice"], wait=False)
    assert state.poll(["alice"], wait=False) == first != {}


# --- tasks come and go --------------------------------------------------------------------------------------------------


def test_an_expelled_task_leaves_zeros_and_a_free_slot() -> None:
    state = state_of({"alice": 3, "bob": 3}, dtype="bfloat16")
    for task in ("alice", "bob"):
        accumulate(state, task)
    bob = everything(state, "bob")
    state.expel("alice")
    assert list(state.tasks) == ["bob"]
    assert {table.rows for table in state.tables.values()} == {("", "bob")}
    assert state.tables["scale"].values == (0.0, 2.0)
    for tables in (state.masters, state.copies, state.grads):
        assert not any(table[0].any() for table in tables.values())
    assert same(everything(state, "bob"), bob)
    assert state.routes == {"r": ("", "bob")}
    assert not any(task == "alice" for task, _ in state.params)


@settings(max_examples=15)
@given(order=st.permutations(["alice", "bob", "carol", ""]), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_moving_to_other_tables_keeps_everything_of_every_task(order: list[str], dtype: str) -> None:
    ranks = {"alice": 3, "bob": 8}
    state = state_of(ranks, dict.fromkeys(ranks, Training(learning_rate=0.1)), dtype=dtype)
    for task in ranks:
        for step in range(2):
            accumulate(state, task, seed=step)
            if step == 0:
                state.step(task)
    before = {task: everything(state, task) for task in ranks}
    tables, params = layout(ranks | {"carol": 1}, rows=tuple(order), dtype=dtype)
    state.relayout(tables, params, {"carol": Training(seed=5)})
    for task in ranks:
        assert same(everything(state, task), before[task])
    assert same(weights(state, "carol"), weights(state_of({"carol": 1}, {"carol": Training(seed=5)}), "carol"))
    assert state.routes == {"r": tuple(order)}
    assert torch.equal(state.copies["A"].float(), state.masters["A"].to(state.copies["A"].dtype).float())

    # And they go on as if nothing had happened.
    stayed = state_of(ranks, dict.fromkeys(ranks, Training(learning_rate=0.1)), dtype=dtype)
    for task in ranks:
        for step in range(2):
            accumulate(stayed, task, seed=step)
            if step == 0:
                stayed.step(task)
    for each in (state, stayed):
        for task in ranks:
            each.step(task)
    for task in ranks:
        assert same(everything(state, task), everything(stayed, task))


def test_a_newcomer_in_a_free_slot_leaves_the_tensors_where_they_are() -> None:
    tables, params = layout({"alice": 3}, rows=("alice", ""))
    state = State(tables, params, {"alice": Training()}, CPU)
    places = {name: tensor.data_ptr() for name, tensor in state.masters.items()}
    accumulate(state, "alice")
    before = everything(state, "alice")
    state.relayout(*layout({"alice": 3, "bob": 2}), {"bob": Training()})
    assert {name: tensor.data_ptr() for name, tensor in state.masters.items()} == places
    assert same(everything(state, "alice"), before)
    assert torch.equal(state.copies["scale"], torch.tensor([1.0, 2.0]))
    accumulate(state, "bob")
    state.step("bob")
    assert state.tasks["bob"].steps == 1


def test_a_slot_that_is_taken_again_holds_nothing_of_who_was_there() -> None:
    state = state_of({"alice": 8, "bob": 3})
    accumulate(state, "alice")
    state.step("alice")
    accumulate(state, "alice")
    state.expel("alice")
    state.relayout(*layout({"carol": 2, "bob": 3}), {"carol": Training()})
    assert same(everything(state, "carol"), everything(state_of({"carol": 2, "bob": 3}), "carol"))
    assert not state.masters["A"][0, 2:].any()


def test_tables_that_are_no_longer_there_are_freed() -> None:
    state = state_of({"alice": 3})
    tables, params = layout({"alice": 3})
    other = {f"other.{name}": replace(table, name=f"other.{name}") for name, table in tables.items()}
    moved = [replace(param, table=f"other.{param.table}") for param in params]
    state.relayout(other, moved, {})
    assert set(state.masters) == set(state.copies) == set(other)
    assert set(state.grads) == {"other.A", "other.B"}


def test_a_quarantined_task_stays_quarantined_when_tables_move() -> None:
    state = state_of({"alice": 3})
    accumulate(state, "alice")
    spoil_gradient(state)
    state.step("alice")
    state.relayout(*layout({"alice": 3, "bob": 3}), {"bob": Training()})
    assert list(state.poll(["alice", "bob"], wait=True)) == ["alice"]
    before = weights(state, "alice")
    accumulate(state, "alice")
    state.step("alice")
    assert same(weights(state, "alice"), before)


def test_all_tables_of_a_route_agree_on_its_slots() -> None:
    tables, _ = layout({"alice": 3, "bob": 3})
    assert routes_of(tables) == {"r": ("alice", "bob")}
    with pytest.raises(AssertionError, match="route r"):
        routes_of(tables | {"B": tables["B"].with_row(0, "")})


def test_a_row_of_a_table_is_given_away_with_its_constant() -> None:
    tables, _ = layout({"alice": 3, "bob": 3})
    assert tables["scale"].with_row(1, "carol", 7.0).values == (1.0, 7.0)
    assert tables["scale"].with_row(1, "carol", 7.0).rows == ("alice", "carol")
    assert tables["A"].with_row(0, "").values == ()
