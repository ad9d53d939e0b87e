"""normalise gives every operator one spelling and takes out what does nothing; results keep their bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.graph import LINEAR, check, module_of
from passes.normalise import normalise
from tests.backbones import WIDTH, Plain, captured, chunk_of, logits_of, made

aten = torch.ops.aten


def targets(graph: object) -> list[object]:
    return [node.target for node in graph.gm.graph.nodes if node.op == "call_function"]  # type: ignore[attr-defined]


def body_of(function: Callable[[Tensor, nn.Module], Tensor]) -> Plain:
    """A plain model whose body is a module named `inner` that runs the function."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.bias = nn.Parameter(torch.randn(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return function(x, self)

    class Holding(Plain):
        def make(self) -> None:
            self.inner = Inner()

        def body(self, x: Tensor) -> Tensor:
            return self.inner(x)

    return made(Holding)


SPELLINGS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "linear": lambda x, m: F.linear(x, m.weight, m.bias),
    "matmul": lambda x, m: x @ m.weight,
    "mm": lambda x, m: torch.mm(x[0], m.weight)[None],
    "addmm": lambda x, m: torch.addmm(m.bias, x.view(-1, WIDTH), m.weight).view(x.shape),  # transformers' Conv1D
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_product_of_tokens_with_a_weight_becomes_a_linear_of_its_module(spelling: str) -> None:
    before = captured(body_of(SPELLINGS[spelling]))
    after = normalise(before.copy())
    check(after)
    assert after.level == "normal"
    (node,) = after.sites()["inner"]
    assert node.target is LINEAR
    assert module_of(node) == "inner"
    assert not {aten.mm.default, aten.matmul.default, aten.addmm.default} & set(targets(after))
    chunk = chunk_of({"a": [20, 9]})
    assert torch.equal(logits_of(before, None, chunk), logits_of(after, None, chunk))


IDLE: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "dropout in evaluation": lambda x, m: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x, m: F.dropout(x, 0.0, training=True),
    "a cast to its own dtype": lambda x, m: x.to(torch.float32).float(),
    "a cast to another's dtype": lambda x, m: x.type_as(m.bias),
    "a move to its own device": lambda x, m: x.to("cpu"),
    "a full slice": lambda x, m: x[:, :, :WIDTH],
    "an expansion to its own shape": lambda x, m: x.expand(1, -1, WIDTH),
    "a contiguous copy of what is contiguous": lambda x, m: x.contiguous(),
    "an alias": lambda x, m: torch.ops.aten.alias(x),
    "a detachment": lambda x, m: x.detach(),
    "a result that nobody reads": lambda x, m: (x * 2, x)[1],
}


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_is_taken_out(name: str) -> None:
    before, bare = captured(body_of(IDLE[name])), captured(made(Plain))
    after = normalise(before.copy())
    check(after)
    assert targets(after) == targets(normalise(bare.copy()))
    chunk = chunk_of({"a": [20, 9]})
    assert torch.equal(logits_of(before, None, chunk), logits_of(after, None, chunk))


KEPT: dict[str, tuple[Callable[[Tensor, nn.Module], Tensor], object]] = {
    "a cast that rounds": (lambda x, m: x.to(torch.bfloat16).float(), aten.to.dtype),
    "a part": (lambda x, m: torch.cat([x[..., 8:], x[..., :8]], -1), aten.slice.Tensor),
    "a product of two weights": (lambda x, m: x @ (m.weight @ m.weight), aten.matmul.default),
    "a scaled addend": (lambda x, m: torch.addmm(m.bias, x[0], m.weight, beta=0.5)[None], aten.addmm.default),
    "a scaled product": (lambda x, m: torch.addmm(m.bias, x[0], m.weight, alpha=2)[None], aten.addmm.default),
    "a copy in another order": (lambda x, m: x.transpose(1, 2).contiguous().transpose(1, 2), aten.contiguous.default),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_computes_something_is_left_alone(name: str) -> None:
    function, target = KEPT[name]
    before = captured(body_of(function))
    after = normalise(before.copy())
    check(after)
    assert target in targets(after)
    chunk = chunk_of({"a": [20, 9]})
    assert torch.equal(logits_of(before, None, chunk), logits_of(after, None, chunk))


def test_inputs_that_nobody_reads_any_more_are_dropped_with_what_computed_them() -> None:
    graph = normalise(captured(body_of(lambda x, m: (x @ m.weight, x)[1])).copy())
    assert not any(source.key.startswith("inner.") for source in graph.inputs)


def test_normalise_rewrites_its_own_copy_alone() -> None:
    before = captured(body_of(SPELLINGS["addmm"]))
    text = before.text()
    normalise(before.copy())
    assert before.text() == text


def test_normalising_twice_changes_nothing() -> None:
    once = normalise(captured(body_of(SPELLINGS["addmm"])).copy())
    assert normalise(once.copy()).text() == once.text()
