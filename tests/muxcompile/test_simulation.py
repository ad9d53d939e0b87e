"""Simulations: what they print, that mechanisms gain where they must, and what is refused. No figure here is a measurement."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig

from codegen.links import FABRICS
from codegen.machine import machine
from muxcompile import shapes
from muxcompile.cli import app, run_command
from muxcompile.options import Options
from muxcompile.setting import Setting, fake, of_shape, sharded
from muxcompile.simulation import FUSED, PADDED, SEQUENTIAL, SERIAL, Simulation, simulate
from passes import interleave
from passes.cost import CostModel
from passes.interleave import Choice, Interleaving, Unfit, dealt
from passes.loads import Shape
from passes.parallel import FILLED
from passes.replay import Part, play, predicted
from passes.stages import beside, staged
from passes.task import Task
from runtime.comm import Mesh
from runtime.program import Kind, Program
from runtime.trace import Run, chrome
from tests.golden import check_golden

LENGTHS = Path(__file__).resolve().parents[2] / "benchmarks" / "lengths"
ROUNDS = 4


def config(layers: int = 8) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )


def setting(count: int = 4, *, layers: int = 8, alike: bool = True, **options: Any) -> Setting:
    tasks = [
        Task(f"t{i}", LoraConfig(r=8, target_modules="all-linear"), batch_size=4, lengths=shapes.PROFILES["rte"].lengths())
        for i in range(count)
    ]
    return Setting("tiny", config(layers), tasks, Options(**options), alike)


@functools.cache
def played(mesh: str, count: int = 4, device: str = "A40") -> Simulation:
    return simulate(setting(count), Mesh.parse(mesh), device, ROUNDS)


def run(*arguments: str | Path) -> int:
    return run_command(app, "muxcompile", [str(argument) for argument in arguments])


# --- what is printed --------------------------------------------------------------------------------------------------


def test_a_small_case_reads_as_accepted() -> None:
    check_golden("simulate.tiny", played("pp=2,tp=2").text())


def test_the_same_setting_is_played_the_same_way() -> None:
    again = simulate(setting(), Mesh.parse("pp=2,tp=2"), "A40", ROUNDS)
    assert again.to_json() == played("pp=2,tp=2").to_json()


def test_the_trace_has_the_lanes_of_every_stage() -> None:
    events = chrome({"predicted": played("pp=4").ours.timeline.spans})["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2, 3}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


# --- what mechanisms gain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["pp=2", "pp=4", "tp=2", "dp=2,pp=2", "pp=2,tp=2"])
def test_no_mechanism_loses(mesh: str) -> None:
    found = played(mesh)
    assert set(found.gains) == {SEQUENTIAL, FUSED, SERIAL, PADDED}
    assert min(found.gains.values()) >= 1.0
    assert found.effective <= found.computed, "rows of chunks hold the tokens"


def test_other_tasks_fill_a_pipeline() -> None:
    found = played("pp=4")
    assert found.gains[SEQUENTIAL] > 1.2
    assert len(found.ours.choice.groups) > 1
    alone = found.others[SEQUENTIAL]
    assert alone is not None
    assert found.bubble < sum(alone.bubble(rank) for rank in range(4)) / 4


def test_nothing_beats_the_busiest_stage() -> None:
    found = played("pp=4")
    work: dict[int, float] = {}
    for action, start, end, _ in found.ours.timeline.spans:
        if action.stream == "compute":
            work[action.rank] = work.get(action.rank, 0.0) + end - start
    assert found.ours.seconds >= max(work.values())
    for stage, busy in work.items():
        assert found.ours.bubble(stage) == pytest.approx(1 - busy / found.ours.seconds)


# --- what the figures are made of -------------------------------------------------------------------------------------


def test_three_layers_stand_for_all_that_are_alike() -> None:
    short, whole = (simulate(setting(alike=alike), Mesh.parse("pp=2"), "H100", 1) for alike in (True, False))
    assert short.step == pytest.approx(whole.step, rel=1e-9)
    assert short.costs.stops == whole.costs.stops
    assert short.ours.peak == pytest.approx(whole.ours.peak, rel=1e-6)


@pytest.mark.parametrize("mesh", ["pp=2", "pp=2,tp=2"])
def test_a_run_of_the_planned_program_is_predicted_to_take_what_was_planned(mesh: str) -> None:
    costs, rounds = played(mesh).costs, {f"t{i}": [[100 + 20 * i, 64, 30]] * 3 for i in range(4)}
    own = Interleaving(costs, rounds, [256, 512], 1 << 40)
    best = own.best([(("t0", "t1"), ("t2", "t3"))], hidden=False)
    steps = own.steps(best.choice, best.flight)
    program = staged(steps, flight=best.flight, stepping=own.stepping(steps))
    runs = [run_of(own, best, program)]
    seconds = predicted(runs, costs, costs.cost.survey.extras(list(rounds)))
    (timeline,) = play(runs, seconds, lambda rows: costs.transfer(Shape(rows)))
    assert timeline.seconds == pytest.approx(best.seconds, rel=1e-12)


def test_a_run_of_lanes_is_predicted_to_take_what_was_planned() -> None:
    costs, rounds = played("tp=2").costs, {f"t{i}": [[100 + 20 * i, 64, 30]] * 3 for i in range(4)}
    own = Interleaving(costs, rounds, [256, 512], 1 << 40)
    best = own.best([(("t0", "t1"), ("t2", "t3"))])
    assert best.flight == (2,)
    lanes = {span.action.stream for span in best.timeline.spans}
    assert lanes == {"lane0", "lane1", "steps"}
    steps = own.steps(best.choice, best.flight)
    runs = [run_of(own, best, beside(steps, lanes=2, stepping=own.stepping(steps)))]
    seconds = predicted(runs, costs, costs.cost.survey.extras(list(rounds)))
    (timeline,) = play(runs, seconds, lambda rows: costs.transfer(Shape(rows)))
    assert timeline.seconds == pytest.approx(best.seconds, rel=1e-12)


def test_a_part_of_a_run_is_predicted_to_take_what_its_chunks_do_on_average() -> None:
    costs = played("pp=2", device="H100").costs
    free, rounds = replace(costs, cost=_unhosted(costs.cost)), {"t0": [[500], [250, 250], [100]], "t1": [[500], [30], [200, 100]]}
    own = Interleaving(free, rounds, [1024], 1 << 40)
    best = own.best([(("t0", "t1"),)])
    program = staged(own.steps(best.choice, best.flight), flight=best.flight)
    run, extras = run_of(own, best, program), free.cost.survey.extras(["t0", "t1"])
    assert len(set(run.filled)) == len(run.filled) == 3
    wanted = free.micro(["t0", "t1"], extras, Shape(1024), rows=sum(run.filled) / 3)
    found = predicted([run], free, extras)
    for stage in (0, 1):
        for kind, seconds in ((Kind.F, wanted.forward), (Kind.B, wanted.backward)):
            assert found[Part(kind, stage, ("t0", "t1"), 1024)] == pytest.approx(seconds[stage], rel=1e-9)


def run_of(own: Interleaving, found: interleave.Run, program: Program) -> Run:
    """What ran as it was planned."""
    groups, shapes = found.choice.groups, found.choice.shapes
    chunks = [
        (shape.tokens, each.rows)
        for index in range(len(next(iter(own.rounds.values()))))
        for tasks, shape in zip(groups, shapes, strict=True)
        for each in own.chunks(tasks, shape.tokens, index)
    ]
    rows, filled = zip(*chunks, strict=True)
    return Run(program, rows, filled)


def test_rows_of_padding_spare_a_micro_batch_what_fused_products_take_for_them() -> None:
    costs = played("pp=2", device="H100").costs
    free, extras, shape = replace(costs, cost=_unhosted(costs.cost)), costs.cost.survey.extras(["t0"]), Shape(1024)
    full, same, half, none = (free.micro(["t0"], extras, shape, rows=rows) for rows in (None, 1024, 512, 0))
    assert full == same
    for stage, ways in enumerate(free.seconds(extras, shape)):
        for way, one, two, three in zip(
            ways, *((own.forward[stage], own.backward[stage]) for own in (full, half, none)), strict=True
        ):
            assert one == way.busy + way.sums
            assert one - two == pytest.approx(two - three) == pytest.approx(512 * way.spared)
            assert 0.1 * way.busy < 1024 * way.spared < 0.8 * way.busy
    price, parts = free.cost.chunk(extras, shape), free.cost.survey.parts[False]
    phases = [free.cost.phase(index, way, extras, shape).spared for index in range(len(parts)) for way in ("forward", "backward")]
    assert price.spared == pytest.approx(sum(own * len(parts[place // 2].regions) for place, own in enumerate(phases)))
    assert price.empty(1024) == pytest.approx(price.cost - 1024 * price.spared)
    slow = replace(costs, cost=replace(costs.cost, machine=replace(costs.cost.machine, record=1.0)))
    assert slow.micro(["t0"], extras, shape, rows=128) == slow.micro(["t0"], extras, shape), "the host takes as long"


def _unhosted(cost: CostModel) -> CostModel:
    """The same prices where the host takes no time."""
    return replace(cost, machine=replace(cost.machine, view=0.0, call=0.0, custom=0.0, kernel=0.0, record=0.0))


def test_in_lanes_sums_and_a_part_of_launches_take_none_of_the_devices_time() -> None:
    simulation = played("tp=2")
    costs = simulation.costs
    lanes = Interleaving(costs, {"t0": [[100]], "t1": [[100]]}, [256], 1 << 40).best([(("t0",), ("t1",))])
    assert "the other lane's micro-batch hides 95% of each, and 50% of what launches take" in replace(simulation, ours=lanes).text()
    extras, shape = costs.cost.survey.extras(["t0"]), Shape(1024)
    free = replace(costs, cost=_unhosted(costs.cost))
    ((forward, backward),) = free.seconds(extras, shape)
    one, two = (free.micro(["t0"], extras, shape, lanes=lanes) for lanes in (1, 2))
    assert one.forward == (forward.busy + forward.sums,)
    for index, (found, way) in enumerate(((two.forward, forward), (two.backward, backward))):
        phases = [free._phase(own, ("forward", "backward")[index], extras, shape) for own in free.stages[0]]
        head = costs.cost.head(extras).launches * costs.cost.blocks(shape.tokens) * index
        launches = sum(own.launches for own in phases) + head
        assert 0 < launches < way.busy
        assert way.filled == pytest.approx(way.busy - FILLED * launches, rel=1e-12)
        assert found[0] == pytest.approx(way.filled + (1 - costs.fabric.hidden) * way.sums, rel=1e-12)
    # What waits for the host does so beside others as well.
    slow = replace(costs, cost=replace(costs.cost, machine=replace(costs.cost.machine, record=1.0)))
    ((forward, _),) = slow.seconds(extras, shape)
    assert forward.filled == forward.busy


def test_shards_run_one_micro_batch_at_a_time_where_memory_or_the_groups_allow_no_more() -> None:
    costs, rounds = played("tp=2").costs, {f"t{i}": [[100, 64, 30]] * 3 for i in range(4)}
    two = (("t0", "t1"), ("t2", "t3"))
    whole = Interleaving(costs, rounds, [256], 1 << 40)
    assert whole.best([(tuple(rounds),)]).flight == (1,)
    assert whole.best([two], hidden=False).flight == (1,)
    peak = whole.best([two]).peak[0]
    (room,) = costs.rooms(costs.cost.survey.extras(list(rounds)), Shape(256))
    assert Interleaving(costs, rounds, [256], peak - 1).best([two]).flight == (1,)
    with pytest.raises(Unfit, match="memory"):
        Interleaving(costs, rounds, [256], room.least - 1, (False,)).best([two])


@pytest.mark.parametrize("mesh", ["pp=2", "pp=4", "tp=2", "pp=2,tp=2"])
@given(data=st.data())
def test_no_candidate_is_faster_than_its_bound(mesh: str, data: st.DataObject) -> None:
    """A search leaves out what cannot be faster than what it played: the bound must hold, and is near for few groups."""
    costs = played(mesh).costs
    count = data.draw(st.integers(1, 4))
    lengths = st.lists(st.lists(st.integers(1, 250), max_size=6), min_size=count, max_size=count)
    rounds = {f"t{index}": data.draw(lengths) for index in range(4)}
    own = Interleaving(costs, rounds, [256, 512], 1 << 40)
    names = data.draw(st.permutations(list(rounds)))
    cut = data.draw(st.integers(1, 4))
    groups = tuple(group for group in (tuple(names[:cut]), tuple(names[cut:])) if group)
    like = Choice((), (), drain=data.draw(st.booleans()), hidden=data.draw(st.booleans()))
    assume(all(any(rounds[task][index] for task in group) for index in range(count) for group in groups))
    for choice, flight in own._candidates([groups], [0, 1], like):
        assert own._bound(choice, flight) <= own._makespan(choice, flight) * (1 + 1e-9)


def test_a_group_alone_is_bound_by_its_own_steps() -> None:
    costs, rounds = played("pp=4").costs, {"t0": [[200, 30]] * 8}
    own = Interleaving(costs, rounds, [256], 1 << 40)
    ((choice, flight),) = own._candidates([(("t0",),)], [0], Choice((), ()))
    assert own._bound(choice, flight) > 0.9 * own._makespan(choice, flight)


# Shards of this model take as long for their sums, whatever a chunk's size, as for 1024 rows.
@pytest.mark.parametrize(("mesh", "times"), [("pp=2", 1), ("tp=2", 8)])
def test_each_group_has_chunks_of_its_own_size(mesh: str, times: int) -> None:
    """One of the groups has a third of the other's rows: in chunks of one size it would be computed three times as wide."""
    costs, rounds = played(mesh).costs, {"t0": [[200 * times] * 2] * 6, "t1": [[40 * times] * 3] * 6}
    own = Interleaving(costs, rounds, [128 * times, 256 * times, 512 * times], 1 << 40)
    even = own.best([(("t0",), ("t1",))])
    best = own.fitted(even.choice)
    assert best.choice.shapes == (Shape(512 * times), Shape(128 * times))
    assert best.seconds < even.seconds
    assert best.rows < even.rows


def test_one_stage_takes_what_the_cost_model_says() -> None:
    costs = played("tp=1").costs
    # A stage waits for the host in each way apart, a chunk on one GPU in both together: here neither does.
    free = _unhosted(costs.cost)
    extras, shape = costs.cost.survey.extras(["t0"]), Shape(1024)
    forward, backward = replace(costs, cost=free).seconds(extras, shape)[0]
    whole = replace(free, survey=simulate(setting(alike=False), Mesh(), "A40", 1).costs.cost.survey)
    assert forward.busy + backward.busy == pytest.approx(whole.seconds(extras, shape)[0], rel=1e-6)


def test_stages_hold_the_weights_of_the_model_once() -> None:
    model = fake(config())
    tensors = [*model.parameters(), model.model.rotary_emb.inv_freq]
    nbytes = sum(own.numel() * own.element_size() for own in tensors)
    for mesh in ("tp=1", "pp=2", "pp=4"):
        costs = played(mesh).costs
        rooms = costs.rooms(costs.cost.survey.extras(["t0"]), Shape(512))
        assert sum(room.weights for room in rooms) == nbytes


def test_shards_have_their_part_of_products_and_all_of_the_norms() -> None:
    whole, part = ({name: own.numel() for name, own in fake(sharded(config(), tp)).named_parameters()} for tp in (1, 2))
    for name, size in whole.items():
        assert part[name] == (size if "norm" in name else size // 2), name


def test_links_take_the_measured_time_where_they_were_measured() -> None:
    link = FABRICS["H200"].among([0, 1])
    assert link.transfer(8192 * 4096 * 2) == pytest.approx(214e-6, rel=0.02)
    # One straight line for four sizes, of which that of 896 rows lies below it.
    for tokens, seconds, off in ((512, 54e-6, 0.03), (896, 55e-6, 0.15), (4224, 126e-6, 0.03), (4608, 139e-6, 0.03)):
        assert link.all_reduce(tokens * 4096 * 2, 2) == pytest.approx(seconds, rel=off)
    assert link.all_reduce(1e9, 1) == 0.0


def test_neighbours_are_joined_by_the_nearest_link() -> None:
    fabric = FABRICS["A40"]
    assert [fabric.among(ranks).name for ranks in ([0, 1], [1, 2], [3, 4])] == ["NVLink bridge", "PCIe 4.0 x16", "InfiniBand HDR"]
    assert FABRICS["H100"].among(range(8)).name == "NVLink 4"
    assert FABRICS["H100"].among([7, 8]).name == "InfiniBand NDR"


def test_devices_that_were_never_measured_have_their_own_memory_and_say_so() -> None:
    own, known = machine("NVIDIA A40"), machine("NVIDIA H200")
    assert own.memory == 44 << 30
    assert own.rate(1e9) / known.rate(1e9) == pytest.approx(149.7 / 989)
    assert "A40's published peaks" in own.note


@pytest.mark.parametrize("name", shapes.PROFILES)
def test_lengths_are_those_of_the_benchmarks(name: str) -> None:
    assert shapes.PROFILES[name].lengths() == json.loads((LENGTHS / f"{name}.json").read_text())["lengths"]


def test_tasks_are_dealt_out_by_their_rows() -> None:
    assert dealt({"a": 5, "b": 3, "c": 3, "d": 1}, 2) == (("a", "d"), ("b", "c"))
    assert dealt({"a": 5, "b": 3}, 1) == (("a", "b"),)


# --- options and refusals ---------------------------------------------------------------------------------------------


def test_asked_groups_and_sizes_are_kept() -> None:
    found = simulate(setting(groups=(("t1", "t3"),), chunk_tokens=640), Mesh.parse("pp=2"), "A40", 1)
    assert found.ours.choice.groups == (("t1", "t3"), ("t0", "t2"))
    assert {shape.tokens for shape in found.ours.choice.shapes} == {640}


def test_too_little_memory_is_refused_by_the_stage_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"^memory: a rank of stage \d \(.*\) needs [\d,]+ bytes .* NVIDIA A40 has 1,000,000:"):
        simulate(setting(memory_cap=1_000_000), Mesh.parse("pp=2"), "A40", 1)


def test_what_alone_does_not_fit_is_no_gain_and_is_named() -> None:
    found = played("pp=2")
    lost = replace(found, others={**found.others, FUSED: None})
    assert set(lost.gains) == {SEQUENTIAL, SERIAL, PADDED}
    assert f"no memory  {FUSED}" in lost.text()
    assert lost.to_json()["times_as_long"][FUSED] is None


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [("tp=3", "tp=3: num_attention_heads=4 of llama cannot be divided"), ("pp=11", "pp=11 stages, the model has 10 regions")],
)
def test_a_mesh_that_does_not_suit_the_model_is_refused(mesh: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        simulate(setting(), Mesh.parse(mesh), "A40", 1)


def test_a_model_without_a_plan_is_not_sharded() -> None:
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="tp=2: gpt2 has no plan"):
        sharded(GPT2Config(n_layer=2, n_embd=32, n_head=2), 2)


def test_a_sequence_longer_than_any_chunk_is_refused_by_task() -> None:
    tasks = [Task("long", LoraConfig(r=8, target_modules="all-linear"), batch_size=1, lengths=[20000])]
    with pytest.raises(ValueError, match="task 'long': a sequence of 20000 tokens is longer than a chunk of 16384"):
        simulate(Setting("tiny", config(), tasks, alike=True), Mesh(), "A40", 1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "llama-7b", "--mesh", "pp=2", "--gpus", "4"], "mesh dp=1,pp=2,tp=1 takes 2 GPUs, --gpus says 4"),
        (["--shape", "llama-7b", "--mesh", "pp=x"], "'pp=x' is not dp=N, pp=N or tp=N"),
        (["--shape", "llama-8b", "--mesh", "pp=2"], "shape 'llama-8b' must be one of llama-7b, llama-13b, llama-30b"),
        (["--shape", "llama-7b", "--mesh", "pp=2", "--device", "TPU"], "device 'TPU' must be one of A40, H100, H200"),
        (["--shape", "llama-7b", "--mesh", "pp=2", "--tasks", "0"], "tasks=0 must be at least 1"),
        (["--shape", "llama-7b", "--mesh", "pp=2", "--load", "mid"], "load 'mid' must be one of light, heavy"),
        (["--shape", "llama-7b", "--mesh", "pp=2", "--mix", "odd"], "mix 'odd' must be one of uniform, non-uniform"),
        (["--shape", "llama-7b", "--mesh", "pp=2", "--rounds", "0"], "rounds=0 must be at least 1"),
        (["--mesh", "pp=2"], "give a jobs file or --shape, one of the two"),
        (["jobs.yaml", "--mesh", "pp=2", "--load", "light"], "--load goes with --shape, a jobs file has its own tasks"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulate", *arguments) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


JOBS = """\
base: base
tasks:
  alice:
    peft: {r: 2, target_modules: [q_proj, v_proj]}
    data: alice.jsonl
    train: {batch_size: 2, max_steps: 3}
  bob:
    peft: {r: 3, lora_alpha: 6, target_modules: all-linear}
    data: bob.jsonl
    train: {batch_size: 3, max_steps: 3}
"""


@pytest.fixture
def jobs_file(tmp_path: Path, base_folder: Path, write_jsonl: Callable[[str, list[Any]], Path]) -> Path:
    for name in ("alice", "bob"):
        write_jsonl(f"{name}.jsonl", [{"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(8)])
    for weights in base_folder.glob("*.safetensors"):
        weights.unlink()  # none are read
    (tmp_path / "jobs.yaml").write_text(JOBS)
    return tmp_path / "jobs.yaml"


def test_a_jobs_file_is_played_without_its_weights(jobs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(tmp_path.rglob("*"))
    trace = tmp_path / "trace.json"
    assert run("simulate", jobs_file, "--mesh", "pp=2,tp=2", "--gpus", "4", "--rounds", "2", "--json", "--trace", trace) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] is True
    assert sorted(task for group in found["groups"] for task in group["tasks"]) == ["alice", "bob"]
    assert {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]} == {0, 1}
    assert set(tmp_path.rglob("*")) - before == {trace}


@pytest.mark.parametrize(
    ("trace", "why"), [("nowhere/x.json", r"'.*nowhere' is not a folder that can be written to"), ("", "is a folder; name a file")]
)
def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_played(
    tmp_path: Path, trace: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("muxcompile.simulation.simulate", None)
    assert run("simulate", "--shape", "llama-7b", "--mesh", "pp=2", "--trace", tmp_path / trace) == 2
    assert re.fullmatch(rf"muxcompile: simulate: --trace '.*'(:)? {why}\n", capsys.readouterr().err)


def test_options_that_are_not_played_are_refused_by_name(jobs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs_file.write_text(f"options: {{fairness: proportional}}\n{JOBS}")
    assert run("simulate", jobs_file, "--mesh", "pp=2") == 2
    assert "options.fairness='proportional' is not simulated" in capsys.readouterr().err


def test_built_in_settings_have_the_asked_tasks() -> None:
    found = of_shape("llama-13b", tasks=5, load="light", mix="uniform")
    assert (found.config.num_hidden_layers, len(found.tasks), found.tasks[0].batch_size) == (40, 5, 4)
