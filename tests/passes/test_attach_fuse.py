"""attach writes every task's adapter; fuse joins them: nodes do not grow with tasks, no neighbour changes a task's bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from codegen.ops import LINEARS, TILE_MM
from passes.adapters import KINDS, Adapter
from passes.fuse import fuse
from passes.graph import LINEAR, MuxGraph, Source, check, module_of
from runtime.tables import Table
from tests.backbones import (
    GEOMETRY,
    WIDTH,
    Plain,
    attached,
    chunk_of,
    feed,
    fused,
    llama,
    logits_of,
    lora,
    made,
    normal,
    resolved,
    state_of,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def graph(model: Any) -> MuxGraph:
    return normal(model)


def calls(graph: MuxGraph) -> list[fx.Node]:
    return [node for node in graph.gm.graph.nodes if node.op == "call_function"]


def products(graph: MuxGraph) -> int:
    return sum(node.target is TILE_MM for node in calls(graph))


def groups(graph: MuxGraph) -> dict[str, Any]:
    """The nodes of linears that share an input, by the module of the first."""
    return {module_of(node): node for node in calls(graph) if node.target is LINEARS}


# --- attach -------------------------------------------------------------------------------------------------------------


def test_attach_writes_two_products_a_site_and_task_and_leaves_the_backbone_alone(graph: MuxGraph, model: Any) -> None:
    adapters = resolved(model, {"alice": lora("q_proj", "v_proj"), "bob": lora("q_proj")})
    after = attached(graph, adapters)
    assert after.level == "attached"
    assert products(after) == 2 * 2 * (2 + 1)  # down and up, two layers, three sites
    old, new = (Counter(str(node.target) for node in calls(g)) for g in (graph, after))
    assert not old - new
    assert set(new - old) == {str(TILE_MM), "aten.reshape.default", "aten.add.Tensor"}


def test_attach_says_where_every_tensor_of_peft_lies(graph: MuxGraph, model: Any) -> None:
    adapters = resolved(model, {"alice": lora("q_proj", "down_proj", r=3)})
    after = attached(graph, adapters)
    expected = {key: shape for site in adapters[0].sites for key, shape in site.tensors().items()}
    state = state_of(after)
    assert {key: state.shape("alice", key) for task, key in after.params} == expected
    assert expected["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (3, 32)
    assert expected["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] == (32, 3)


def test_attached_adapters_compute_what_lora_says(graph: MuxGraph, model: Any) -> None:
    """y + scaling (x A^T) B^T at every site, for the rows of the task alone."""
    import peft

    config = lora("q_proj", "v_proj", "down_proj", r=3, lora_alpha=6)
    after = attached(graph, resolved(model, {"alice": config, "bob": lora("q_proj")}))
    state, chunk = state_of(after), chunk_of({"alice": [13, 7], "bob": [30]})
    found = logits_of(after, state, chunk)
    wrapped = peft.get_peft_model(llama(), config)
    weights = {key: state.read("alice", key) for task, key in after.params if task == "alice"}
    assert not peft.set_peft_model_state_dict(wrapped, weights).unexpected_keys
    ids = chunk.tensors["input_ids"]
    with torch.no_grad():
        for rows in (slice(0, 13), slice(13, 20)):
            torch.testing.assert_close(found[rows], wrapped.eval()(ids[:, rows]).logits[0], rtol=1e-5, atol=1e-5)


class Sites(Plain):
    """Four linears of one input, defined in another order than they run."""

    def make(self) -> None:
        for name in ("first", "second", "third", "fourth"):
            holder = nn.Module()
            holder.proj = nn.Linear(WIDTH, WIDTH)
            setattr(self, name, holder)

    def body(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fourth.proj(x)) * self.second.proj(x) + self.third.proj(x) * self.first.proj(x)


@pytest.fixture(scope="module")
def plain() -> Plain:
    return made(Sites)


@pytest.fixture(scope="module")
def plain_graph(plain: Plain) -> MuxGraph:
    return normal(plain)


def test_sites_may_be_attached_in_another_order_than_they_run(plain_graph: MuxGraph, plain: Plain) -> None:
    tasks = {"a": lora("first.proj"), "b": lora("fourth.proj", "third.proj"), "c": lora("second.proj")}
    check(fused(plain_graph, resolved(plain, tasks)))


def test_the_head_is_a_group_of_its_own_once_somebody_adapts_it(plain_graph: MuxGraph, plain: Plain) -> None:
    def heads(tasks: dict[str, Any]) -> list[Any]:
        return [node for node in calls(fused(plain_graph, resolved(plain, tasks))) if module_of(node) == "head"]

    assert [node.target for node in heads({"a": lora("first.proj")})] == [LINEAR]
    joint, *_ = heads({"a": lora("first.proj"), "b": lora("head")})
    assert joint.target is LINEARS
    assert joint.args[-1] == "y=epilogue dx=epilogue"


def test_a_site_that_the_forward_never_runs_is_refused() -> None:
    class Idle(Sites):
        def body(self, x: Tensor) -> Tensor:
            return self.first.proj(x)

    model = made(Idle)
    with pytest.raises(ValueError, match=r"^task 'a': target_modules selects 'second.proj', which the .*forward does not run"):
        attached(normal(model), resolved(model, {"a": lora("second.proj")}))


def test_a_module_that_runs_twice_is_adapted_twice_with_one_pair_of_tensors() -> None:
    class Twice(Sites):
        def body(self, x: Tensor) -> Tensor:
            return self.first.proj(torch.tanh(self.first.proj(x)))

    model = made(Twice)
    after = fused(normal(model), resolved(model, {"a": lora("first.proj")}))
    assert products(after) == 0
    first, second = (node for node in calls(after) if node.target is LINEARS and node.args[3])
    assert first.args[3:6] == second.args[3:6]  # A, B and scale
    assert len(after.params) == 2
    state, chunk = state_of(after), chunk_of({"a": [20]})
    found = logits_of(after, state, chunk)
    a, b = (state.read("a", f"base_model.model.first.proj.lora_{side}.weight") for side in "AB")
    scaling = 8 / 4  # PEFT's lora_alpha is 8
    with torch.no_grad():  # the weights merged, run as they are
        model.first.proj.weight += scaling * (b @ a)
        alone = model(chunk.tensors["input_ids"][:, :20], chunk.tensors["position_ids"][:, :20])[0]
    torch.testing.assert_close(found[:20], alone, rtol=1e-5, atol=1e-5)


# --- fuse ---------------------------------------------------------------------------------------------------------------


def test_nodes_do_not_grow_with_the_number_of_tasks(graph: MuxGraph, model: Any) -> None:
    def size(count: int) -> tuple[int, int]:
        tasks = {f"task {index}": lora("q_proj", "v_proj", r=1 + index % 8) for index in range(count)}
        after = fused(graph, resolved(model, tasks))
        return len(calls(after)), len(after.inputs)

    assert size(1) == size(2) == size(9)


def test_q_k_and_v_read_their_input_once_and_so_do_gate_and_up(graph: MuxGraph, model: Any) -> None:
    tasks = dict.fromkeys(("alice", "bob"), lora("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    after = fused(graph, resolved(model, tasks))
    assert products(after) == 0
    found = groups(after)
    assert len(found) == 2 * 4  # the input of q, k, v; of o; of gate, up; of down: in two layers
    assert [len(node.args[1]) for node in found.values()] == [3, 1, 2, 1] * 2  # frozen weights
    assert [len(node.args[3]) for node in found.values()] == [1] * 8  # tables of A: both tasks share one
    assert [len(node.args[4]) for node in found.values()] == [3, 1, 2, 1] * 2  # tables of B
    assert len({node.args[0] for node in found.values()}) == len(found)
    names = [table.name for table in after.tables.values() if table.name.endswith(".A") and "layers.0" in table.name]
    assert names == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj.r8.A",
        "model.layers.0.self_attn.o_proj.r8.A",
        "model.layers.0.mlp.gate_proj+up_proj.r8.A",
        "model.layers.0.mlp.down_proj.r8.A",
    ]


def test_adapter_nodes_belong_to_the_module_of_the_site_that_reads_them(graph: MuxGraph, model: Any) -> None:
    # Not to the module that made their input: a layer without a norm in front reads what the layer before it wrote.
    sites = {name for name in graph.sites() if name.endswith(("q_proj", "v_proj"))}
    for after in (attached, fused):
        nodes = calls(after(graph, resolved(model, {"alice": lora("q_proj", "v_proj")})))
        assert {module_of(node) for node in nodes if node.target is TILE_MM} <= sites


def test_a_lone_site_is_left_alone(graph: MuxGraph, model: Any) -> None:
    after = fused(graph, resolved(model, {"alice": lora("model.layers.1.mlp.up_proj")}))
    assert products(after) == 0
    found = groups(after)
    assert [name for name, node in found.items() if node.args[3]] == ["model.layers.1.mlp.gate_proj"]
    group = found["model.layers.1.mlp.gate_proj"]
    assert len(group.args[1]) == 2
    assert (len(group.args[4]), group.args[11]) == (1, [1])  # one table of B, for the second of the two linears


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "r": 8},
    {"target_modules": ["q_proj", "k_proj"], "r": 9, "use_rslora": True},
    {"target_modules": ["down_proj", "up_proj"], "r": 2, "lora_alpha": 1},
    {"target_modules": "all-linear", "r": 16},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.v_proj": 12}},
]


def adapters_of(model: Any, picks: list[int]) -> list[Adapter]:
    from peft import LoraConfig

    return resolved(model, {f"t{place}": LoraConfig(**{"r": 4} | CONFIGS[pick]) for place, pick in enumerate(picks)})


@settings(max_examples=12)
@given(picks=st.lists(st.integers(0, len(CONFIGS) - 1), min_size=1, max_size=4), reserve=st.integers(0, 2))
def test_fused_and_unfused_graphs_give_equal_results(picks: list[int], reserve: int) -> None:
    model = llama(1, seed=1)
    graph, adapters = _normal_once(model), adapters_of(model, picks)
    one, many = attached(graph, adapters), fused(graph, adapters, reserve=reserve)
    chunk = chunk_of({f"t{place}": [9, 3] for place in range(len(picks))})
    found = [logits_of(after, state_of(after), chunk) for after in (one, many)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found[1], logits_of(graph, None, chunk), atol=1e-2), "the adapters did nothing"


_kept: dict[str, MuxGraph] = {}


def _normal_once(model: Any) -> MuxGraph:
    if "graph" not in _kept:
        _kept["graph"] = normal(model)
    return _kept["graph"]


@settings(max_examples=10)
@given(own=st.integers(0, len(CONFIGS) - 1), others=st.lists(st.integers(0, len(CONFIGS) - 1), min_size=1, max_size=3))
def test_a_task_is_grouped_by_its_own_config_alone(own: int, others: list[int]) -> None:
    model = llama(1, seed=1)
    graph = _normal_once(model)
    alone, among = (fused(graph, adapters_of(model, picks)) for picks in ([own], [own, *others]))

    def layout(graph: MuxGraph) -> dict[str, tuple[Any, ...]]:
        # The same banks, rank buckets and offsets, whoever else is in the table.
        return {
            key: (param.table, graph.tables[param.table].shape[1:], param.start, param.stop, param.transposed)
            for (task, key), param in graph.params.items()
            if task == "t0"
        }

    assert layout(alone) == layout(among)
    # And so the same bits, in the rows of a chunk that both runs fill alike.
    chunk = chunk_of({"t0": [20, 9]})
    assert torch.equal(*(logits_of(after, state_of(after), chunk) for after in (alone, among)))


def test_tables_of_tasks_that_share_only_a_part_of_their_sites_are_told_apart(plain_graph: MuxGraph, plain: Plain) -> None:
    tasks = {"a": lora("first.proj", "second.proj"), "b": lora("first.proj", "third.proj"), "c": lora("second.proj", "third.proj")}
    after = fused(plain_graph, resolved(plain, tasks))
    state, chunk = state_of(after), chunk_of({name: [16] for name in tasks})
    expected = attached(plain_graph, resolved(plain, tasks))
    torch.testing.assert_close(logits_of(after, state, chunk), logits_of(expected, state_of(expected), chunk), rtol=1e-6, atol=1e-6)


def test_ranks_are_padded_to_the_tasks_own_bucket(graph: MuxGraph, model: Any) -> None:
    tasks = {"a": lora("q_proj", r=1), "b": lora("q_proj", r=8), "c": lora("q_proj", r=9), "d": lora("q_proj", r=33)}
    after = fused(graph, resolved(model, tasks))
    shapes = {table.name: table.shape for table in after.tables.values() if "layers.0" in table.name}
    site = "model.layers.0.self_attn.q_proj"
    assert shapes == {
        f"{site}.r8.A": (2, 8, 32), f"{site}.r8.B0": (2, 8, 32), f"{site}.r8.scale0": (2,),
        f"{site}.r16.A": (1, 16, 32), f"{site}.r16.B0": (1, 16, 32), f"{site}.r16.scale0": (1,),
        f"{site}.r64.A": (1, 64, 32), f"{site}.r64.B0": (1, 64, 32), f"{site}.r64.scale0": (1,),
    }  # fmt: skip


def test_reserved_slots_are_free_and_do_not_reach_the_result(graph: MuxGraph, model: Any) -> None:
    adapters = resolved(model, {"alice": lora("q_proj")})
    after = fused(graph, adapters, reserve=3)
    assert {table.rows for table in after.tables.values()} == {("alice", "", "", "")}
    assert all(value == 0.0 for table in after.tables.values() for value in table.values[1:])
    chunk = chunk_of({"alice": [20]})
    exact = fused(graph, adapters)
    assert torch.equal(logits_of(after, state_of(after), chunk), logits_of(exact, state_of(exact), chunk))


def rows_of(tables: dict[str, Table]) -> set[tuple[str, ...]]:
    return {table.rows for table in tables.values()}


def shapes_of(tables: dict[str, Table]) -> dict[str, tuple[int, ...]]:
    return {name: table.shape for name, table in tables.items()}


def without(tables: dict[str, Table], task: str) -> dict[str, Table]:
    """Tables as a task leaves them: its slots are free."""
    return {name: table.with_row(table.rows.index(task), "") if task in table.rows else table for name, table in tables.items()}


def test_a_previous_table_keeps_its_tasks_in_their_slots(graph: MuxGraph, model: Any) -> None:
    config = lora("q_proj")
    first = fused(graph, resolved(model, {"a": config, "b": config, "c": config}))
    assert rows_of(first.tables) == {("a", "b", "c")}
    # b leaves, d takes its slot; the shapes stay, so compiled regions serve again.
    second = fused(graph, resolved(model, {"a": config, "c": config, "d": config}), previous=without(first.tables, "b"))
    assert rows_of(second.tables) == {("a", "d", "c")}
    assert shapes_of(second.tables) == shapes_of(first.tables)
    assert all(second.params["d", key].row == 1 for task, key in second.params if task == "d")
    # Nobody new: the freed slot stays.
    third = fused(graph, resolved(model, {"a": config, "c": config}), previous=without(second.tables, "d"))
    assert rows_of(third.tables) == {("a", "", "c")}
    # More than fit: the table grows at its end.
    fourth = fused(graph, resolved(model, dict.fromkeys("xyac", config)), previous=third.tables)
    assert rows_of(fourth.tables) == {("a", "x", "c", "y")}
    # Not here, but not gone either: a task of another group, whose rows are in the same tables.
    part = fused(graph, resolved(model, {"c": config}), previous=fourth.tables)
    assert rows_of(part.tables) == rows_of(fourth.tables)


def test_a_task_that_moves_to_another_bank_leaves_its_old_slot_free(graph: MuxGraph, model: Any) -> None:
    config = lora("q_proj")
    first = fused(graph, resolved(model, {"a": config, "b": config}))
    second = fused(graph, resolved(model, {"a": lora("q_proj", r=16), "b": config}), previous=without(first.tables, "a"))
    assert {name.rsplit(".", 2)[-2]: table.rows for name, table in second.tables.items()} == {"r8": ("", "b"), "r16": ("a",)}


def test_scalings_are_peft_s(graph: MuxGraph, model: Any) -> None:
    site = "model.layers.0.self_attn.q_proj"
    tasks = {
        "plain": lora("q_proj", r=4, lora_alpha=2),
        "rooted": lora("q_proj", r=4, lora_alpha=2, use_rslora=True),
        "patterned": lora("q_proj", r=4, lora_alpha=2, alpha_pattern={"layers.0.self_attn.q_proj": 40}),
    }
    after = fused(graph, resolved(model, tasks))
    assert after.tables[f"{site}.r8.scale0"].values == (0.5, 1.0, 10.0)


def test_every_route_that_is_read_names_the_tasks_of_its_tables(graph: MuxGraph, model: Any) -> None:
    after = fused(graph, resolved(model, {"a b": lora("q_proj"), "c+d": lora("q_proj"), "e": lora("v_proj")}))
    routes = {source.key for source in after.inputs if source.kind == "route"}
    assert routes == {"a%20b+c%2Bd", "e"}
    assert {table.route: table.rows for table in after.tables.values()} == {"a%20b+c%2Bd": ("a b", "c+d"), "e": ("e",)}


def test_a_chunk_without_any_block_of_a_task_gets_the_backbones_own_logits(graph: MuxGraph, model: Any) -> None:
    after = fused(graph, resolved(model, {"alice": lora("q_proj", "down_proj")}))
    chunk = chunk_of({"stranger": [20, 9]})
    assert torch.equal(logits_of(after, state_of(after), chunk), logits_of(graph, None, chunk))


def test_a_poisoned_adapter_does_not_reach_another_tasks_rows(graph: MuxGraph, model: Any) -> None:
    after = fused(graph, resolved(model, {"alice": lora("q_proj"), "mallory": lora("q_proj")}))
    chunk = chunk_of({"alice": [20], "mallory": [20]})
    state = state_of(after)
    clean = logits_of(after, state, chunk)
    for task, key in after.params:
        if task == "mallory":
            state.write(task, key, torch.full(state.shape(task, key), float("nan")))
    found = logits_of(after, state, chunk)
    assert torch.equal(found[:20], clean[:20])
    assert found[32:52].isnan().any()


def test_who_adapts_a_linear_does_not_change_how_linears_are_grouped(graph: MuxGraph, model: Any) -> None:
    after = fused(graph, resolved(model, {"alice": lora("q_proj", "v_proj"), "bob": lora("v_proj")}))
    alone = fused(graph, resolved(model, {"bob": lora("v_proj")}))
    assert after.level == "fused"
    assert [module_of(node) for node in calls(after) if node.target is LINEAR] == ["lm_head"]
    assert [(name, len(node.args[1])) for name, node in groups(after).items()] == [
        (name, len(node.args[1])) for name, node in groups(alone).items()
    ]


def test_a_task_whose_ranks_differ_at_one_input_is_in_one_bank(graph: MuxGraph, model: Any) -> None:
    config = lora("q_proj", "k_proj", "v_proj", r=4, rank_pattern={"v_proj": 20})
    after = fused(graph, resolved(model, {"alice": config}))
    bank = groups(after)["model.layers.0.self_attn.q_proj"]
    assert len(bank.args[3]) == 1
    names = [table.name for table in after.tables.values() if table.name.endswith(".A") and "layers.0" in table.name]
    assert names == ["model.layers.0.self_attn.q_proj+k_proj+v_proj.r32.A"]


def test_dropout_is_a_property_of_the_tasks_own_bank(graph: MuxGraph, model: Any) -> None:
    tasks = {"alice": lora("q_proj"), "bob": lora("q_proj", lora_dropout=0.25), "carol": lora("q_proj", lora_dropout=0.5)}
    after = fused(graph, resolved(model, tasks))
    group = groups(after)["model.layers.0.self_attn.q_proj"]
    assert group.args[12] == [0, 1]
    assert [len(group.args[index]) for index in (3, 7, 8)] == [2, 1, 1]  # tables of A, dropout keys, places
    assert Source("chunk", "sequences") in after.inputs
    plain = fused(graph, resolved(model, {"alice": lora("q_proj")}))
    assert Source("chunk", "sequences") not in plain.inputs


def test_fusing_a_graph_that_no_task_adapts_groups_its_linears_alone(graph: MuxGraph) -> None:
    after = fuse(graph.copy(), reserve=2)
    assert [len(node.args[1]) for node in groups(after).values()] == [3, 1, 2, 1] * 2
    assert after.tables == {}


def test_the_order_of_the_tasks_does_not_change_a_tasks_bits(graph: MuxGraph, model: Any) -> None:
    tasks = {"a": lora("q_proj", "v_proj"), "b": lora("q_proj", "v_proj"), "c": lora("q_proj")}
    chunk = chunk_of({"b": [20, 9]})
    orders = (list(tasks), list(tasks)[::-1])
    found = [
        logits_of(after, state_of(after), chunk)
        for after in (fused(graph, resolved(model, {n: tasks[n] for n in order})) for order in orders)
    ]
    assert torch.equal(*found)


def test_the_routes_of_a_chunk_send_each_block_to_its_tasks_slot(graph: MuxGraph, model: Any) -> None:
    after = fused(graph, resolved(model, {"a": lora("q_proj"), "b": lora("q_proj")}))
    chunk = chunk_of({"b": [17], "a": [5]})
    (source,) = (source for source in after.inputs if source.kind == "route")
    assert isinstance(source, Source)
    assert feed(str(source), after.weights, state_of(after), chunk).tolist() == [1, 1, 0, -1]
    assert after.blocks == GEOMETRY.tokens // GEOMETRY.tile == 4


def test_every_kind_has_its_row() -> None:
    assert all(name == kind.peft_type for name, kind in KINDS.items())
