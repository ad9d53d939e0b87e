"""What is emitted is text, what runs is the text, and it computes what the graph computes."""

from __future__ import annotations

import functools
import gc
import math
import operator
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from codegen import emit, lower
from codegen.spec import Body, Template, flops
from passes.differentiate import differentiate
from passes.partition import partition
from runtime.region import load_source
from tests.backbones import Plain, arguments, chunk_of, fused, lora, made, normal, resolved, run_bodies, state_of
from tests.golden import check_golden

aten = torch.ops.aten


def graph_of(outputs: int = 2) -> fx.GraphModule:
    """Arithmetic with every kind of constant: numbers, infinities, lists, dtypes, devices, memory formats."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    clamped = graph.call_function(aten.clamp.default, (x, -math.inf, 0.5))
    total = graph.call_function(aten.sum.dim_IntList, (clamped, [-1], True))
    made = graph.call_function(
        aten.full.default, ([3], 2.0), {"dtype": torch.float32, "device": torch.device("cpu"), "pin_memory": False}
    )
    filled = graph.call_function(aten.masked_fill.Scalar, (y, graph.call_function(aten.gt.Scalar, (y, 1.0)), math.nan))
    copied = graph.call_function(aten.clone.default, (filled,), {"memory_format": torch.contiguous_format})
    split = graph.call_function(aten.split.Tensor, (copied, 1))
    piece = graph.call_function(operator.getitem, (split, 1))
    scaled = graph.call_function(aten.mul.Tensor, (total, made))
    graph.output((scaled, piece)[:outputs])
    return fx.GraphModule({}, graph)


def run(source: str, args: list[Any]) -> tuple[Any, ...]:
    return load_source(source, "<test>")["call"](args)


def test_eager_source_computes_what_the_graph_computes() -> None:
    gm = graph_of()
    x, y = torch.randn(2, 4), torch.randn(2, 3)
    expected = gm(x, y)
    found = run(emit.eager_source(gm, "a test"), [x, y])
    assert isinstance(found, tuple)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))


def test_a_single_result_is_a_tuple_too() -> None:
    gm = graph_of(outputs=1)
    args = [torch.randn(2, 4), torch.randn(2, 3)]
    expected = gm(*args)[0]
    (found,) = run(emit.eager_source(gm, "a test"), args)
    assert torch.equal(found, expected)


def test_the_list_of_arguments_is_emptied_so_that_the_caller_holds_nothing() -> None:
    args = [torch.randn(2, 4), torch.randn(2, 3)]
    run(emit.eager_source(graph_of(), "a test"), args)
    assert args == []


def test_a_graph_without_inputs_takes_an_empty_list() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(aten.ones.default, ([2],)),))
    (found,) = run(emit.eager_source(fx.GraphModule({}, graph), "a test"), [])
    assert torch.equal(found, torch.ones(2))


def test_a_graph_of_one_input_takes_a_list_of_one() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(aten.neg.default, (graph.placeholder("x"),)),))
    (found,) = run(emit.eager_source(fx.GraphModule({}, graph), "a test"), [torch.ones(2)])
    assert torch.equal(found, -torch.ones(2))


def test_a_graph_that_returns_nothing_returns_an_empty_tuple() -> None:
    graph = fx.Graph()
    graph.call_function(aten.add_.Tensor, (graph.placeholder("x"), 1))
    graph.output(())
    x = torch.zeros(2)
    assert run(emit.eager_source(fx.GraphModule({}, graph), "a test"), [x]) == ()
    assert torch.equal(x, torch.ones(2)), "what is written in place stays"


def test_an_intermediate_is_dropped_after_its_last_use() -> None:
    source = emit.eager_source(graph_of(), "a test")
    code = source.partition("def call(args):")[2]
    assigned = set(re.findall(r"^\s+(\w+) = torch", code, re.MULTILINE))
    returned = re.search(r"return \((.*)\)", code)
    assert returned is not None
    kept = {name.strip() for name in returned[1].split(",")}
    dropped = set(re.findall(r"(\w+) = (?=(?:\w+ = )*None)", code))
    assert assigned - kept <= dropped
    assert {"x", "y"} <= dropped


def test_an_input_is_freed_while_the_region_still_runs() -> None:
    freed: list[bool] = []
    graph = fx.Graph()
    x = graph.placeholder("x")
    doubled = graph.call_function(aten.mul.Tensor, (x, 2))
    graph.output((graph.call_function(aten.add.Tensor, (doubled, 1)),))
    source = emit.eager_source(fx.GraphModule({}, graph), "a test")
    namespace = load_source(source, "<freed>")
    tensor = torch.ones(3)
    watch = weakref.ref(tensor)

    class Watching:
        """torch, with an eye on the input at the addition."""

        class ops:
            class aten:
                mul = aten.mul

                class add:
                    @staticmethod
                    def Tensor(*args: Any, **kwargs: Any) -> Tensor:
                        gc.collect()
                        freed.append(watch() is None)
                        return aten.add.Tensor(*args, **kwargs)

    namespace["torch"] = Watching
    args = [tensor]
    del tensor
    (found,) = namespace["call"](args)
    assert torch.equal(found, torch.full((3,), 3.0))
    assert freed == [True]


def test_the_title_says_what_the_text_is() -> None:
    source = emit.eager_source(graph_of(), "model.layers.0.forward")
    assert source.startswith('"""model.layers.0.forward"""\n')
    assert load_source(source, "<test>")["__doc__"] == "model.layers.0.forward"


# --- templates --------------------------------------------------------------------------------------------------------


class Case:
    """The one region of a plain backbone, differentiated for one lowering."""

    def __init__(self, lowering: str) -> None:
        model = made(Plain)
        graph = fused(normal(model), resolved(model, {"alice": lora("q", "v"), "bob": lora("q")}))
        (self.body,), _ = partition(graph)
        self.template: Template = differentiate("plain", self.body, decompositions=emit.decompositions(lowering))
        self.state, self.chunk = state_of(graph), chunk_of({"alice": [13, 7], "bob": [20]})
        values = run_bodies([self.body], graph.weights, self.state, self.chunk)
        self.inputs = arguments(self.body, values, graph.weights, self.state, self.chunk)

    def run(self, forward: str, backward: str) -> tuple[Tensor, dict[int, Tensor]]:
        """The region's output and its table gradients, by its sources."""
        spec, body = self.template.spec, self.body
        results = run(forward, list(self.inputs))
        output, saved = results[0], results[spec.outputs :]
        grads = {index: torch.zeros(self.inputs[index].shape) for index, trainable in enumerate(body.trainable) if trainable}
        tangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        found: dict[str, Any] = {"input": self.inputs, "saved": saved, "tangent": [tangent], "grad": grads}
        assert spec.backward is not None
        run(backward, [found[kind][int(index)] for kind, _, index in (reference.partition(":") for reference in spec.backward)])
        return output, grads


@functools.cache
def case_of(lowering: str) -> Case:
    return Case(lowering)


def eager_sources() -> tuple[str, str]:
    template = case_of("eager").template
    assert template.backward is not None
    return emit.eager_source(template.forward, "plain.forward"), emit.eager_source(template.backward, "plain.backward")


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the accepted text is what torch 2.13 traces")
@pytest.mark.parametrize("phase", [0, 1], ids=["forward", "backward"])
def test_the_text_of_a_template(phase: int) -> None:
    check_golden(f"plain.{('forward', 'backward')[phase]}", eager_sources()[phase])


def test_the_text_of_a_template_is_the_same_every_time() -> None:
    again = Case("eager").template
    assert again.backward is not None
    assert (
        emit.eager_source(again.forward, "plain.forward"),
        emit.eager_source(again.backward, "plain.backward"),
    ) == eager_sources()


def test_the_text_of_a_template_computes_what_its_body_computes() -> None:
    case = case_of("eager")
    body: Body = case.body
    output, grads = case.run(*eager_sources())
    leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip(case.inputs, body.wants_grad, strict=True)]
    (expected,) = body.gm(*leaves)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-6, atol=1e-6)
    tangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    exact = torch.autograd.grad(expected, [leaves[index] for index in grads], tangent)
    for mine, theirs in zip(grads.values(), exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def no_compiler() -> str:
    """Why torch finds no C++ compiler, or nothing."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch finds no C++ compiler"
    return ""


@pytest.mark.slow
def test_what_inductor_emits_computes_what_the_eager_text_computes() -> None:
    if reason := no_compiler():
        pytest.skip(reason)
    case = case_of("inductor")
    assert case.template.backward is not None
    sources = (
        emit.inductor_source(case.template.forward, "plain.forward"),
        emit.inductor_source(case.template.backward, "plain.backward"),
    )
    assert all(source.startswith('"""plain.') for source in sources)
    output, grads = case.run(*sources)
    expected, exact = case_of("eager").run(*eager_sources())
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    assert list(grads) == list(exact)
    for mine, theirs in zip(grads.values(), exact.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * max(1.0, float(theirs.abs().max())))


# --- the choice of a lowering, and what a graph costs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "device", "invariant", "form"),
    [
        ("auto", "cpu", True, "eager"),
        ("auto", "cuda", True, "eager"),
        ("auto", "cuda", False, "inductor"),
        ("eager", "cuda", False, "eager"),
        ("inductor", "cpu", True, "inductor"),
    ],
)
def test_a_lowering_is_chosen_with_its_reason(asked: str, device: str, invariant: bool, form: str) -> None:
    lowering = lower.choose(asked, torch.device(device), invariant=invariant)
    assert lowering.form == form
    assert lowering.reason


def test_the_flops_of_a_graph_are_those_of_its_products() -> None:
    case = case_of("eager")
    linear = 4 * 2 * 64 * 16 * 16  # q, k, v, o
    low_rank = 2 * 64 * (16 * 2 * 8 + 8 * 16 + 8 * 16)  # alice's q+v down, two ups; a row that is hers is not bob's as well
    attention = 2 * 64 * 64 * 2 * 8
    assert flops(case.template.forward) == linear + low_rank + attention
    assert case.template.backward is not None
    assert flops(case.template.backward) > 0


def test_a_value_is_described_by_dtype_shape_and_device() -> None:
    assert emit.describe(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bfloat16[2, 3] cpu"
