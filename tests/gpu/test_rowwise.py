"""Joined rows on the device: what torch computes, and the bits of the same values computed one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from codegen.ops import ROWWISE
from codegen.rowwise import Program, Result
from tests.passes.test_rowwise import NORM, PARTIAL, ROPE, ROPE_BACKWARD, turned

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SWIGLU = (
    "v0: {dtype} = silu(x0); v1: {dtype} = mul(v0, x1); v2: {dtype} = mul(x2, x1); v3: {dtype} = silu_backward(v2, x0); "
    "v4: {dtype} = mul(x2, v0); return v1, v3, v4"
)
BACKWARD = (
    "v0: {dtype} = mul(x0, x1); v1: float32 = to(v0); v2: float32 = to(x2); v3: float32 = mul(v1, v2); v4: float32 = mul(v1, x3); "
    "v5: float32 = sum(v3); v6: float32 = pow(x3, 3); v7: float32 = mul(v5, -0.5); v8: float32 = mul(v7, v6); "
    "v9: float32 = expand(v8, {features}); v10: float32 = div(v9, {features}); v11: float32 = mul(v2, 2.0); "
    "v12: float32 = mul(v10, v11); v13: float32 = add(v4, v12); v14: {dtype} = to(v13); v15: {dtype} = add(x4, v14); return v15"
)
SHAPES = {NORM: ("full", "column"), SWIGLU: ("full",) * 3, BACKWARD: ("full", "column", "full", "row", "full")}


def given(text: str, rows: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = {"full": (1, rows, features), "row": (1, rows, 1), "column": (features,)}
    made = [torch.randn(shapes[kind], device="cuda", generator=torch.Generator("cuda").manual_seed(3)) for kind in SHAPES[text]]
    return [own.abs() if kind == "row" else own.to(dtype) for own, kind in zip(made, SHAPES[text], strict=True)]


def one_at_a_time(tensors: Sequence[Tensor], program: Program) -> list[Tensor]:
    values = {f"x{index}": own for index, own in enumerate(tensors)}
    wide = max(tensors, key=lambda own: own.numel())
    for line in program.lines:
        names = list(dict.fromkeys(line.reads))
        if line.op == "expand":
            values[line.name] = values[names[0]].expand(wide.shape).contiguous()
            continue
        args = tuple(f"x{names.index(own)}" if isinstance(own, str) else own for own in line.args)
        alone = Program((type(line)("v0", line.dtype, line.op, args),), (Result("v0"),))
        (values[line.name],) = ROWWISE([values[own] for own in names], str(alone))
    return [values[own.name] for own in program.results]


@pytest.mark.parametrize("features", [4096, 14336, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", SHAPES, ids=["norm", "swiglu", "backward of a norm"])
def test_a_program_is_what_torch_computes_and_has_the_bits_of_its_lines(text: str, dtype: torch.dtype, features: int) -> None:
    text = next(own for own in SHAPES if own == text)
    tensors = given(text, 640, features, dtype)
    check(Program.parse(text.format(dtype=str(dtype).removeprefix("torch."), features=features)), tensors)


@pytest.mark.parametrize(("heads", "width"), [(32, 128), (8, 64), (3, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", [ROPE, ROPE_BACKWARD, PARTIAL], ids=["forward", "backward", "part"])
def test_heads_that_turn_are_what_torch_computes(text: str, dtype: torch.dtype, heads: int, width: int) -> None:
    name = str(dtype).removeprefix("torch.")
    check(Program.parse(text.format(dtype=name, half=width // 2, width=width)), turned(heads, width, dtype, "cuda"))


def check(program: Program, tensors: Sequence[Tensor]) -> None:
    """Its values against torch's, and to the bit against its lines one at a time."""
    found = ROWWISE(tensors, str(program))
    for mine, alone in zip(found, one_at_a_time(tensors, program), strict=True):
        assert torch.equal(mine, alone.reshape(mine.shape))
    exact = program.run([own.double() if own.dtype == torch.float32 else own for own in tensors])
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        size = {torch.float32: 4e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}[mine.dtype]
        scale = theirs.double().abs().clamp(min=float(theirs.double().abs().mean()))
        assert float(((mine.double() - theirs.double()).abs() / scale).max()) <= size


def test_what_is_not_finite_stays_in_its_row() -> None:
    rows = torch.ones(1, 4, 4096, device="cuda")
    rows[0, 1, 3], rows[0, 2, 0] = float("inf"), float("nan")
    (found,) = ROWWISE([rows], "v0: float32 = sum(x0); return v0")
    assert found[0, :, 0].isfinite().tolist() == [True, False, False, True]
