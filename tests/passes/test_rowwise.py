"""Joined rows are what torch's calls one by one make of them, to the bit, whatever the tasks cut them into."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LNTuningConfig, LoraConfig
from torch import Tensor, fx

import muxcompile
from codegen import device
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
    if spec.backward is None:
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
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def check_kernel(given: Sequence[Tensor], text: str) -> None:
    program = Program.parse(text)
    assert str(program) == text
    for mine, exact in zip(device.rowwise(given, program, text), program.run(given), strict=True):
        assert (mine.shape, mine.dtype) == (exact.shape, exact.dtype)
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


ROWS, FEATURES = 5, 8
UNARY = (aten.neg.default, aten.sigmoid.default, aten.silu.default)
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)


@st.composite
def graphs(draw: st.DrawFn) -> fx.Graph:
    """Calls of any order: of rows, of single values of rows, of columns, products between them, and writes to what they made."""
    graph = fx.Graph()
    full, row, column = (1, ROWS, FEATURES), (1, ROWS, 1), (FEATURES,)
    values = [graph.placeholder(f"x{index}") for index in range(4)]
    for node, shape in zip(values, (full, full, row, column), strict=True):
        node.meta["val"] = torch.empty(shape)
    weight = graph.placeholder("w")
    weight.meta["val"] = torch.empty(FEATURES, FEATURES)
    for _ in range(draw(st.integers(1, 14))):
        of = draw(st.sampled_from([node for node in values if node.meta["val"].dim() > 1]))
        other: Any = draw(st.one_of(st.sampled_from(values), st.sampled_from([2, 0.5, -1])))
        wide = of.meta["val"].shape == full
        what = draw(st.sampled_from(["unary", "binary", "binary", "sum", "expand", "cast", "product", "write"]))
        if what == "unary":
            node = graph.call_function(draw(st.sampled_from(UNARY)), (of,))
        elif what == "binary":
            node = graph.call_function(draw(st.sampled_from(BINARY)), (of, other))
        elif what == "cast":
            node = graph.call_function(
                aten._to_copy.default, (of,), {"dtype": draw(st.sampled_from([torch.float32, torch.bfloat16]))}
            )
        elif what == "expand" and not wide:
            node = graph.call_function(aten.expand.default, (of, list(full)))
        elif what == "sum" and wide:
            node = graph.call_function(draw(st.sampled_from([aten.mean.dim, aten.sum.dim_IntList])), (of, [-1], True))
        elif what == "product" and wide:
            cast = graph.call_function(aten._to_copy.default, (of,), {"dtype": torch.float32})
            cast.meta["val"] = torch.empty(full)
            node = graph.call_function(aten.matmul.default, (cast, weight))
        elif what == "write" and wide and of.target is not aten.expand.default and of.op == "call_function":
            node = graph.call_function(aten.mul_.Tensor, (of, 0.5))
            node.meta["val"] = None
            continue
        else:
            continue
        node.meta["val"] = node.target(*fx.map_arg(node.args, lambda arg: arg.meta["val"]), **node.kwargs)
        values.append(node)
    graph.output(tuple(draw(st.lists(st.sampled_from(values[4:] or values), min_size=1, max_size=4))))
    return graph


@given(graphs(), st.integers(0, 3))
def test_any_graph_keeps_its_bits(graph: fx.Graph, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [node.meta["val"].shape for node in graph.find_nodes(op="placeholder")]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    plain, joined = (fx.GraphModule(torch.nn.Module(), copied(graph)) for _ in range(2))
    rowwise(joined, set())
    expected, found = (gm(*(own.clone() for own in tensors)) for gm in (plain, joined))
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    left = [node for node in joined.graph.nodes if node.target in UNARY and node.meta["val"].shape[-1] == FEATURES]
    assert not left, "a row's call stands alone"


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


@pytest.mark.parametrize("text", ["v0: float32 = sum(x0)", "v0 = sum(x0); return v0", "v0: float32 = cumsum(x0); return v0", ""])
def test_a_text_that_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="program"):
        Program.parse(text)
