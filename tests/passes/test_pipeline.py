"""The runner keeps every intermediate graph and checks each; the checker bites on a broken one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from passes.graph import LEVELS, MuxGraph, Source, add_input, check
from passes.pipeline import OPTIONAL, passes, run_passes
from runtime.tables import Encoding, Input, Place
from tests.backbones import captured, chunk_of, fused, llama, logits_of, lora, normal, resolved, state_of

aten = torch.ops.aten


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(1)


@pytest.fixture(scope="module")
def graph(model: Any) -> MuxGraph:
    return captured(model)


def rows(model: Any, **tasks: Any) -> list[Any]:
    return passes(adapters=resolved(model, tasks or {"alice": lora("q_proj"), "bob": lora("q_proj")}), reserve=0, previous={})


# --- the runner -------------------------------------------------------------------------------------------------------


def test_every_pass_is_kept_with_its_graph_before_and_after(graph: MuxGraph, model: Any) -> None:
    final, trail = run_passes(graph, rows(model))
    assert [snapshot.name for snapshot in trail] == ["normalise", "attach", "fuse", "lower"]
    assert trail[0].before is graph
    assert trail[-1].after is final
    assert all(earlier.after is later.before for earlier, later in pairwise(trail))
    assert [snapshot.after.level for snapshot in trail] == [*LEVELS[1:], LEVELS[-1]]
    assert all(snapshot.seconds > 0 for snapshot in trail)


def test_a_pass_does_not_change_the_graph_it_was_given(graph: MuxGraph, model: Any) -> None:
    text = graph.text()
    _, trail = run_passes(graph, rows(model))
    assert graph.text() == text
    # Each kept graph still runs, and says what it said when it was made.
    chunk = chunk_of({"alice": [20]})
    bare = logits_of(graph, None, chunk)
    for snapshot in trail:
        assert snapshot.after.text().startswith(f"# level: {snapshot.after.level}, tokens: 64\n")
        if not snapshot.after.tables:
            assert torch.equal(logits_of(snapshot.after, None, chunk), bare)


def test_a_kept_graph_can_be_passed_on_again_from_the_middle(graph: MuxGraph, model: Any) -> None:
    final, trail = run_passes(graph, rows(model))
    again, _ = run_passes(trail[1].after, rows(model)[2:])
    assert again.text() == final.text()


def test_a_snapshot_says_which_operators_became_more_or_fewer(graph: MuxGraph, model: Any) -> None:
    _, trail = run_passes(graph, rows(model))
    assert trail[1].difference().splitlines() == [
        "aten.add.Tensor: 7 -> 9 (+2)",
        "aten.reshape.default: 1 -> 5 (+4)",
        "mux.tile_mm.default: 0 -> 4 (+4)",
    ]
    assert trail[2].difference().splitlines() == [
        "<built-in function getitem>: 1 -> 8 (+7)",
        "aten.add.Tensor: 9 -> 7 (-2)",
        "aten.linear.default: 8 -> 1 (-7)",
        "aten.reshape.default: 5 -> 1 (-4)",
        "mux.linears.default: 0 -> 4 (+4)",
        "mux.tile_mm.default: 4 -> 0 (-4)",
    ]


def test_an_optional_pass_is_left_out_by_name_and_the_result_is_the_same(graph: MuxGraph, model: Any) -> None:
    with_it, _ = run_passes(graph, rows(model))
    without, trail = run_passes(graph, rows(model), skip=["fuse"])
    assert [snapshot.name for snapshot in trail] == ["normalise", "attach", "lower"]
    assert without.level == "attached"
    chunk = chunk_of({"alice": [20], "bob": [9]})
    torch.testing.assert_close(
        logits_of(with_it, state_of(with_it), chunk), logits_of(without, state_of(without), chunk), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["fusion", "", "normalise", "attach"])
def test_a_pass_that_does_not_exist_or_must_run_cannot_be_left_out(graph: MuxGraph, model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^Options: skip_passes names '{name}'.*fuse.*all: normalise, attach, fuse, lower"):
        run_passes(graph, rows(model), skip=[name])


def test_every_optional_pass_exists(model: Any) -> None:
    assert set(OPTIONAL) <= {name for name, _ in rows(model)}


def test_the_runner_checks_what_a_pass_returns(graph: MuxGraph) -> None:
    def forgetful(graph: MuxGraph) -> MuxGraph:
        del graph.inputs[Source("chunk", "position_ids")]
        return graph

    with pytest.raises(AssertionError, match="placeholders"):
        run_passes(graph, [("forgetful", forgetful)])


# --- the checker ------------------------------------------------------------------------------------------------------


def first(graph: MuxGraph, target: Any) -> Any:
    return next(node for node in graph.gm.graph.nodes if node.target is target)


def drop_an_input(graph: MuxGraph) -> MuxGraph:
    del graph.inputs[Source("chunk", "bounds")]
    return graph


def reorder_the_inputs(graph: MuxGraph) -> MuxGraph:
    return replace(graph, inputs=dict(reversed(graph.inputs.items())))


def add_a_placeholder(graph: MuxGraph) -> MuxGraph:
    with graph.gm.graph.inserting_before(next(iter(graph.gm.graph.nodes))):
        graph.gm.graph.placeholder("stranger").meta["val"] = torch.zeros(())
    return graph


def forget_a_value(graph: MuxGraph) -> MuxGraph:
    del first(graph, torch.ops.mux.linears.default).meta["val"]
    return graph


def read_an_unknown_table(graph: MuxGraph) -> MuxGraph:
    add_input(graph, Source("table", "nobody.r8.A"), torch.zeros(1))
    return graph


def read_an_unknown_weight(graph: MuxGraph) -> MuxGraph:
    add_input(graph, Source("weight", "model.layers.99.weight"), torch.zeros(1))
    return graph


def leave_an_addmm(graph: MuxGraph) -> MuxGraph:
    weight = graph.inputs[Source("weight", "model.layers.0.mlp.down_proj.weight")]
    node = first(graph, aten.linear.default)
    with graph.gm.graph.inserting_before(node):
        addmm = graph.gm.graph.call_function(aten.addmm.default, (node.args[0], node.args[0], weight))
    addmm.meta["val"] = node.meta["val"]
    return graph


def leave_a_dropout(graph: MuxGraph) -> MuxGraph:
    node = first(graph, aten.linear.default)
    with graph.gm.graph.inserting_after(node):
        dropout = graph.gm.graph.call_function(aten.dropout.default, (node, 0.1, False))
    dropout.meta["val"] = node.meta["val"]
    return graph


def move_a_parameter(graph: MuxGraph) -> MuxGraph:
    key, param = next(iter(graph.params.items()))
    graph.params[key] = replace(param, row=1 - param.row)
    return graph


def lose_a_table(graph: MuxGraph) -> MuxGraph:
    name = next(iter(graph.tables))
    del graph.tables[name]
    return graph


def encoding(graph: MuxGraph, **changed: Any) -> MuxGraph:
    """Alice's B, filled by an encoding; what is given makes it wrong."""
    _, param = list(graph.params.items())[1]
    fields: dict[str, Any] = {"table": param.table, "row": param.row, "reads": {}, "weights": {}} | changed
    place = Place(fields["table"], fields["row"], 0, 4)
    inputs = (Input("half", "half", (4, 4)),)
    graph.encodings["alice", "e"] = Encoding("alice", "e", "", inputs, (place,), fields["reads"], fields["weights"])
    return graph


def encode_for_a_neighbour(graph: MuxGraph) -> MuxGraph:
    return encoding(graph, row=1)


def encode_what_has_no_gradient(graph: MuxGraph) -> MuxGraph:
    return encoding(graph, table=next(name for name, table in graph.tables.items() if not table.trainable))


def encode_into_an_unknown_table(graph: MuxGraph) -> MuxGraph:
    return encoding(graph, table="nobody.r8.A")


def encode_from_an_unknown_weight(graph: MuxGraph) -> MuxGraph:
    return encoding(graph, weights={"weight": "model.layers.99.weight"})


def encode_from_an_unknown_key(graph: MuxGraph) -> MuxGraph:
    return encoding(graph, reads={"own": "half", "other": "lora_C"})


def use_before_definition(graph: MuxGraph) -> MuxGraph:
    node = first(graph, torch.ops.mux.linears.default)
    last = graph.gm.graph.output_node()
    last.prepend(node)
    return graph


BROKEN: dict[Callable[[MuxGraph], MuxGraph], str] = {
    drop_an_input: "placeholders",
    reorder_the_inputs: "placeholders",
    add_a_placeholder: "placeholders",
    forget_a_value: "linears.*no value in meta",
    read_an_unknown_table: "table:nobody.r8.A: no such table",
    read_an_unknown_weight: "weight:model.layers.99.weight: no such weight",
    leave_an_addmm: "addmm.*not normal",
    leave_a_dropout: "dropout.*not normal",
    move_a_parameter: "alice.*not at",
    lose_a_table: "no such table|not at",
    encode_for_a_neighbour: r"e of alice: not at .*\[1\]",
    encode_what_has_no_gradient: "e of alice: .* is given no gradient",
    encode_into_an_unknown_table: "e of alice: no table nobody.r8.A",
    encode_from_an_unknown_weight: "e of alice: no weight model.layers.99.weight",
    encode_from_an_unknown_key: r"e of alice: reads \['lora_C'\], which is no key",
    use_before_definition: "before it has been defined",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_the_checker_bites(graph: MuxGraph, model: Any, damage: Callable[[MuxGraph], MuxGraph]) -> None:
    after = fused(normal(model), resolved(model, {"alice": lora("q_proj"), "bob": lora("q_proj")}))
    check(after)
    check(encoding(after.copy()))
    with pytest.raises((AssertionError, RuntimeError), match=BROKEN[damage]):
        check(damage(after.copy()))


def test_a_captured_graph_may_hold_what_a_normal_one_may_not(model: Any) -> None:
    graph = replace(normal(model), level="captured")
    check(leave_a_dropout(leave_an_addmm(graph.copy())))
    with pytest.raises(AssertionError):
        check(replace(leave_a_dropout(graph.copy()), level="normal"))
