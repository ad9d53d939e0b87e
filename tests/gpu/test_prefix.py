"""mux::prefixed_attention natively: its rounding against torch's own attention, the same bits alone and beside others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codegen import reference_attention
from codegen.ops import PREFIX_GRAD_, PREFIXED_ATTENTION

pytestmark = pytest.mark.gpu

TILE, HEADS, GROUPS = 128, 8, 2
ROUTE = [1, 1, -1, 0, 2, 1, 1]
LENGTHS = [30, 17, 0]  # slot 2 has no live row
BORDERS = [0, 100, 256, 384, 512, 640, 700, 896]


def tensors(dtype: torch.dtype, size: int, rows: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """q, k, v and a table; lengths, route, borders, bounds; the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    def whole(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    tokens = TILE * len(ROUTE)
    learned = [normal(tokens, HEADS, size), normal(tokens, GROUPS, size), normal(tokens, GROUPS, size)]
    learned.append(normal(len(LENGTHS), 2 * GROUPS * rows, size))
    return (
        learned,
        [whole(LENGTHS), whole(ROUTE), whole(BORDERS), torch.tensor([256, len(BORDERS) - 1], dtype=torch.int32)],
        normal(tokens, HEADS, size),
    )


def results(op: object, learned: list[Tensor], rest: list[Tensor], grad: Tensor) -> list[Tensor]:
    lengths, route, borders, bounds = rest
    leaves = [x.clone().requires_grad_() for x in learned]
    *heads, table = leaves
    out, lse = op(*heads, [table], [lengths], [route], borders, bounds, 0.2, 0)  # type: ignore[operator]
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(("size", "rows"), [(64, 32), (128, 32), (80, 40), (128, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_those_of_the_reference(dtype: torch.dtype, size: int, rows: int) -> None:
    learned, rest, grad = tensors(dtype, size, rows)
    exact = results(reference_attention.prefixed_attention, [x.float() for x in learned], rest, grad.float())
    found = results(PREFIXED_ATTENTION, learned, rest, grad)
    assert not found[-1][2].any()
    # Flash attention's own error in dk is 0.44 of an eps: products of rounded weights, rounded.
    allowed = 1e-5 if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
    for name, mine, wanted in zip(("out", "lse", "dq", "dk", "dv", "dkv"), found, exact, strict=True):
        assert float((mine.float() - wanted).norm() / wanted.norm()) <= allowed, name


def test_runs_have_the_same_bits_and_a_task_alone_has_them_too() -> None:
    learned, rest, grad = tensors(torch.bfloat16, 128, 32)
    first, again = (results(PREFIXED_ATTENTION, learned, rest, grad) for _ in range(2))
    assert all(map(torch.equal, first, again))
    lengths, route, borders, bounds = rest
    own = (route == 1).repeat_interleave(TILE)
    noise = [torch.where(own[:, None, None], x, torch.randn_like(x)) for x in learned[:3]]
    table = learned[3].clone()
    table[0] = table[2] = torch.nan
    alone = results(PREFIXED_ATTENTION, [*noise, table], [lengths, torch.where(route == 1, route, -1), borders, bounds], grad)
    for index in (0, 2, 3, 4):
        assert torch.equal(alone[index][own], first[index][own])
    assert torch.equal(alone[1][:, own], first[1][:, own])
    assert torch.equal(alone[5][1], first[5][1])


def test_a_gradient_does_not_depend_on_the_chunks_that_its_blocks_lie_in() -> None:
    learned, (lengths, route, borders, bounds), grad = tensors(torch.bfloat16, 128, 32)
    *heads, table = learned
    out, lse = PREFIXED_ATTENTION(*heads, [table], [lengths], [route], borders, bounds, 0.2, 0)
    whole, parts = (torch.zeros(table.shape, device="cuda") for _ in range(2))
    args = grad, heads[0], out, lse, table, lengths
    PREFIX_GRAD_(whole, *args, route, 0.2, GROUPS)
    for first in (True, False):
        mine = torch.where((torch.arange(len(ROUTE), device="cuda") < 2) == first, route, -1)
        PREFIX_GRAD_(parts, *args, mine, 0.2, GROUPS)
    assert torch.equal(whole, parts)
