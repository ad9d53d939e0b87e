"""A template's forward and backward are what autograd makes of its body, with every gradient where the executor looks."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from codegen import emit
from codegen.ops import LINEARS, LINEARS_BACKWARD, LINEARS_BACKWARD_, LSE, PREFIX_GRAD, PREFIX_GRAD_, TILE_OUTER, TILE_OUTER_
from codegen.spec import Body, Head, Template
from passes.differentiate import differentiate, trace
from passes.graph import MuxGraph
from passes.loss import differentiate_head, parallel_cross_entropy
from passes.partition import partition, share
from runtime.comm import join
from runtime.pack import Chunk
from runtime.region import RegionSpec
from runtime.state import State
from runtime.tables import Shard
from tests.backbones import (
    VOCABULARY,
    WIDTH,
    Attention,
    Plain,
    arguments,
    chunk_of,
    fused,
    llama,
    lora,
    made,
    normal,
    resolved,
    run_bodies,
    state_of,
)  # fmt: skip


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, wave: Tensor | None, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(x)
        # The first layer hands on a value without a gradient, beside one that has it.
        wave = 1 + 0.1 * position_ids.float().cos()[..., None] if wave is None else wave
        return x + torch.tanh(self.up(self.up(x))) * wave, wave


class Skipping(Plain):
    """A module runs twice in each layer, and the first layer's output is read twice more."""

    def make(self) -> None:
        del self.attention
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        first, wave = self.layers[0](self.tokens(input_ids), None, position_ids)
        second, wave = self.layers[1](first, wave, position_ids)
        third, _ = self.layers[2](second + first, wave, position_ids)
        return self.head(torch.tanh(third * first))


class Ending(Skipping):
    """A layer ends in a linear, a list of layers in views of what it made."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        first = torch.tanh(self.layers[0].attention(self.tokens(input_ids)))
        second = torch.tanh(self.layers[1].attention(first))
        third = self.layers[2].attention(second + first)
        return self.head((third * first).flatten(0, 1).unflatten(0, (1, -1)))


def gpt2() -> Any:
    import transformers

    fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    return made(transformers.GPT2LMHeadModel, transformers.GPT2Config(**fields))


def glm() -> Any:
    """Its layers read a slice of the rotary tables, repeated."""
    import transformers

    fields = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY}
    return made(
        transformers.GlmForCausalLM,
        transformers.GlmConfig(hidden_size=32, intermediate_size=48, pad_token_id=0, eos_token_id=1, **fields),
    )


BACKBONES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "llama": (llama, ("q_proj", "v_proj", "down_proj")),
    "llama in bfloat16": (lambda: llama().bfloat16(), ("q_proj",)),
    "gpt2": (gpt2, ("c_attn", "c_proj")),
    "plain": (lambda: made(Plain), ("q", "v", "o")),
    "skipping": (lambda: made(Skipping), ("q", "up")),
    "ending": (lambda: made(Ending), ("q",)),
    "glm": (glm, ("q_proj",)),
}


class Case:
    """A backbone's bodies with their templates, and all the values of one chunk."""

    def __init__(self, name: str) -> None:
        build, targets = BACKBONES[name]
        self.tolerance = 0.05 if "bfloat16" in name else 1e-6
        model = build()
        self.graph: MuxGraph = fused(
            normal(model), resolved(model, {"alice": lora(*targets), "bob": lora(targets[0], r=9)}), reserve=1
        )
        self.bodies, self.head_body = partition(self.graph)
        self.templates: dict[str, Template] = {}
        for first, group in share(self.bodies).items():
            template = differentiate(first, group[0])
            self.templates.update({body.spec.name: template for body in group})
        self.state: State = state_of(self.graph)
        self.chunk: Chunk = chunk_of({"alice": [13, 1, 7], "bob": [20]})
        self.values = run_bodies(self.bodies, self.graph.weights, self.state, self.chunk)

    def arguments(self, body: Body) -> list[Tensor]:
        return arguments(body, self.values, self.graph.weights, self.state, self.chunk)

    def close(self, found: Tensor, expected: Tensor) -> None:
        assert found.shape == expected.shape
        bound = self.tolerance * max(1.0, float(expected.abs().max()))
        assert float((found.double() - expected.double()).abs().max()) <= bound


@functools.cache
def case_of(name: str) -> Case:
    return Case(name)


def backward_arguments(
    template: Template, inputs: list[Tensor], saved: tuple[Tensor, ...], tangents: dict[int, Tensor], grads: dict[int, Tensor]
) -> list[Tensor]:
    found = {"input": inputs, "saved": saved, "tangent": tangents, "grad": grads}
    assert template.spec.backward is not None
    return [found[kind][int(index)] for kind, _, index in (reference.partition(":") for reference in template.spec.backward)]  # type: ignore[index]


@pytest.mark.parametrize("name", BACKBONES)
def test_forward_and_backward_are_those_of_autograd(name: str) -> None:
    case = case_of(name)
    for body in case.bodies:
        template, spec = case.templates[body.spec.name], case.templates[body.spec.name].spec
        inputs = case.arguments(body)
        results = template.forward(*inputs)
        outputs, saved = results[: spec.outputs], results[spec.outputs :]
        assert len(saved) == spec.saved
        assert len(outputs) == len(body.spec.outputs)

        leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip(inputs, body.wants_grad, strict=True)]
        expected = body.gm(*leaves)
        for mine, theirs in zip(outputs, expected, strict=True):
            case.close(mine, theirs.detach())
        if template.backward is None:
            assert spec.backward is None
            assert not any(body.has_grad)
            continue

        generator = torch.Generator().manual_seed(5)
        tangents = {
            index: torch.randn(outputs[index].shape, generator=generator).to(outputs[index].dtype)
            for index, has in enumerate(body.has_grad) if has
        }  # fmt: skip
        tables = [index for index, trainable in enumerate(body.trainable) if trainable]
        # Gradients are added to what the table holds already.
        held = {index: torch.randn(inputs[index].shape, generator=generator) for index in tables}
        grads = {index: held[index].clone() for index in tables}
        returned = template.backward(*backward_arguments(template, inputs, saved, tangents, grads))

        wanted = [index for index, wants in enumerate(body.wants_grad) if wants]
        exact = dict(
            zip(
                wanted,
                torch.autograd.grad(
                    [expected[index] for index in tangents], [leaves[index] for index in wanted], list(tangents.values())
                ),
                strict=True,
            )
        )
        for index in tables:
            case.close(grads[index] - held[index], exact[index])
            assert grads[index].dtype == torch.float32
        assert list(spec.input_grads) == [index for index in wanted if index not in tables]
        for index, grad in zip(spec.input_grads, returned, strict=True):
            case.close(grad, exact[index])
            assert grad.dtype == inputs[index].dtype


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backwards_arguments_are_all_there_and_each_is_used(name: str) -> None:
    case = case_of(name)
    for body in case.bodies:
        template = case.templates[body.spec.name]
        spec = template.spec
        if spec.backward is None:
            assert template.backward is None
            assert spec.saved == 0
            assert spec.input_grads == ()
            continue
        assert template.backward is not None
        assert len(template.backward.graph.find_nodes(op="placeholder")) == len(spec.backward)
        by_kind: dict[str, list[int]] = {kind: [] for kind in ("input", "saved", "tangent", "grad")}
        for reference in spec.backward:
            kind, _, index = reference.partition(":")
            by_kind[kind].append(int(index))
        assert all(len(found) == len(set(found)) for found in by_kind.values())
        assert set(by_kind["input"]) <= set(range(len(body.spec.inputs)))
        assert sorted(by_kind["saved"]) == list(range(spec.saved))
        assert sorted(by_kind["tangent"]) == [index for index, has in enumerate(body.has_grad) if has]
        assert sorted(by_kind["grad"]) == [index for index, trainable in enumerate(body.trainable) if trainable]
        assert not any(not node.users for node in template.backward.graph.find_nodes(op="placeholder"))


@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_saved_is_neither_an_input_nor_a_view_of_one(name: str) -> None:
    case = case_of(name)
    for body in case.bodies:
        template = case.templates[body.spec.name]
        inputs = case.arguments(body)
        saved = template.forward(*inputs)[template.spec.outputs :]
        places = {x.untyped_storage().data_ptr() for x in inputs}
        assert not any(x.untyped_storage().data_ptr() in places for x in saved)


def added_to(graph: Any) -> list[Any]:
    """The gradient tables that a backward adds to, once for each addition."""
    found = []
    for node in graph.nodes:
        if node.target is TILE_OUTER_:
            found.append(node.args[0])
        if node.target is LINEARS_BACKWARD_:
            found += node.args[0]
    return found


@pytest.mark.parametrize("name", BACKBONES)
def test_a_weight_gets_no_gradient_and_no_product_is_spent_on_one(name: str) -> None:
    case = case_of(name)
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    for body in case.bodies:
        template = case.templates[body.spec.name]
        if template.backward is None:
            continue
        targets = [node.target for node in template.backward.graph.nodes]
        assert not {TILE_OUTER, LINEARS_BACKWARD} & set(targets), "a table's gradient is added in place"
        tables = added_to(template.backward.graph)
        assert len(tables) >= len(set(tables)) == sum(body.trainable)
        assert all(not ref.startswith("weight:") for ref, wants in zip(body.spec.inputs, body.wants_grad, strict=True) if wants)
        # A product's input gradient is one product; a weight gradient, or a product computed again, would be one more.
        forward = [node.target in products for node in template.forward.graph.nodes].count(True)
        assert [target in products for target in targets].count(True) <= forward
        joint = [node.target for node in template.forward.graph.nodes].count(LINEARS)
        assert targets.count(LINEARS_BACKWARD_) <= joint
        assert LINEARS not in targets, "a frozen product is computed again"


def test_the_first_layer_computes_no_input_gradient() -> None:
    case = case_of("llama")
    assert case.templates["embed"].backward is None
    assert case.templates["model.layers.0"].spec.input_grads == ()
    assert case.templates["model.layers.1"].spec.input_grads == (0,)
    assert case.bodies[2].spec.inputs[0] == "value:model.layers.0/0"


def test_a_value_without_gradient_beside_one_with_it_has_no_tangent() -> None:
    case = case_of("skipping")
    body = next(body for body in case.bodies if body.spec.name == "layers.0")
    assert sorted(body.has_grad) == [False, True]
    assert case.templates["layers.0"].spec.backward is not None
    tangents = [reference for reference in case.templates["layers.0"].spec.backward if reference.startswith("tangent:")]
    assert tangents == [f"tangent:{body.has_grad.index(True)}"]


def test_a_table_that_is_read_twice_sums_both_gradients() -> None:
    case = case_of("skipping")
    backward = case.templates["layers.1"].backward
    assert backward is not None
    tables = added_to(backward.graph)
    assert {tables.count(table) for table in tables} == {1, 2}


def through_prefixes(x: Tensor, first: Tensor, second: Tensor, route: Tensor) -> tuple[Tensor]:
    """Attention over heads of 8 with two tables, a prefix row for each of two key/value heads."""
    q, k = torch.tanh(x).view(48, 4, 8), torch.sin(x[:, :16]).view(48, 2, 8)
    lengths, borders = torch.tensor([1.0, 1.0]), torch.tensor([0, 9, 16, 48], dtype=torch.int32)
    bounds, others = torch.tensor([32, 3], dtype=torch.int32), torch.where(route < 0, 1, -1).int()
    tables = [first, second], [lengths, lengths], [route, others]
    out, _ = torch.ops.mux.prefixed_attention(q, k, k, *tables, borders, bounds, 0.3, 0)
    return (out.flatten(1) * x,)


def through_views(x: Tensor, down: Tensor, up: Tensor, route: Tensor) -> tuple[Tensor]:
    """Tables of other shapes than the products' own, the first read twice; [2, 4, 8] as [2, 32, 1], then as [2, 1, 32]."""
    narrow = torch.ops.mux.tile_mm(x, down.view(2, 32, 1), route, None, False)
    wide = torch.ops.mux.tile_mm(narrow, up.view(2, 1, 32), route, None, False)
    return (torch.tanh(wide) + torch.ops.mux.tile_mm(narrow, down.view(2, 1, 32), route, None, False) * x,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("function", "additions"), [(through_prefixes, 2), (through_views, 3)])
def test_a_table_gets_its_gradient_in_place_and_in_its_own_shape(function: Any, additions: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, first, second, tangent = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((48, 32), (2, 4, 8), (2, 4, 8), (48, 32))
    )
    inputs = [x, first, second, torch.tensor([1, -1, 0], dtype=torch.int32)]
    trainable, wants = (False, True, True, False), (True, True, True, False)
    spec = RegionSpec("r", "r", ("value:x", "table:first", "table:second", "route:r"), ("r/0",))
    body = Body(spec, make_fx(function, tracing_mode="real")(*inputs), trainable, wants, (True,))
    template = differentiate("r", body)
    assert template.backward is not None
    targets = [node.target for node in template.backward.graph.nodes]
    assert sum(target in (TILE_OUTER_, PREFIX_GRAD_) for target in targets) == additions
    assert not {TILE_OUTER, PREFIX_GRAD} & set(targets)

    held = {index: torch.randn(2, 4, 8, generator=generator) for index in (1, 2)}
    grads = {index: table.clone() for index, table in held.items()}
    _, *saved = template.forward(*inputs)
    (dx,) = template.backward(*backward_arguments(template, inputs, tuple(saved), {0: tangent}, grads))
    leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip(inputs, wants, strict=True)]
    expected = torch.autograd.grad(function(*leaves), leaves[:3], tangent)
    for found, exact in zip((dx, grads[1] - held[1], grads[2] - held[2]), expected, strict=True):
        bound = 0.05 if dtype == torch.bfloat16 else 1e-6
        assert float((found.float() - exact.float()).abs().max()) <= bound * max(1.0, float(exact.abs().max()))


def test_a_body_that_is_traced_once_is_cut_both_ways_as_if_it_were_traced_for_each() -> None:
    def texts(template: Template) -> list[Any]:
        graphs = [gm for gm in (template.forward, template.backward) if gm is not None]
        return [template.spec, *(emit.eager_source(gm, "text") for gm in graphs)]

    case = case_of("skipping")
    for first, group in share(case.bodies).items():
        traced = trace(group[0])
        again = texts(differentiate(first, group[0], checkpoint=True, traced=traced))
        assert again == texts(differentiate(first, group[0], checkpoint=True))
        assert texts(differentiate(first, group[0], traced=traced)) == texts(case.templates[first])


def test_one_template_serves_every_layer_it_is_shared_by() -> None:
    model = llama(3)
    bodies, _ = partition(fused(normal(model), resolved(model, {"alice": lora("q_proj")})))
    first, second = (body for body in bodies if body.spec.name in ("model.layers.1", "model.layers.2"))
    one, other = differentiate("t", first), differentiate("t", second)
    assert one.spec == other.spec
    assert str(one.forward.graph) == str(other.forward.graph)
    assert str(one.backward.graph) == str(other.backward.graph)  # type: ignore[union-attr]


# --- the head ---------------------------------------------------------------------------------------------------------


def head_of(model: nn.Module, *targets: str, rows: int = 8, joined: bool = False) -> tuple[Head, Body, MuxGraph]:
    graph = fused(normal(model), resolved(model, {"alice": lora(*targets)}))
    body = partition(graph)[1]
    return differentiate_head(body, rows=rows, tile=4, fused=joined), body, graph


class Biased(Plain):
    def make(self) -> None:
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def logits(self, x: Tensor) -> Tensor:
        return 5 * torch.tanh(self.head(x) / 5)


@pytest.mark.parametrize(
    ("model", "targets"),
    [(llama, ("q_proj",)), (lambda: llama().bfloat16(), ("q_proj",)), (gpt2, ("c_attn",)), (lambda: made(Biased), ("q",))],
    ids=["llama", "bfloat16", "gpt2", "a capped head with bias"],
)
@pytest.mark.parametrize("joined", [False, True])
def test_the_head_gives_each_rows_loss_and_gradient(model: Any, targets: tuple[str, ...], joined: bool) -> None:
    head, body, graph = head_of(model(), *targets, joined=joined)
    assert joined == any(node.target is LSE for node in head.backward.graph.nodes)
    assert head.rows == 8
    called = {node.target for node in head.backward.graph.nodes}
    assert not called & {torch.ops.aten.clone.default, torch.ops.aten.select_backward.default}, "logits are large: none is copied"
    assert all(reference.startswith("weight:") for reference in head.inputs)
    weights = [graph.weights[reference.removeprefix("weight:")].detach() for reference in head.inputs]
    generator = torch.Generator().manual_seed(0)
    width = body.gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[-1]
    rows = torch.randn(1, 8, width, generator=generator).to(weights[0].dtype)
    targets_ = torch.randint(VOCABULARY, (8,), generator=generator)
    seeds = torch.rand(8, generator=generator)
    seeds[3] = 0.0  # nobody's row

    leaf = rows.clone().requires_grad_()
    (logits,) = body.gm(leaf, *weights)
    expected = F.cross_entropy(logits[0].float(), targets_, reduction="none")
    (grad,) = torch.autograd.grad(expected, leaf, seeds)

    tolerance = 0.05 if rows.dtype == torch.bfloat16 else 1e-6
    (alone,) = head.forward(rows, *weights, targets_)
    nll, found = head.backward(rows, *weights, targets_, seeds)
    assert nll.dtype == alone.dtype == torch.float32
    assert torch.equal(nll, alone)
    torch.testing.assert_close(nll, expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, grad, rtol=tolerance, atol=tolerance)
    assert not found[0, 3].any()


@pytest.mark.parametrize("joined", [False, True])
def test_ranks_that_share_a_vocabulary_have_the_loss_and_their_part_of_its_gradient(joined: bool) -> None:
    """Each is given what the others told, as their sum would be."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 20, generator=generator)
    targets = torch.tensor([0, 9, 10, 19, 4, 15])
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none")
    seeds = torch.rand(6, generator=generator)
    expected.backward(seeds)
    told: list[Tensor] = []
    for turn in range(2):  # in the first, ranks are heard
        for rank in range(2):
            others = [told[1 - rank]] if turn else []
            own = logits.chunk(2, 1)[rank].contiguous().requires_grad_()

            def total(value: Tensor, group: str, others: list[Tensor] = others) -> Tensor:
                told.append(value.clone())
                return sum(others, value.clone())

            join(SimpleNamespace(total=total))  # type: ignore[arg-type]
            try:
                found = parallel_cross_entropy(own, targets, Shard(1, rank, 2), joined)
            finally:
                join(None)
            if turn:
                torch.testing.assert_close(found, expected)
                found.backward(seeds)
                torch.testing.assert_close(own.grad, leaf.grad.chunk(2, 1)[rank])


def test_the_head_reads_the_last_value() -> None:
    head, _, _ = head_of(llama(), "q_proj")
    assert head.value == "final/0"


def test_a_head_that_depends_on_the_number_of_rows_is_refused() -> None:
    class Fixed(Plain):
        def logits(self, x: Tensor) -> Tensor:
            return self.head(x).view(1, x.shape[1], VOCABULARY // 2, 2).flatten(2)

    with pytest.raises(ValueError, match=r"^backbone: its logits .* 8 rows"):
        head_of(made(Fixed), "q")
