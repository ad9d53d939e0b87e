"""partition cuts a graph into regions: every node once, equal layers alike, nothing but real values across borders."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from codegen.spec import Body
from passes.graph import MuxGraph
from passes.partition import partition, share, summary
from runtime.region import value_of
from tests.backbones import (
    VOCABULARY,
    WIDTH,
    Attention,
    Plain,
    chunk_of,
    fused,
    llama,
    logits_of,
    lora,
    made,
    normal,
    resolved,
    run_bodies,
    state_of,
)  # fmt: skip

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "pad_token_id": 0,
}  # fmt: skip


def gpt2() -> Any:
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    return made(transformers.GPT2LMHeadModel, transformers.GPT2Config(**fields))


def gemma3(layers: int = 4) -> Any:
    kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
    fields = SMALL | {"num_hidden_layers": layers, "head_dim": 8, "sliding_window": 8, "layer_types": kinds}
    return made(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**fields))


def olmo2() -> Any:
    return made(transformers.Olmo2ForCausalLM, transformers.Olmo2Config(**SMALL))


class Layer(nn.Module):
    """Norm-free: q, k and v read what the layer before wrote. The first layer makes a value without gradient for all others."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, wave: Tensor | None, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if wave is None:
            wave = 1 + 0.1 * position_ids.float().cos()[..., None]
        return x + self.attention(x) * wave, wave


class Layered(Plain):
    def make(self) -> None:
        del self.attention
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x, wave = self.tokens(input_ids), None
        for layer in self.layers:
            x, wave = layer(x, wave, position_ids)
        return x

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.logits(self.hidden(input_ids, position_ids))


class Skipping(Layered):
    """The first layer's output is read by the second and by the end."""

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x, wave = self.layers[0](self.tokens(input_ids), None, position_ids)
        y, wave = self.layers[1](x, wave, position_ids)
        return torch.tanh(self.layers[2](y, wave, position_ids)[0] + x)


class Twice(Layered):
    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x, wave = self.tokens(input_ids), None
        for _ in range(2):
            for layer in self.layers:
                x, wave = layer(x, wave, position_ids)
        return x


class Numbered(Layered):
    """Layers by attribute, not in a list."""

    def make(self) -> None:
        del self.attention
        self.block1, self.block2 = Layer(), Layer()

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x, wave = self.block1(self.tokens(input_ids), None, position_ids)
        return self.block2(x, wave, position_ids)[0]


class Rows(Layered):
    """The head sees [T, H]."""

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x[0])[None]


class Viewed(Plain):
    """The region ends in views."""

    def body(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).unflatten(0, (1, -1)).squeeze()[None]


class Linear(Layered):
    """Every layer ends in its linear; what follows is the model's own."""

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        first = torch.tanh(self.layers[0].attention(self.tokens(input_ids)))
        second = torch.tanh(self.layers[1].attention(first))
        return torch.tanh(self.layers[2].attention(second + first) * first)


class RawHead(Plain):
    def make(self) -> None:
        self.matrix = nn.Parameter(torch.randn(WIDTH, VOCABULARY))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class TiedHead(Plain):
    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.tokens.weight)


class CappedHead(Layered):
    def logits(self, x: Tensor) -> Tensor:
        return 30 * torch.tanh(self.head(x) / 30)


QV, PLAIN = ("q_proj", "v_proj"), ("q", "v")
BACKBONES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "llama": (llama, QV),
    "gpt2": (gpt2, ("c_attn", "c_proj")),
    "gemma3": (gemma3, QV),
    "olmo2": (olmo2, QV),
    **{kind.__name__: (lambda kind=kind: made(kind), PLAIN) for kind in (
        Plain, Layered, Skipping, Twice, Numbered, Rows, Viewed, Linear, RawHead, TiedHead, CappedHead,
    )},
}  # fmt: skip


def cut(model: nn.Module, *targets: str) -> tuple[MuxGraph, list[Body], Body]:
    graph = fused(normal(model), resolved(model, {"alice": lora(*targets), "bob": lora(*targets[:1])}))
    return graph, *partition(graph)


@functools.cache
def cut_of(name: str) -> tuple[MuxGraph, list[Body], Body]:
    build, targets = BACKBONES[name]
    return cut(build(), *targets)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_regions_and_the_head_compute_what_the_graph_computes(name: str) -> None:
    graph, bodies, head = cut_of(name)
    state, chunk = state_of(graph), chunk_of({"alice": [13, 1, 7], "bob": [30]})
    values = run_bodies([*bodies, head], graph.weights, state, chunk)
    assert torch.equal(values[head.spec.outputs[0]][0], logits_of(graph, state, chunk))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_node_is_in_exactly_one_region(name: str) -> None:
    graph, bodies, head = cut_of(name)
    # Views of weights are made where they are read, and a view is copied before it crosses a border: neither computes anything.
    free = {torch.ops.aten.t.default, torch.ops.aten.clone.default}

    def count(gm: Any) -> Counter[Any]:
        return Counter(node.target for node in gm.graph.nodes if node.op == "call_function" and node.target not in free)

    total: Counter[Any] = Counter()
    for body in [*bodies, head]:
        total += count(body.gm)
    assert total == count(graph.gm)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_value_is_written_once_and_read_by_later_regions_only(name: str) -> None:
    _, bodies, head = cut_of(name)
    written: set[str] = set()
    for body in [*bodies, head]:
        read = {value for reference in body.spec.inputs if (value := value_of(reference)) is not None}
        assert read <= written, f"{body.spec.name} reads what is not written yet"
        assert not written & set(body.spec.outputs)
        written |= set(body.spec.outputs)
    read_by_anyone = {value_of(reference) for body in [*bodies, head] for reference in body.spec.inputs}
    assert written - read_by_anyone == set(head.spec.outputs), "a value that nobody reads is handed on"


@pytest.mark.parametrize("name", BACKBONES)
def test_what_crosses_a_border_is_memory_of_its_own(name: str) -> None:
    graph, bodies, head = cut_of(name)
    state, chunk = state_of(graph), chunk_of({"alice": [20]})
    values = run_bodies(bodies, graph.weights, state, chunk)
    owned = {
        tensor.untyped_storage().data_ptr() for tensor in [*graph.weights.values(), *state.copies.values(), *chunk.tensors.values()]
    }
    places = [value.untyped_storage().data_ptr() for value in values.values()]
    assert not owned & set(places)
    assert len(set(places)) == len(places), "two values share memory"
    assert [reference for reference in head.spec.inputs if value_of(reference)] == [head.spec.inputs[0]]


@pytest.mark.parametrize("layers", [2, 4, 6])
def test_equal_layers_share_one_template_whatever_their_number(layers: int) -> None:
    model = llama(layers)
    graph, bodies, _ = cut(model, *QV)
    assert [body.spec.name for body in bodies] == ["embed", *(f"model.layers.{index}" for index in range(layers)), "final"]
    templates = share(bodies)
    # The first layer stands apart: below the first adapter there is no gradient.
    assert list(templates) == ["embed", "model.layers.0", "model.layers.1", "final"]
    assert len(templates["model.layers.1"]) == layers - 1
    state, chunk = state_of(graph), chunk_of({"alice": [13, 1, 7], "bob": [30]})
    plain = run_bodies(bodies, graph.weights, state, chunk)
    # The first of each group serves for all of them.
    first = {body.spec.name: group[0] for group in templates.values() for body in group}
    shared = [Body(body.spec, first[body.spec.name].gm, body.trainable, body.wants_grad, body.has_grad) for body in bodies]
    again = run_bodies(shared, graph.weights, state, chunk)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_the_two_layer_types_of_gemma3_are_two_templates() -> None:
    _, bodies, _ = cut_of("gemma3")
    groups = {name: [body.spec.name for body in group] for name, group in share(bodies).items()}
    assert groups == {
        "embed": ["embed"],
        "model.layers.0": ["model.layers.0"],
        "model.layers.1": ["model.layers.1", "model.layers.3"],
        "model.layers.2": ["model.layers.2"],
        "final": ["final"],
    }


def test_layers_with_other_adapters_have_templates_of_their_own() -> None:
    model = llama(4)
    graph = fused(normal(model), resolved(model, {"alice": lora("q_proj"), "bob": lora("v_proj", layers_to_transform=[2])}))
    groups = {name: len(group) for name, group in share(partition(graph)[0]).items()}
    assert groups == {"embed": 1, "model.layers.0": 1, "model.layers.1": 2, "model.layers.2": 1, "final": 1}


def test_gradients_are_wanted_from_the_first_adapter_on() -> None:
    model = llama(3)
    graph = fused(normal(model), resolved(model, {"alice": lora("model.layers.1.self_attn.q_proj")}))
    bodies, head = partition(graph)
    assert [any(body.has_grad) for body in bodies] == [False, False, True, True, True]
    wanted = [[str(ref) for ref, wants in zip(body.spec.inputs, body.wants_grad, strict=True) if wants] for body in bodies]
    site = "table:model.layers.1.self_attn.q_proj.r8"
    assert wanted == [[], [], [f"{site}.A", f"{site}.B0"], ["value:model.layers.1/0"], ["value:model.layers.2/0"]]
    assert head.wants_grad[0]
    assert not any(head.wants_grad[1:])
    assert [body.trainable.count(True) for body in bodies] == [0, 0, 2, 0, 0]


def test_a_module_without_a_list_is_one_region_and_a_head() -> None:
    _, bodies, head = cut_of("Plain")
    assert [body.spec.name for body in bodies] == ["embed"]
    assert head.spec.name == "head"


def test_a_layer_that_runs_again_runs_where_the_data_allow() -> None:
    _, bodies, _ = cut_of("Twice")
    assert [body.spec.name for body in bodies] == ["embed", "layers.0", "layers.1", "layers.2"]


def test_inputs_come_in_one_order_of_kinds() -> None:
    _, bodies, _ = cut_of("llama")
    order = ("value", "chunk", "route", "table", "weight")
    for body in bodies:
        kinds = [order.index(reference.partition(":")[0]) for reference in body.spec.inputs]
        assert kinds == sorted(kinds)
        assert len(body.spec.inputs) == len(set(body.spec.inputs)) == len(body.wants_grad) == len(body.trainable)
        assert len(body.spec.outputs) == len(body.has_grad)


def test_the_summary_has_a_line_for_each_template() -> None:
    _, bodies, _ = cut(llama(4), *QV)
    reads = "reads 3 value, 2 chunk, 2 route, 8 table, 9 weight"
    assert summary(bodies) == (
        "template embed: 1 region(s) embed .. embed; reads 2 chunk, 2 weight; gradient False\n"
        f"template model.layers.0: 1 region(s) model.layers.0 .. model.layers.0; {reads}; gradient True\n"
        f"template model.layers.1: 3 region(s) model.layers.1 .. model.layers.3; {reads}; gradient True\n"
        "template final: 1 region(s) final .. final; reads 1 value, 1 weight; gradient True\n"
    )


class NoHead(Layered):
    def logits(self, x: Tensor) -> Tensor:
        return x


class TwoHeads(Layered):
    def logits(self, x: Tensor) -> Tensor:
        return self.head(x) + self.head(x * 2)


class HeadBeside(Layered):
    def logits(self, x: Tensor) -> Tensor:
        return self.head(x) + x.sum(-1, keepdim=True)


def test_what_is_computed_from_the_heads_input_beside_it_belongs_to_the_head() -> None:
    graph, bodies, head = cut(made(HeadBeside), *PLAIN)
    state, chunk = state_of(graph), chunk_of({"alice": [13, 1, 7], "bob": [30]})
    values = run_bodies([*bodies, head], graph.weights, state, chunk)
    assert torch.equal(values[head.spec.outputs[0]][0], logits_of(graph, state, chunk))


@pytest.mark.parametrize("kind", [NoHead, TwoHeads])
def test_logits_that_do_not_come_from_one_linear_head_are_refused(kind: type[Plain]) -> None:
    with pytest.raises(ValueError, match=r"^backbone: module .* the logits do not come from one linear head"):
        cut(made(kind), *PLAIN)
