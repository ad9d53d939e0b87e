"""Joined rows are what torch's calls one by one make of them, to the bit, whatever the tasks cut them into."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LNTuningConfig, LoraConfig
from torch import Tensor, fx

import muxcompile
from codegen import device
from codegen.launches import _collapsed
from codegen.ops import ROWWISE
from codegen.rowwise import Program
from codegen.spec import Body, Template
from passes.differentiate import differentiate
from passes.partition import partition, share
from passes.rowwise import rowwise
from tests.backbones import arguments, chunk_of, fused, llama, normal, resolved, run_bodies, state_of

from .test_differentiate import BACKBONES, backward_arguments

aten = torch.ops.aten
KINDS: dict[str, Any] = {
    "alice": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], lora_alpha=8),
    "bob": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "carol": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
    "dave": muxcompile.BottleneckConfig(reduction_factor=4, non_linearity="tanh"),
}
CASES = {
    **{name: (build, {"alice": LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=list(own), fan_in_fan_out=name == "gpt2")})
       for name, (build, own) in BACKBONES.items()},
    "kinds": (llama, KINDS),
    "kinds in bfloat16": (lambda: llama().bfloat16(), KINDS),
    "kinds in float16": (lambda: llama().half(), KINDS),
}  # fmt: skip


@functools.cache
def bodies_of(name: str) -> tuple[Any, list[list[Body]]]:
    build, tasks = CASES[name]
    model = build()
    graph = fused(normal(model), resolved(model, tasks))
    bodies, _ = partition(graph)
    return (graph, bodies), list(share(bodies).values())


@functools.cache
def template_of(name: str, index: int, joined: bool, checkpoint: bool) -> Template:
    return differentiate("t", bodies_of(name)[1][index][0], fused=joined, checkpoint=checkpoint)


def calls(gm: fx.GraphModule | None) -> list[fx.Node]:
    return [] if gm is None else list(gm.graph.find_nodes(op="call_function", target=ROWWISE))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_forwards_and_backwards_keep_their_bits(name: str, checkpoint: bool) -> None:
    (graph, bodies), groups = bodies_of(name)
    state, chunk = state_of(graph), chunk_of({task: [13, 1] for task in list(CASES[name][1])[:2]})
    values = run_bodies(bodies, graph.weights, state, chunk)
    joined = 0
    for index, group in enumerate(groups):
        found = []
        for fused_ in (False, True):
            template = template_of(name, index, fused_, checkpoint)
            joined += len(calls(template.forward)) + len(calls(template.backward))
            found.append(ran(template, group[0], arguments(group[0], values, graph.weights, state, chunk)))
        assert len(found[0]) == len(found[1])
        for before, after in zip(*found, strict=True):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
    assert joined


def ran(template: Template, body: Body, inputs: list[Tensor]) -> list[Tensor]:
    """Everything that it returns or adds to a table."""
    spec, generator = template.spec, torch.Generator().manual_seed(5)
    results = template.forward(*inputs)
    outputs, saved = results[: spec.outputs], results[spec.outputs :]
    if template.backward is None:
        return list(outputs)
    tangents = {
        index: torch.randn(outputs[index].shape, generator=generator).to(outputs[index].dtype)
        for index, has in enumerate(body.has_grad) if has
    }  # fmt: skip
    grads = {index: torch.zeros(inputs[index].shape) for index, trainable in enumerate(body.trainable) if trainable}
    returned = template.backward(*backward_arguments(template, inputs, saved, tangents, grads))
    return [*outputs, *saved, *grads.values(), *returned]


# Triton's interpreter cuts bfloat16 off where a device rounds: tests/gpu has that dtype.
@pytest.mark.parametrize("name", ["llama", "kinds in float16", "skipping"])
def test_a_kernel_computes_what_its_program_says(name: str, interpreted: None) -> None:
    """The whole program in one kernel: a fraction of a unit in the last place of what torch's sums are off."""
    seen = 0
    for index in range(len(bodies_of(name)[1])):
        template = template_of(name, index, True, False)
        for node in (*calls(template.forward), *calls(template.backward)):
            given, text = node.args
            tensors = [random(own.meta["val"], seed) for seed, own in enumerate(given)]
            check_kernel(tensors, text)
            seen += 1
    assert seen


def random(like: Tensor, seed: int) -> Tensor:
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)
    return drawn if 0 in like.stride() else torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(drawn)


def check_kernel(given: Sequence[Tensor], text: str) -> None:
    program = Program.parse(text)
    assert str(program) == text
    for mine, exact in zip(device.rowwise(given, program, text), program.run(given), strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (exact.shape, exact.stride(), exact.dtype)
        size = 2e-6 if mine.dtype == torch.float32 else 2**-9
        scale = exact.double().abs().clamp(min=exact.double().abs().mean())
        assert float(((mine.double() - exact.double()).abs() / scale).max()) <= size


NORM = (
    "v0: float32 = to(x0); v1: float32 = pow(v0, 2); v2: float32 = mean(v1); v3: float32 = add(v2, 1e-06); "
    "v4: float32 = rsqrt(v3); v5: float32 = mul(v0, v4); v6: {dtype} = to(v5); v7: {dtype} = mul(x1, v6); "
    "v8: {dtype} = silu(v7); return v4, v7, v8"
)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("features", [1, 40, 128, 2049, 4100])
def test_rows_of_any_width(dtype: str, features: int, interpreted: None) -> None:
    x, w = (random(torch.empty(shape, dtype=getattr(torch, dtype)), 3) for shape in ((1, 7, features), (features,)))
    check_kernel([x, w if features > 1 else x], NORM.format(dtype=dtype))


ROPE = (
    "v0: {dtype} = mul(x0, x1); v1: {dtype} = slice(x0, 0, {half}); v2: {dtype} = slice(x0, {half}, {width}); "
    "v3: {dtype} = neg(v2); v4: {dtype} = cat(v3, v1); v5: {dtype} = mul(v4, x2); v6: {dtype} = add(v0, v5); return v6 in 0 2 1 3"
)
ROPE_BACKWARD = (
    "v0: {dtype} = mul(x0, x1); v1: {dtype} = slice(v0, 0, {half}); v2: {dtype} = slice(v0, {half}, {width}); "
    "v3: {dtype} = neg(v1); v4: {dtype} = pad(v3, {width}, {half}); v5: {dtype} = pad(v2, {width}, 0); v6: {dtype} = add(v4, v5); "
    "v7: {dtype} = mul(x0, x2); v8: {dtype} = add(v6, v7); return v8 in 0 2 1 3, v6"
)
# A norm of every head, some columns of which then turn: the third part stays, and so does a view of it.
PARTIAL = (
    "v0: float32 = to(x0); v1: float32 = pow(v0, 2); v2: float32 = mean(v1); v3: float32 = rsqrt(v2); v4: float32 = mul(v0, v3); "
    "v5: {dtype} = to(v4); v6: {dtype} = slice(v5, 0, 3); v7: {dtype} = slice(v5, 3, 6); v8: {dtype} = slice(v5, 6, {width}); "
    "v9: {dtype} = neg(v7); v10: {dtype} = cat(v9, v6, v8); v11: {dtype} = slice(v10, 1, {half}); v12: {dtype} = sum(v11); "
    "v13: {dtype} = mul(v10, x1); return v13 in 0 2 1 3, v3, v11, v12"
)


def turned(heads: int, width: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Rows of heads [1, heads, T, width] as a product lays them, and what all heads have of a position."""
    made = [torch.empty(shape, dtype=dtype) for shape in ((1, 37, heads, width), (1, 1, 37, width), (1, 1, 37, width))]
    first, *others = (random(own, seed).to(device) for seed, own in enumerate(made))
    return [first.transpose(1, 2), *others]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("heads", "width"), [(4, 16), (3, 24), (1, 130), (5, 4098)])
@pytest.mark.parametrize("text", [ROPE, ROPE_BACKWARD, PARTIAL], ids=["forward", "backward", "part"])
def test_heads_turn_where_they_lie(text: str, heads: int, width: int, dtype: str, interpreted: None) -> None:
    check_kernel(turned(heads, width, getattr(torch, dtype)), text.format(dtype=dtype, half=width // 2, width=width))


def test_dimensions_that_lie_one_in_another_are_one() -> None:
    assert _collapsed([4, 3, 5], [[15, 5, 1], [15, 5, 1]]) == ((60,), [(1,), (1,)])
    assert _collapsed([4, 3, 5], [[15, 5, 1], [0, 5, 1]]) == ((4, 15), [(15, 1), (0, 1)])
    assert _collapsed([4, 3, 5], [[15, 5, 1], [5, 0, 1]]) == ((4, 3, 5), [(15, 5, 1), (5, 0, 1)])
    assert _collapsed([4, 3], [[0, 0], [3, 1]]) == ((12,), [(0,), (1,)])


@pytest.mark.parametrize("size", [1e-23, 1e-10, 1.0, 1e18])
def test_a_sum_is_exact_whatever_the_order(size: float, interpreted: None) -> None:
    rows = random(torch.empty(1, 5, 600), 1) * size
    text = "v0: float32 = sum(x0); return v0"
    (found,) = device.rowwise([rows], Program.parse(text), text)
    (turned,) = device.rowwise([rows.flip(-1).contiguous()], Program.parse(text), text)
    assert torch.equal(found, turned)
    exact = rows.double().sum(-1, True)
    assert float(((found - exact).abs() / rows.double().abs().amax(-1, True)).max()) < 2**-22


def test_what_is_not_finite_stays_in_its_row(interpreted: None) -> None:
    rows = torch.ones(1, 4, 8)
    rows[0, 1, 3], rows[0, 2, 0] = float("inf"), float("nan")
    text = "v0: float32 = sum(x0); return v0"
    (found,) = device.rowwise([rows], Program.parse(text), text)
    assert found[0, :, 0].isfinite().tolist() == [True, False, False, True]


def graph_of(build: Any, *shapes: tuple[int, ...]) -> fx.GraphModule:
    """The graph that a function makes of tensors of these shapes, as calls of torch's operators."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(build, tracing_mode="fake")(*(torch.zeros(shape) for shape in shapes))
    output = gm.graph.output_node()
    output.args = (tuple(output.args[0]),)
    return gm


ROWS, FEATURES, HEADS = 5, 8, 3
HALF = FEATURES // 2
UNARY = (aten.neg.default, aten.sigmoid.default, aten.silu.default)
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)


CALLS = ("unary", "binary", "binary", "sum", "expand", "cast", "product", "write", "slice", "cat", "pad")


@st.composite
def graphs(draw: st.DrawFn, unary: Sequence[Any] = UNARY, chosen: Sequence[str] = CALLS) -> fx.Graph:
    """Calls of any order: of rows, their halves, single values of rows, of columns, products between them, and writes to what they
    made; of rows one after another, or those of heads that lie turned in memory.
    """
    graph = fx.Graph()
    turned = draw(st.booleans())
    lead: tuple[int, ...] = (1, HEADS, ROWS) if turned else (1, ROWS)
    full, row, column = (*lead, FEATURES), (*lead, 1), (FEATURES,)
    shapes = (full, full, row, column, (*(1 for _ in lead[:-1]), ROWS, FEATURES))
    values = [graph.placeholder(f"x{index}") for index in range(len(shapes))]
    for node, shape in zip(values, shapes, strict=True):
        heads = turned and shape == full
        node.meta["val"] = torch.empty(1, ROWS, HEADS, FEATURES).transpose(1, 2) if heads else torch.empty(shape)
    weight = graph.placeholder("w")
    weight.meta["val"] = torch.empty(FEATURES, FEATURES)
    for _ in range(draw(st.integers(1, 14))):
        of = draw(st.sampled_from([node for node in values if node.meta["val"].shape[:-1] == lead]))
        other: Any = draw(st.one_of(st.sampled_from(values), st.sampled_from([2, 0.5, -1])))
        width = of.meta["val"].shape[-1]
        wide = width == FEATURES
        what = draw(st.sampled_from(chosen))
        if what == "unary":
            node = graph.call_function(draw(st.sampled_from(unary)), (of,))
        elif what == "binary" and len({width, other.meta["val"].shape[-1] if isinstance(other, fx.Node) else 1} - {1}) < 2:
            node = graph.call_function(draw(st.sampled_from(BINARY)), (of, other))
        elif what == "cast":
            node = graph.call_function(
                aten._to_copy.default, (of,), {"dtype": draw(st.sampled_from([torch.float32, torch.bfloat16]))}
            )
        elif what == "expand" and width == 1:
            node = graph.call_function(aten.expand.default, (of, list(full)))
        elif what == "sum" and width > 1:
            node = graph.call_function(draw(st.sampled_from([aten.mean.dim, aten.sum.dim_IntList])), (of, [-1], True))
        elif what == "product" and wide:
            cast = graph.call_function(aten._to_copy.default, (of,), {"dtype": torch.float32})
            cast.meta["val"] = torch.empty(full)
            node = graph.call_function(aten.matmul.default, (cast, weight))
        elif what == "slice" and wide:
            start = draw(st.integers(0, HALF))
            node = graph.call_function(aten.slice.Tensor, (of, len(lead), start, start + HALF))
        elif what == "cat" and width == HALF:
            alike = [own for own in values if own.meta["val"].shape == of.meta["val"].shape]
            node = graph.call_function(aten.cat.default, ([of, draw(st.sampled_from(alike))], -1))
        elif what == "pad" and width == HALF:
            start = draw(st.integers(0, HALF))
            node = graph.call_function(aten.slice_backward.default, (of, list(full), len(lead), start, start + HALF, 1))
        elif what == "write" and wide and of.target not in (aten.expand.default, aten.slice.Tensor) and of.op == "call_function":
            node = graph.call_function(aten.mul_.Tensor, (of, 0.5))
            node.meta["val"] = None
            continue
        else:
            continue
        node.meta["val"] = node.target(*fx.map_arg(node.args, lambda arg: arg.meta["val"]), **node.kwargs)
        values.append(node)
    returned = draw(st.lists(st.sampled_from(values[len(shapes) :] or values), min_size=1, max_size=4))
    if returned[-1].meta["val"].dim() == 4 and draw(st.booleans()):  # as what follows attention's gradients wants them
        last = returned[-1]
        for target, kwargs in ((aten.transpose.int, {}), (aten.clone.default, {"memory_format": torch.contiguous_format})):
            node = graph.call_function(target, (last, 1, 2) if target is aten.transpose.int else (last,), kwargs)
            node.meta["val"] = node.target(*fx.map_arg(node.args, lambda arg: arg.meta["val"]), **node.kwargs)
            last = node
        returned[-1] = last
    graph.output(tuple(returned))
    return graph


@given(graphs(), st.integers(0, 3))
def test_any_graph_keeps_its_bits(graph: fx.Graph, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    given = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    tensors = [torch.empty_like(own).copy_(torch.randn(own.shape, generator=generator)) for own in given]
    plain, joined = (fx.GraphModule(torch.nn.Module(), copied(graph)) for _ in range(2))
    rowwise(joined, set())
    expected, found = (gm(*(own.clone() for own in tensors)) for gm in (plain, joined))
    for node, mine, theirs in zip(joined.graph.output_node().args[0], found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert mine.stride() == node.meta["val"].stride()
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    left = [node for node in joined.graph.nodes if node.target in UNARY and node.meta["val"].shape[-1] == FEATURES]
    assert not left, f"a row's call stands alone: {joined.graph} {graph}"


EXACT = ("unary", "binary", "expand", "product", "slice", "cat", "pad")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graphs(unary=UNARY[:1], chosen=EXACT))
def test_the_kernels_of_any_graph_have_the_bits_of_its_calls(interpreted: None, graph: fx.Graph) -> None:
    """Of calls that a CPU rounds as a device does."""
    joined = fx.GraphModule(torch.nn.Module(), copied(graph))
    rowwise(joined, set())
    for node in calls(joined):
        tensors = [random(own.meta["val"], seed) for seed, own in enumerate(node.args[0])]
        program = Program.parse(node.args[1])
        for mine, exact in zip(device.rowwise(tensors, program, str(program)), program.run(tensors), strict=True):
            assert (mine.shape, mine.stride()) == (exact.shape, exact.stride())
            assert torch.equal(mine, exact), f"{program}: {(mine - exact).abs().max()}"


def copied(graph: fx.Graph) -> fx.Graph:
    other = fx.Graph()
    other.output(other.graph_copy(graph, {}))
    return other


def test_what_would_wait_for_itself_is_two_stretches() -> None:
    """The product is between two calls that would otherwise be one."""

    def build(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return y + torch.mm(y[0], w)[None], y.sum(-1, True)

    gm = graph_of(build, (1, 6, 6), (6, 6))
    given = torch.randn(1, 6, 6), torch.randn(6, 6)
    expected = gm(*given)
    rowwise(gm, set())
    assert len(calls(gm)) == 2
    assert all(torch.equal(a, b) for a, b in zip(gm(*given), expected, strict=True))


def test_what_writes_to_memory_stays_between_those_that_read_it() -> None:
    """As a backward has it: an operator that writes to its argument, and readers of that before and behind."""
    x = torch.randn(1, 4, 8)
    gm = torch.fx.GraphModule(torch.nn.Module(), written())
    expected = (x * 2 + 1, (x * 2 + 5) * 3)
    rowwise(gm, set())
    assert all(torch.equal(a, b) for a, b in zip(gm(x), expected, strict=True))


def written() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.mul.Tensor, (x, 2))
    before = graph.call_function(aten.add.Tensor, (made, 1))
    graph.call_function(aten.add_.Tensor, (made, 5))
    after = graph.call_function(aten.mul.Tensor, (made, 3))
    graph.output((before, after))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(1, 4, 8)
    return graph


@pytest.mark.parametrize("changed", ["nothing", "the copy", "the result"])
def test_a_turned_result_is_copied_only_where_one_of_the_two_is_written_to(changed: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.mul.Tensor, (x, 2))
    turned = graph.call_function(aten.transpose.int, (made, 1, 2))
    copy = graph.call_function(aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
    flat = graph.call_function(aten.view.default, (copy, [4, 24]))
    if changed != "nothing":
        graph.call_function(aten.add_.Tensor, (flat if changed == "the copy" else made, 5))
    graph.output((made, flat))
    given = torch.randn(1, 4, 3, 8).transpose(1, 2)
    for node, value in zip(
        graph.nodes, (given, given * 2, given.transpose(1, 2), given.transpose(1, 2), given.reshape(4, 24)), strict=False
    ):
        node.meta["val"] = torch.empty_like(value)
    copy.meta["val"], flat.meta["val"] = torch.empty(1, 4, 3, 8), torch.empty(4, 24)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    expected = [own.clone() for own in gm(given)]
    rowwise(gm, set())
    assert len(calls(gm)) == 1
    assert any(node.target is aten.clone.default for node in gm.graph.nodes) == (changed != "nothing")
    assert all(torch.equal(a, b) for a, b in zip(gm(given), expected, strict=True))


@pytest.mark.parametrize("text", ["v0: float32 = sum(x0)", "v0 = sum(x0); return v0", "v0: float32 = cumsum(x0); return v0", ""])
def test_a_text_that_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="program"):
        Program.parse(text)
