"""The carry pass: every attention may see earlier keys, its own go out of their region, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from codegen.ops import ATTENTION, PREFIXED_ATTENTION
from passes.carry import carry
from passes.graph import MuxGraph, Source, check, val
from passes.partition import handed_on, partition, share
from passes.schedule import schedule
from tests.backbones import GEOMETRY, Attention, Plain, fused, llama, lora, made, normal, resolved
from tests.golden import check_golden
from tests.passes.test_capture import ARCHITECTURES, built


def carrying(model: nn.Module, **tasks: object) -> MuxGraph:
    graph = carry(fused(normal(model), resolved(model, tasks)).copy())
    check(graph)
    return graph


def test_every_attention_reads_what_came_before_and_nothing_else_changes() -> None:
    from peft import PrefixTuningConfig

    tasks = {"alice": lora("q_proj"), "peter": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    for given in (tasks, {"alice": tasks["alice"]}):
        before = fused(normal(llama()), resolved(llama(), given))
        text, after = before.text(), carry(before.copy())
        check(after)
        assert before.text() == text
        nodes = [node for node in after.gm.graph.nodes if node.target in (ATTENTION, PREFIXED_ATTENTION)]
        inputs = [node for source, node in after.inputs.items() if source.kind == "carry"]
        assert [node.args[-1] for node in nodes] == inputs
        assert [source for source in after.inputs if source not in before.inputs] == [Source("carry", "0"), Source("carry", "1")]
        for node, own in zip(nodes, inputs, strict=True):
            assert val(own).shape == (2, GEOMETRY.tile, *val(node.args[1]).shape[1:])
            node.args = node.args[:-1]
        found = after.text().replace(", carry_0, carry_1", "").splitlines()
        assert [line for line in found if "carry" not in line] == text.splitlines()


def test_keys_and_values_leave_their_region_and_layers_still_share_a_template() -> None:
    bodies, _ = partition(carrying(llama(4), alice=lora("q_proj", "v_proj")))
    pieces = handed_on(bodies)
    assert [own.number for own in pieces] == ["0", "1", "2", "3"]
    assert {(own.shape, own.dtype) for own in pieces} == {((2, 8), "float32")}
    for index, own in enumerate(pieces):
        (body,) = (body for body in bodies if f"carry:{own.number}" in body.spec.inputs)
        assert body.spec.name == f"model.layers.{index}"
        assert {own.keys, own.values} <= set(body.spec.outputs)
    # The first layer's input needs no gradient.
    assert [len(group) for group in share(bodies).values()] == [1, 1, 3, 1]


@pytest.mark.parametrize(
    ("layer", "expected"), [(0, [True, True]), (1, [False, True])], ids=["the first layer", "the second layer"]
)
def test_what_came_before_wants_a_gradient_where_keys_or_values_depend_on_what_is_trained(layer: int, expected: list[bool]) -> None:
    bodies, _ = partition(carrying(llama(), alice=lora("v_proj", layers_to_transform=[layer])))
    found = {
        reference: wants
        for body in bodies
        for reference, wants in zip(body.spec.inputs, body.wants_grad, strict=True)
        if reference.startswith("carry:")
    }
    assert found == {f"carry:{index}": wants for index, wants in enumerate(expected)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_that_is_captured_can_carry(name: str) -> None:
    bodies, _ = partition(carry(normal(built(name)).copy()))
    assert len(handed_on(bodies)) == 2


def test_attention_that_shares_its_keys_is_refused_by_name() -> None:
    class Same(Plain):
        def make(self) -> None:
            del self.attention
            self.layers = nn.ModuleList([Attention(), Attention()])

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            x = self.tokens(input_ids)
            q, k, v = (part(x).view(1, -1, 2, 8).transpose(1, 2) for part in (self.layers[0].q, self.layers[0].k, self.layers[0].v))
            attend = torch.nn.functional.scaled_dot_product_attention
            x = x + self.layers[0].o(attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            q = self.layers[1].q(x).view(1, -1, 2, 8).transpose(1, 2)
            return self.head(x + self.layers[1].o(attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))

    bodies, _ = partition(carry(normal(made(Same)).copy()))
    with pytest.raises(ValueError, match=r"attention of 'final' shares its keys or values.*Options\.chunk_tokens"):
        handed_on(bodies)


def test_the_program_of_one_micro_batch_names_nothing_of_other_pieces() -> None:
    from passes.differentiate import differentiate

    graph = carrying(llama(), alice=lora("q_proj", "v_proj"))
    bodies, head = partition(graph)
    templates, regions = {}, []
    for name, group in share(bodies).items():
        templates[name] = differentiate(name, group[0]).spec
    for body in bodies:
        name = next(name for name, group in share(bodies).items() if body in group)
        regions.append(type(body.spec)(body.spec.name, name, body.spec.inputs, body.spec.outputs))
    kept = [name for own in handed_on(bodies) for name in (own.keys, own.values)]
    program = schedule(regions, templates, head.spec.inputs[0].removeprefix("value:"), tasks=("alice",), train=True, kept=kept)
    assert not any(name in kept or "carry" in name for action in program for name in (*action.reads, *action.writes))
    check_golden("llama-2.carried.train.program", str(program))
