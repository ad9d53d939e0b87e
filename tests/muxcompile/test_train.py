"""The training loop on a compiled model that only counts: what it asks for, writes, resumes and refuses."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muxcompile.feed import Feed, order, split
from muxcompile.jobs import load_jobs
from muxcompile.metrics import read_metrics
from muxcompile.output import check_output, checkpoints
from muxcompile.progress import Progress
from muxcompile.standing import STATE
from muxcompile.tenants import Tenant, prepare, read_all
from muxcompile.train import train

Batches = dict[str, list[dict[str, list[int]]]]


class Fake:
    """A CompiledModel whose weight is a hash of everything it was trained on, in order."""

    overlaps = False

    def __init__(self, *, quarantine: dict[str, int] | None = None, die_at: int | None = None, turns: str = "alice bob") -> None:
        self.turns = tuple(tuple(tasks.split()) for tasks in turns.split("|"))
        self.calls: list[Batches] = []
        self.weights: dict[str, int] = {}
        self.quarantine, self.die_at = quarantine or {}, die_at
        self.steps: Counter[str] = Counter()

    def learning_rate(self, name: str, ahead: int = 0) -> float:
        return 0.5

    def step_rounds(self, rounds: list[Batches]) -> list[Any]:
        return [self.step(batches) for batches in rounds]

    def step(self, batches: Batches) -> Any:
        if self.die_at is not None and len(self.calls) + 1 == self.die_at:
            raise RuntimeError("the machine went away")
        self.calls.append(batches)
        lost = {name: "loss is not finite" for name, at in self.quarantine.items() if name in batches and len(self.calls) >= at}
        self.steps.update(name for name in batches if name not in lost)
        for name, examples in batches.items():
            self.weights[name] = hash((self.weights.get(name, 0), json.dumps(examples)))
        losses = {name: torch.tensor(float(self.weights[name] % 1000)) for name in batches}
        tokens = {name: sum(label != -100 for one in examples for label in one["labels"][1:]) for name, examples in batches.items()}
        return SimpleNamespace(losses=losses, tokens=tokens, grad_norms=dict.fromkeys(batches, torch.tensor(1.0)), quarantined=lost)

    def evaluate(self, batches: Batches) -> Any:
        return SimpleNamespace(losses={name: float(self.weights.get(name, 0) % 1000) for name in batches})

    def save_pretrained(self, folder: Path) -> None:
        (folder / "adapters.json").write_text(json.dumps(self.weights))

    def save_checkpoint(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "checkpoint.json").write_text(json.dumps(self.weights))

    def load_checkpoint(self, folder: Path) -> None:
        self.weights = json.loads((folder / "checkpoint.json").read_text())


@pytest.fixture(params=[False, True], autouse=True)
def one_by_one_and_together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline is given several rounds together: all that can be seen is the same."""
    monkeypatch.setattr(Fake, "overlaps", request.param)


class Recorder(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def rows(count: int, first: int = 1) -> list[dict[str, list[int]]]:
    return [{"input_ids": [first, i + 1, 3], "labels": [-100, i + 1, 3]} for i in range(count)]


Prepare = Callable[..., dict[str, Tenant]]


@pytest.fixture
def tenants_of(tmp_path: Path, write_jsonl: Callable[[str, list[Any]], Path]) -> Prepare:
    """tenants_of(alice="train: {...}") -> tenants with 7 training examples each."""

    def make(train_rows: list[Any] | None = None, peft: str = "{r: 2}", **tasks: str) -> dict[str, Tenant]:
        write_jsonl("train.jsonl", train_rows or rows(7))
        write_jsonl("eval.jsonl", rows(2, first=2))
        text = "base: base\ntasks:\n"
        for name, train_line in tasks.items():
            text += f"  {name}:\n    peft: {peft}\n    data: train.jsonl\n    eval_data: eval.jsonl\n    {train_line}\n"
        (tmp_path / "jobs.yaml").write_text(text)
        jobs = load_jobs(tmp_path / "jobs.yaml")
        weight = torch.zeros(16, 4)
        backbone = SimpleNamespace(
            config=SimpleNamespace(max_position_embeddings=8), get_input_embeddings=lambda: SimpleNamespace(weight=weight)
        )
        return prepare(jobs, read_all(jobs), backbone, None)

    return make


def of(folder: Path, task: str, key: str = "loss") -> list[Any]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if row["task"] == task and key in row]


def test_one_call_a_step_carries_every_unfinished_task(tenants_of: Prepare, tmp_path: Path) -> None:
    model, out = Fake(), tmp_path / "out"
    report = train(
        tenants_of(alice="train: {batch_size: 3, max_steps: 4}", bob="train: {batch_size: 2, num_train_epochs: 1}"), model, out
    )
    assert [sorted(call) for call in model.calls] == [["alice", "bob"]] * 4
    assert [len(call["alice"]) for call in model.calls] == [3, 3, 1, 3]
    assert [len(call["bob"]) for call in model.calls] == [
        2,
        2,
        2,
        1,
    ]
    assert of(out, "alice", "step") == [0, 1, 2, 3, 4, 4]
    assert of(out, "alice", "epoch")[1:-1] == [0.4286, 0.8571, 1.0, 1.4286]
    assert report.steps == 4
    assert report.tasks["bob"].tokens == 21
    assert report.tasks["bob"].labelled_tokens == 14
    assert (out / "adapters.json").exists()
    assert not checkpoints(out)
    row = next(row for row in read_metrics(out / "metrics.jsonl") if "loss" in row)
    assert set(row) == {
        "step", "task", "epoch", "loss", "grad_norm", "learning_rate",
        "tokens", "labelled_tokens", "tokens_per_second", "elapsed_seconds",
    }  # fmt: skip


def test_a_finished_task_leaves_and_the_rest_go_on(tenants_of: Prepare, tmp_path: Path) -> None:
    model = Fake()
    train(tenants_of(alice="train: {max_steps: 1}", bob="train: {max_steps: 3}"), model, tmp_path / "out")
    assert [sorted(call) for call in model.calls] == [["alice", "bob"], ["bob"], ["bob"]]


def test_the_order_depends_on_seed_name_and_epoch_alone(tenants_of: Prepare, tmp_path: Path) -> None:
    random.seed(5)
    state, torch_state = random.getstate(), torch.get_rng_state()
    alone, shared = Fake(), Fake()
    train(tenants_of(alice="train: {batch_size: 2, max_steps: 9}"), alone, tmp_path / "a")
    train(tenants_of(bob="train: {max_steps: 3}", alice="train: {batch_size: 2, max_steps: 9}"), shared, tmp_path / "b")
    assert alone.weights["alice"] == shared.weights["alice"]
    assert of(tmp_path / "a", "alice") == of(tmp_path / "b", "alice")
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    orders = [order(50, seed, name, purpose) for seed in (0, 1) for name in "ab" for purpose in ("epoch 0", "epoch 1")]
    assert len(set(map(tuple, orders))) == 8
    assert all(sorted(one) == list(range(50)) for one in orders)


def test_an_epoch_gives_every_example_once_and_resumes_at_any_count() -> None:
    feed = Feed("alice", 0, rows(7), 3)
    given = [one for _ in range(feed.steps_per_epoch) for one in feed.take()]
    assert sorted(map(json.dumps, given)) == sorted(map(json.dumps, rows(7)))
    assert feed.epoch == 1
    resumed = Feed("alice", 0, rows(7), 3, consumed=3)
    assert resumed.take() == given[3:6]
    assert resumed.take() == given[6:]


def test_a_share_held_out_is_never_trained_on() -> None:
    keep, hold = split(rows(7), 0.3, 0, "alice")
    assert len(hold) == 2
    assert sorted(keep + hold) == list(range(7))
    assert split(rows(7), 0.3, 0, "alice") == (keep, hold)


def test_accumulation_makes_one_step_of_several_batches(tenants_of: Prepare, tmp_path: Path) -> None:
    model = Fake()
    train(tenants_of(alice="train: {batch_size: 2, gradient_accumulation_steps: 3, num_train_epochs: 2}"), model, tmp_path / "out")
    assert [len(call["alice"]) for call in model.calls] == [6, 1, 6, 1]


def test_logging_and_evaluation_keep_their_own_pace(tenants_of: Prepare, tmp_path: Path) -> None:
    train(tenants_of(alice="train: {max_steps: 5, logging_steps: 2, eval_steps: 3}"), Fake(), tmp_path / "out")
    found = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in found if "loss" in row] == [2, 4, 5]
    assert [row["step"] for row in found if "eval_loss" in row] == [0, 3, 5]


# A period of three rounds: alice steps in each, bob in the second.
TURNS = "alice | alice bob | alice"


def test_who_has_more_turns_steps_more_often_and_each_ends_after_its_own_steps(tenants_of: Prepare, tmp_path: Path) -> None:
    model = Fake(turns=TURNS)
    report = train(tenants_of(alice="train: {max_steps: 5}", bob="train: {max_steps: 2}"), model, tmp_path / "out")
    assert [sorted(call) for call in model.calls] == [
        ["alice"], ["alice", "bob"], ["alice"], ["alice"], ["alice", "bob"]
    ]  # fmt: skip
    assert {name: standing.steps for name, standing in report.tasks.items()} == {"alice": 5, "bob": 2}
    assert of(tmp_path / "out", "bob", "step") == [0, 1, 2, 2], "its own steps, not the rounds"


def test_a_round_in_which_nobody_is_left_is_passed_over(tenants_of: Prepare, tmp_path: Path) -> None:
    model = Fake(turns=TURNS)
    report = train(tenants_of(alice="train: {max_steps: 2}", bob="train: {max_steps: 3}"), model, tmp_path / "out")
    assert [sorted(call) for call in model.calls] == [["alice"], ["alice", "bob"], ["bob"], ["bob"]]
    assert report.steps == 8, "rounds 2, 3, 5 and 6 had no turn for bob, who was alone"
    assert len(report.step_seconds) == 4


def test_a_task_in_quarantine_leaves_its_turns_empty(tenants_of: Prepare, tmp_path: Path) -> None:
    model, told = Fake(quarantine={"alice": 3}, turns=TURNS), Recorder()
    train(tenants_of(alice="train: {max_steps: 9}", bob="train: {max_steps: 2}"), model, tmp_path / "out", progress=told)
    if not model.overlaps:  # together, later rounds are on their way already
        assert [sorted(call) for call in model.calls] == [["alice"], ["alice", "bob"], ["alice"], ["bob"]]
    assert told.notes == ["alice: quarantined at step 3: loss is not finite"]


def test_logging_evaluation_and_checkpoints_go_by_a_tasks_own_steps(tenants_of: Prepare, tmp_path: Path) -> None:
    tenants = tenants_of(
        alice="train: {max_steps: 6, logging_steps: 3}", bob="train: {max_steps: 4, logging_steps: 2, eval_steps: 2, save_steps: 2}"
    )
    train(tenants, Fake(turns=TURNS), tmp_path / "out")
    found = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [(row["task"], row["step"]) for row in found if "loss" in row] == [("alice", 3), ("bob", 2), ("alice", 6), ("bob", 4)]
    assert [row["step"] for row in found if "eval_loss" in row and row["task"] == "bob"] == [0, 2, 4]
    # Bob's second and fourth steps are in the fifth and the eleventh round.
    assert [round for round, _ in checkpoints(tmp_path / "out")] == [5, 11]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.sets(st.sampled_from(["alice", "bob"]), min_size=1), min_size=1, max_size=5).filter(
        lambda rounds: set().union(*rounds) == {"alice", "bob"}
    ),
    steps=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    saves=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    die_at=st.integers(1, 10),
)
def test_a_run_resumed_in_mid_period_ends_as_an_uninterrupted_one(
    tenants_of: Prepare, turns: list[set[str]], steps: tuple[int, int], saves: tuple[int, int], die_at: int
) -> None:
    text = "|".join(" ".join(sorted(tasks)) for tasks in turns)
    jobs = {
        name: f"train: {{batch_size: 2, max_steps: {count}, save_steps: {save}}}"
        for name, count, save in zip(("alice", "bob"), steps, saves, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "out"
        straight, resumed = Fake(turns=text), Fake(turns=text)
        train(tenants_of(**jobs), straight, whole)
        with contextlib.suppress(RuntimeError):  # a die_at beyond the end kills nothing
            train(tenants_of(**jobs), Fake(turns=text, die_at=die_at), out)
        report = train(tenants_of(**jobs), resumed, out, resume=True)
        assert tuple(standing.steps for standing in report.tasks.values()) == steps
        assert resumed.weights == straight.weights
        assert timeless(out) == timeless(whole)


def test_a_checkpoint_that_knows_rounds_alone_goes_on_as_it_did(tenants_of: Prepare, tmp_path: Path) -> None:
    straight, out = Fake(), tmp_path / "out"
    train(tenants_of(**JOBS), straight, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="went away"):
        train(tenants_of(**JOBS), Fake(die_at=8), out)
    for _, path in checkpoints(out):
        state = json.loads((path / STATE).read_text())
        for standing in state["tasks"].values():
            del standing["steps"]
        (path / STATE).write_text(json.dumps(state))
    resumed = Fake()
    report = train(tenants_of(**JOBS), resumed, out, resume=True)
    assert report.resumed_from == 6, "bob had ended before"
    assert {name: standing.steps for name, standing in report.tasks.items()} == {"alice": 9, "bob": 5}
    assert resumed.weights == straight.weights
    assert timeless(out) == timeless(tmp_path / "whole")


JOBS = {"alice": "train: {batch_size: 2, max_steps: 9, save_steps: 2}", "bob": "train: {batch_size: 3, max_steps: 5}"}


def timeless(folder: Path) -> list[dict[str, Any]]:
    clocks = ("tokens_per_second", "elapsed_seconds")
    return [{key: value for key, value in row.items() if key not in clocks} for row in read_metrics(folder / "metrics.jsonl")]


def test_a_resumed_run_ends_as_an_uninterrupted_one_without_repeated_rows(tenants_of: Prepare, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    straight = Fake()
    train(tenants_of(**JOBS), straight, whole)
    with pytest.raises(RuntimeError, match="went away"):
        train(tenants_of(**JOBS), Fake(die_at=6), out)
    (out / "checkpoint-6").mkdir()  # killed while it wrote this one
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ta')
    assert [step for step, _ in checkpoints(out)] == [2, 4]
    resumed = Fake()
    report = train(tenants_of(**JOBS), resumed, out, resume=True)
    assert report.resumed_from == 4
    assert len(resumed.calls) == 5
    assert report.steps == 9
    assert resumed.weights == straight.weights
    assert timeless(out) == timeless(whole)
    assert [step for step, _ in checkpoints(out)] == [2, 4, 6, 8, 9]
    again = Fake()
    train(tenants_of(**JOBS), again, out, resume=True)
    assert not again.calls
    assert again.weights == straight.weights
    assert timeless(out) == timeless(whole)


def test_a_run_resumed_to_end_earlier_keeps_its_rows_and_its_count(tenants_of: Prepare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(tenants_of(**JOBS), Fake(), out)
    before, resumed = timeless(out), Fake()
    report = train(tenants_of(**JOBS | {"alice": "train: {batch_size: 2, max_steps: 3}"}), resumed, out, resume=True)
    assert not resumed.calls
    assert {name: standing.steps for name, standing in report.tasks.items()} == {"alice": 9, "bob": 5}
    assert timeless(out) == before
    report = train(tenants_of(**JOBS | {"alice": "train: {batch_size: 2, max_steps: 11}"}), resumed, out, resume=True)
    assert report.tasks["alice"].steps == 11
    assert len(resumed.calls) == 2, "nothing is taken twice"


DAMAGE = [
    "", "{", "[]", "{}", "null",
    '{"step": 2, "elapsed_seconds": 1, "tasks": []}', '{"step": "2", "elapsed_seconds": 1, "tasks": {}}',
    '{"step": 2, "elapsed_seconds": null, "tasks": {}}', '{"step": 2, "elapsed_seconds": 1, "tasks": {"alice": []}}',
    '{"step": 2, "elapsed_seconds": 1, "tasks": {"alice": {"steps": "2"}}}',
    '{"step": 2, "elapsed_seconds": 1, "tasks": {"alice": {"stps": 2}}}', "\xff",
]  # fmt: skip


def test_the_newest_checkpoints_are_kept_and_a_resumed_run_goes_on_so(tenants_of: Prepare, tmp_path: Path) -> None:
    out, limit = tmp_path / "out", "train: {batch_size: 2, max_steps: 9, save_steps: 2, save_total_limit: 2}"
    with pytest.raises(RuntimeError, match="went away"):
        train(tenants_of(alice=limit, bob=JOBS["bob"]), Fake(die_at=8), out)
    assert [step for step, _ in checkpoints(out)] == [4, 6]
    (out / "checkpoint-4" / "notes.txt").write_text("precious")
    told = Recorder()
    train(tenants_of(alice=limit, bob=JOBS["bob"]), Fake(), out, resume=True, progress=told)
    assert [step for step, _ in checkpoints(out)] == [4, 8, 9], "the newest, and one that is not ours alone"
    assert [note for note in told.notes if "save_total_limit" in note] == [
        f"{out / 'checkpoint-4'} stays, though save_total_limit is reached: it holds what muxcompile has not written"
    ]


@pytest.mark.parametrize(("limits", "kept"), [((1, 3), 3), ((2, None), 6), ((None, None), 6)])
def test_of_several_tasks_that_save_the_one_that_keeps_most_is_heard(
    tenants_of: Prepare, tmp_path: Path, limits: tuple[int | None, int | None], kept: int
) -> None:
    jobs = {
        name: f"train: {{batch_size: 2, max_steps: 6, save_steps: 1, save_total_limit: {'null' if limit is None else limit}}}"
        for name, limit in zip(("alice", "bob"), limits, strict=True)
    }
    train(tenants_of(**jobs), Fake(), tmp_path / "out")
    assert [step for step, _ in checkpoints(tmp_path / "out")] == list(range(1, 7))[-kept:]


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_file_of_standings_is_refused_by_its_path(tenants_of: Prepare, tmp_path: Path, text: str) -> None:
    out, jobs = tmp_path / "out", {"alice": "train: {batch_size: 2, max_steps: 2, save_steps: 1}"}
    train(tenants_of(**jobs), Fake(turns="alice"), out)
    path = out / "checkpoint-2" / STATE
    path.write_bytes(text.encode("latin-1"))
    before = files(out)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: ") as caught:
        train(tenants_of(**jobs), Fake(turns="alice"), out, resume=True)
    assert len(str(caught.value).splitlines()) == 1
    assert files(out) == before


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resuming_without_a_checkpoint_begins_anew_and_says_so(tenants_of: Prepare, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        train(tenants_of(**JOBS), Fake(die_at=2), tmp_path / "out")
    told = Recorder()
    train(tenants_of(**JOBS), Fake(), tmp_path / "out", resume=True, progress=told)
    assert of(tmp_path / "out", "alice", "step") == [*range(10), 9]
    assert "no whole checkpoint" in told.notes[0]


def test_a_checkpoint_of_other_jobs_is_refused(tenants_of: Prepare, tmp_path: Path) -> None:
    train(tenants_of(**JOBS), Fake(), tmp_path / "out")
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="was made with tasks alice, bob, these jobs have alice"):
        train(tenants_of(alice=JOBS["alice"]), Fake(), tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match="task 'bob' was trained on other data, batch_size or seed"):
        train(tenants_of(alice=JOBS["alice"], bob="train: {batch_size: 2, max_steps: 5}"), Fake(), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_a_quarantined_task_stops_with_its_reason_and_the_others_go_on(tenants_of: Prepare, tmp_path: Path) -> None:
    model, told = Fake(quarantine={"bob": 2}), Recorder()
    report = train(tenants_of(alice="train: {max_steps: 3}", bob="train: {max_steps: 3}"), model, tmp_path / "out", progress=told)
    if not model.overlaps:
        assert [sorted(call) for call in model.calls] == [["alice", "bob"], ["alice", "bob"], ["alice"]]
    assert report.tasks["bob"].quarantined == "loss is not finite"
    assert of(tmp_path / "out", "bob", "quarantined") == ["loss is not finite"]
    assert told.notes == ["bob: quarantined at step 2: loss is not finite"]


def test_a_loss_that_is_not_finite_is_null_in_the_metrics(tenants_of: Prepare, tmp_path: Path) -> None:
    model = Fake()
    model.evaluate = lambda batches: SimpleNamespace(losses=dict.fromkeys(batches, math.nan))  # type: ignore[method-assign]
    train(tenants_of(alice="train: {max_steps: 1}"), model, tmp_path / "out")
    assert '"eval_loss": null' in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_a_falling_schedule_is_measured_by_the_steps_of_the_run(tenants_of: Prepare) -> None:
    tenants = tenants_of(
        alice="train: {batch_size: 2, num_train_epochs: 2, lr_schedule: linear}",
        bob="train: {max_steps: 5, lr_schedule: cosine, total_steps: 9}",
    )
    assert tenants["alice"].task.total_steps == tenants["alice"].total_steps == 8
    assert tenants["bob"].task.total_steps == 9
    assert tenants["bob"].total_steps == 5


def test_what_is_left_out_is_said(tenants_of: Prepare, write_jsonl: Callable[[str, list[Any]], Path]) -> None:
    longer = [{"input_ids": [1] * 6, "labels": [1] * 6}]
    tenants = tenants_of(train_rows=rows(7) + longer, alice="train: {max_length: 3, too_long: drop}", bob="train: {max_steps: 1}")
    (line,) = tenants["alice"].notes
    assert tenants["bob"].notes == ()
    assert re.fullmatch(r"alice: 1 of 8 examples of .*train\.jsonl left out, too long", line)
    assert len(tenants["alice"].data) == 7
    assert len(tenants["bob"].data) == 8
    with pytest.raises(
        ValueError, match=r"train\.jsonl:8: input_ids is 6 tokens long, over the task's max_length of 5 .* \(task 'alice'\)"
    ):
        tenants_of(train_rows=rows(7) + longer, alice="train: {max_length: 5}")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "folder"])
def test_virtual_tokens_take_their_part_of_the_models_limit(tenants_of: Prepare, tmp_path: Path, kind: str) -> None:
    longer = [{"input_ids": [1] * 6, "labels": [1] * 6}]
    peft = f"{{peft_type: {kind}, num_virtual_tokens: 3}}"
    if kind == "folder":
        peft = "saved"
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}')
    tenants = tenants_of(train_rows=rows(7) + longer, peft=peft, alice="train: {too_long: drop}")
    assert len(tenants["alice"].data) == 7
    message = r"train\.jsonl:8: input_ids is 6 tokens long, over the model's limit less 3 virtual tokens of 5 .* \(task 'alice'\)"
    with pytest.raises(ValueError, match=message):
        tenants_of(train_rows=rows(7) + longer, peft=peft, alice="train: {max_length: 7}")


def test_a_folder_with_a_run_in_it_is_not_written_over(tenants_of: Prepare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_output(out, resume=False)
    train(tenants_of(alice="train: {max_steps: 1}"), Fake(), out)
    with pytest.raises(ValueError, match="holds a run already: go on with it by --resume"):
        check_output(out, resume=False)
    check_output(out, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder that can be written to"):
        check_output(tmp_path / "file" / "out", resume=False)
