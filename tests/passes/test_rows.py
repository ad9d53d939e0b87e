"""check_rows lets through what works on each token alone, and refuses by module and operator what may mix tokens.

Every function here takes x [1, T, H] and parameters of every shape one may want; T is 12, H is 8, so that no size is two things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import codegen.ops  # noqa: F401  (registers the operators)
from passes.graph import MuxGraph, Source
from passes.rows import check_rows

T, H = 12, 8
Function = Callable[[Tensor, "Parameters"], Tensor]


class Parameters(nn.Module):
    """Weights by shape: `hh` is [H, H], `th` [T, H] (a row for each token of the chunk), `ehh` [3, H, H]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {
            "h": (H,), "t": (T,), "hh": (H, H), "th": (T, H), "tt": (T, T),
            "ehh": (3, H, H), "thh": (T, H, H), "one": (1,), "eth": (3, T, H),
        }.items():  # fmt: skip
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.conv = nn.Conv1d(H, H, 3, padding=1)
        self.norm = nn.BatchNorm1d(H)


class Rows(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, H, generator=torch.Generator().manual_seed(1)))
        self.inner = Parameters()
        self.function = function

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.function(F.embedding(input_ids, self.table), self.inner)


def graph_of(function: Function) -> MuxGraph:
    model = Rows(function).eval()
    with torch.no_grad():
        exported = torch.export.export(model, (torch.zeros(1, T, dtype=torch.long),), strict=False)
    gm = exported.graph_module
    inputs: dict[Source, fx.Node] = {}
    for spec, node in zip(exported.graph_signature.input_specs, gm.graph.find_nodes(op="placeholder"), strict=True):
        inputs[Source("chunk", "input_ids") if spec.kind.name == "USER_INPUT" else Source("weight", str(spec.target))] = node
    output = gm.graph.output_node()
    output.args = ((output.args[0][0],),)
    for node in gm.graph.nodes:
        node.meta["mux_module"] = "inner"
    return MuxGraph(gm, inputs, T, 4, {})


KEPT: dict[str, Function] = {
    "arithmetic": lambda x, p: F.silu(x) * x / (x.abs() + 1) - p.h,
    "a scalar parameter": lambda x, p: x * p.one,
    "comparison and choice": lambda x, p: torch.where(x > p.h, x, 0.5 * x).masked_fill(x < -1, 0.0),
    "clamping": lambda x, p: x.clamp(min=-1).clamp_max(1.0),
    "casts": lambda x, p: x.to(torch.float64).float().contiguous().clone(),
    "constants of its own shape": lambda x, p: x + torch.ones_like(x) * torch.zeros_like(x),
    "gelu and relu": lambda x, p: F.gelu(x, approximate="tanh") + F.relu(x) + torch.tanh(x),
    "prelu of one slope": lambda x, p: F.prelu(x, p.one),
    "prelu of a slope a feature": lambda x, p: F.prelu(x[0], p.h)[None],
    "mean of features": lambda x, p: x - x.mean(-1, keepdim=True),
    "root mean square": lambda x, p: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * p.h,
    "variance and maximum": lambda x, p: x / x.var(-1, keepdim=True) + x.amax(2, keepdim=True),
    "norm of features": lambda x, p: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "a sum that drops its dimension": lambda x, p: x * x.sum(2).unsqueeze(-1),
    "a sum over the batch dimension": lambda x, p: x.sum(0)[None],
    "a sum over two dimensions behind the tokens": lambda x, p: x.view(1, T, 2, 4).sum((2, 3), keepdim=True).view(1, T, 1) + x,
    "softmax of features": lambda x, p: x.softmax(-1) + F.log_softmax(x, 2),
    "heads and back": lambda x, p: x.view(1, T, 2, 4).transpose(1, 2).transpose(1, 2).reshape(1, T, H),
    "permuted and back": lambda x, p: x.permute(2, 0, 1).permute(1, 2, 0),
    "transposed from behind": lambda x, p: x.transpose(-1, -2).transpose(2, 1),
    "rows alone": lambda x, p: x.squeeze(0).unsqueeze(0),
    "squeezed of all": lambda x, p: x.squeeze()[None],
    "squeezed behind": lambda x, p: x.unsqueeze(-1).squeeze(-1),
    "flattened behind": lambda x, p: x.view(1, T, 2, 4).flatten(2),
    "expanded": lambda x, p: x[:, :, None].expand(1, T, 3, H).sum(2),
    "expanded in front": lambda x, p: x.expand(5, 1, T, H)[2],
    "halves of the features": lambda x, p: torch.cat([-x[..., 4:], x[..., :4]], -1),
    "chunks of the features": lambda x, p: torch.cat([part * 2 for part in x.chunk(2, -1)], dim=2),
    "pieces of given sizes": lambda x, p: x.split([2, 6], -1)[1].repeat_interleave(4, 2)[..., :H],
    "stacked in front": lambda x, p: torch.stack([x, 2 * x]).sum(0),
    "stacked behind": lambda x, p: torch.stack([x, 2 * x], -1).flatten(-2)[..., ::2],
    "one feature": lambda x, p: x * x.select(-1, 3)[..., None],
    "linear": lambda x, p: F.linear(x, p.hh, p.h),
    "a matrix product": lambda x, p: x @ p.hh,
    "a product from the left": lambda x, p: (p.hh @ x.transpose(1, 2)).transpose(1, 2),
    "a product of rows": lambda x, p: torch.mm(x[0], p.hh)[None],
    "a product with an addend for all rows": lambda x, p: torch.addmm(p.h, x[0], p.hh)[None],
    "experts side by side": lambda x, p: torch.bmm(x.expand(3, T, H), p.ehh).sum(0)[None],
    "experts by broadcast": lambda x, p: torch.matmul(x[:, None], p.ehh).sum(1),
    "layer norm": lambda x, p: F.layer_norm(x, (H,), p.h, p.h),
    "rms norm": lambda x, p: F.rms_norm(x, (H,), p.h),
    "features repeated": lambda x, p: x.repeat_interleave(2, -1)[..., :H],
    "dropout in evaluation": lambda x, p: F.dropout(x, 0.5, training=False),
}  # fmt: skip

REFUSED: dict[str, tuple[Function, str]] = {
    "a mean over tokens": (lambda x, p: x - x.mean(1, keepdim=True), "mean works along the tokens"),
    "a mean over tokens from behind": (lambda x, p: x - x.mean(-2, keepdim=True), "mean works along the tokens"),
    "a sum over everything": (lambda x, p: x * x.sum(), "sum reduces over all tokens"),
    "a norm over everything": (lambda x, p: x / torch.linalg.vector_norm(x), "reduces over all tokens"),
    "an old norm over everything": (lambda x, p: x / x.norm(), "norm"),
    "a mean over two dimensions": (lambda x, p: x - x.mean((1, 2), keepdim=True), "mean works along the tokens"),
    "a maximum over tokens": (lambda x, p: x - x.amax(1, keepdim=True), "amax works along the tokens"),
    "softmax over tokens": (lambda x, p: x.softmax(1), "softmax works along the tokens"),
    "a running sum": (lambda x, p: x.cumsum(1), "cumsum is not known"),
    "rolled rows": (lambda x, p: x.roll(1, 1), "roll is not known"),
    "flipped rows": (lambda x, p: x.flip(1), "flip is not known"),
    "every other row": (lambda x, p: torch.cat([x[:, ::2], x[:, ::2]], 1), "slice takes some rows"),
    "rows shifted by one": (lambda x, p: F.pad(x[:, :-1], (0, 0, 1, 0)), "slice takes some rows"),
    "one row for all": (lambda x, p: x + x[:, :1], "slice takes some rows"),
    "one row selected": (lambda x, p: x + x.select(1, 0), "select works along the tokens"),
    "rows by index": (lambda x, p: x[:, torch.tensor([*range(1, T), 0])], "index"),
    "sorted rows": (lambda x, p: x.sort(1).values, "sort is not known"),
    "the best rows": (lambda x, p: torch.cat([x.topk(6, 1).values] * 2, 1), "topk is not known"),
    "attention by hand": (lambda x, p: (x @ x.transpose(1, 2)).softmax(-1) @ x, "multiplies tokens with tokens"),
    "a mixing matrix": (lambda x, p: p.tt @ x, "contracts over the tokens"),
    "a contraction over tokens": (lambda x, p: (x.transpose(1, 2) @ p.tt).transpose(1, 2), "contracts over the tokens"),
    "a table of positions": (lambda x, p: x + p.th, "add meets a value that differs by row"),
    "a table of positions in front": (lambda x, p: p.th * x, "mul meets a value that differs by row"),
    "a choice by row": (lambda x, p: torch.where(p.th > 0, x, -x), "where meets a value that differs by row"),
    "a counted position": (lambda x, p: x + torch.arange(T)[None, :, None], "differs by row"),
    "a matrix for each row": (lambda x, p: torch.bmm(x[0][:, None], p.thh)[:, 0][None], "differs by row"),
    "a matrix for each row by broadcast": (lambda x, p: torch.matmul(x[0][:, None], p.thh)[:, 0][None], "differs by row"),
    "an addend for each row": (lambda x, p: torch.addmm(p.th, x[0], p.hh)[None], "differs by row"),
    "an addend for each row, batched": (lambda x, p: torch.baddbmm(p.eth, x.expand(3, T, H), p.ehh).sum(0)[None], "differs by row"),
    "a slope for each row": (lambda x, p: F.prelu(x, p.t), "differs by row"),
    "a norm over tokens and features": (lambda x, p: F.layer_norm(x, (T, H)), "works along the tokens"),
    "a batch norm": (lambda x, p: p.norm(x.transpose(1, 2)).transpose(1, 2), "batch_norm is not known"),
    "a convolution": (lambda x, p: p.conv(x.transpose(1, 2)).transpose(1, 2), "conv1d is not known"),
    "a reshape across tokens": (lambda x, p: x.reshape(1, H, T).transpose(1, 2), "reshape"),
    "tokens and features merged": (lambda x, p: x.reshape(1, T * H).view(1, T, H), "across tokens"),
    "transposed, then reshaped": (lambda x, p: x.transpose(1, 2).reshape(1, T, H), "across tokens"),
    "rows repeated": (lambda x, p: x.repeat_interleave(2, 1)[:, :T], "repeat_interleave works along the tokens"),
    "rows tiled": (lambda x, p: x.repeat(1, 2, 1)[:, :T], "repeat is not known"),
    "rows joined": (lambda x, p: torch.cat([x, x], 1)[:, :T], "cat joins rows"),
    "tokens beside a constant": (lambda x, p: torch.cat([x, p.th[None]], -1)[..., :H], "cat joins rows"),
    "rows in two halves": (lambda x, p: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk works along the tokens"),
    "rows meeting columns": (lambda x, p: x[0][:, None] + x[0][None, :], "different dimensions"),
    "an outer product of tokens": (lambda x, p: (x[0][:, None] * x[0][None]).sum(1)[None], "different dimensions"),
    "a lookup of rows": (lambda x, p: F.embedding(torch.zeros(1, T, dtype=torch.long), x[0]), "looks rows of tokens up"),
    "triangles": (lambda x, p: x.triu(), "triu is not known"),
    "noise": (lambda x, p: x * torch.rand_like(x), "rand_like is not known"),
    "dropout that is on": (lambda x, p: F.dropout(x, 0.5, training=True), "dropout"),
    "an addition in place": (lambda x, p: x.add_(1), "add_ is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_works_on_each_token_alone_is_let_through(name: str) -> None:
    function = KEPT[name]
    check_rows(graph_of(function))
    # The list is honest: another row changes nothing.
    parameters = Parameters()
    with torch.no_grad():
        x = torch.randn(1, T, H, generator=torch.Generator().manual_seed(2))
        before = function(x.clone(), parameters)
        x[:, 5] = 7.0
        after = function(x.clone(), parameters)
    assert before.shape == (1, T, before.shape[2])
    others = [row for row in range(T) if row != 5]
    torch.testing.assert_close(before[:, others], after[:, others], rtol=1e-6, atol=1e-6)


def attended(x: Tensor, p: Any) -> Tensor:
    q, borders = x[0].view(T, 2, 4), torch.tensor([0, 5, T], dtype=torch.int32)
    return torch.ops.mux.attention(q, q, q, borders, torch.tensor([7, 2], dtype=torch.int32), 0.5, 0)[0].flatten(1)[None]


def prefixed(x: Tensor, p: Any) -> Tensor:
    q, borders, route = x[0].view(T, 1, H), torch.tensor([0, 6, T], dtype=torch.int32), torch.tensor([2, -1], dtype=torch.int32)
    rest = ([torch.tensor([3.0, 8.0, 1.0])], [route], borders, torch.tensor([6, 2], dtype=torch.int32), 0.5, 0)
    return torch.ops.mux.prefixed_attention(q, q, q, [p.ehh], *rest)[0].flatten(1)[None]


@pytest.mark.parametrize("function", [attended, prefixed])
def test_attention_gives_every_token_its_row(function: Function) -> None:
    check_rows(graph_of(function))
    with pytest.raises(ValueError, match="cumsum is not known"):
        check_rows(graph_of(lambda x, p: function(x, p).cumsum(1)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_mix_tokens_is_refused_by_module_and_operator(name: str) -> None:
    function, reason = REFUSED[name]
    graph = graph_of(function)
    with pytest.raises(ValueError, match=r"^backbone: cannot capture module 'inner': ") as caught:
        check_rows(graph)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, p: x.transpose(1, 2), id="features in front"),
        pytest.param(lambda x, p: x[0], id="no batch dimension"),
        pytest.param(lambda x, p: p.th[None] * 2, id="no token at all"),
    ],
)
def test_logits_that_are_not_one_row_a_token_are_refused(function: Function) -> None:
    with pytest.raises(ValueError, match=r"^backbone: its logits do not have one row per token"):
        check_rows(graph_of(function))


def test_values_without_tokens_may_do_as_they_please() -> None:
    def function(x: Tensor, p: Any) -> Tensor:
        weight = (p.tt.cumsum(0) @ p.th).mean(0).flip(0)  # [H]
        return x * weight

    check_rows(graph_of(function))
