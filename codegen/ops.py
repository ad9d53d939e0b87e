"""The mux:: operators of torch.library: one opaque node each in a captured graph, with fakes, gradients and FLOP formulas.

Importing this module registers them. Their meaning is `codegen.reference`; the CPU runs `codegen.host`, CUDA `codegen.batched`
and torch's varlen attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import batched, host, reference


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# --- tile_mm and its weight gradient: every adapter kind's matrix products -------------------------------------------


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _check_route(op: str, name: str, rows: Tensor, route: Tensor, scale: Tensor | None, slots: int) -> None:
    _check(rows.dim() == 2, f"{op}: {name} must be [T, features], got {_describe(rows)}")
    _check(route.dim() == 1 and route.dtype == torch.int32, f"{op}: route must be int32 [blocks], got {_describe(route)}")
    blocks = route.shape[0]
    _check(
        blocks > 0 and rows.shape[0] % blocks == 0,
        f"{op}: {name} has {rows.shape[0]} rows, not a multiple of route's {blocks} blocks",
    )
    if scale is not None:
        right = scale.shape == (slots,) and scale.dtype == torch.float32
        _check(right, f"{op}: scale must be torch.float32 ({slots},), got {_describe(scale)}")


def _check_tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> None:
    _check(w.dim() == 3, f"tile_mm: w must be [S, K, N], got {_describe(w)}")
    _check_route("tile_mm", "x", x, route, scale, w.shape[0])
    fits = w.shape[2 if transpose else 1] == x.shape[1]
    _check(fits, f"tile_mm: x has {x.shape[1]} features, w is {tuple(w.shape)} (transpose={transpose})")
    _check(w.dtype == x.dtype, f"tile_mm: w is {w.dtype}, x is {x.dtype}")


def _check_tile_outer(op: str, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None, slots: int) -> None:
    _check_route(op, "a", a, route, scale, slots)
    _check(b.dim() == 2 and b.shape[0] == a.shape[0], f"{op}: b must be [T, N] with a's {a.shape[0]} rows, got {_describe(b)}")
    _check(b.dtype == a.dtype, f"{op}: b is {b.dtype}, a is {a.dtype}")


def _check_grad(grad: Tensor, a: Tensor, b: Tensor) -> None:
    shape = (grad.shape[0], a.shape[1], b.shape[1])
    right = grad.shape == shape and grad.dtype == torch.float32
    _check(right, f"tile_outer_: grad is {tuple(grad.shape)} {grad.dtype}, must be {shape} torch.float32")


@torch.library.custom_op("mux::tile_mm", mutates_args=())
def tile_mm(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    _check_tile_mm(x, w, route, scale, transpose)
    return (batched if x.is_cuda else host).tile_mm(x, w, route, scale, transpose)


@tile_mm.register_fake
def _(x: Tensor, w: Tensor, route: Tensor, scale: Tensor | None, transpose: bool) -> Tensor:
    _check_tile_mm(x, w, route, scale, transpose)
    return x.new_empty(x.shape[0], w.shape[1] if transpose else w.shape[2])


@torch.library.custom_op("mux::tile_outer", mutates_args=())
def tile_outer(a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None, slots: int) -> Tensor:
    """[slots, K, N] float32: `tile_outer_` from zero."""
    _check_tile_outer("tile_outer", a, b, route, scale, slots)
    grad = a.new_zeros(slots, a.shape[1], b.shape[1], dtype=torch.float32)
    (batched if a.is_cuda else host).tile_outer(grad, a, b, route, scale)
    return grad


@tile_outer.register_fake
def _(a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None, slots: int) -> Tensor:
    _check_tile_outer("tile_outer", a, b, route, scale, slots)
    return a.new_empty(slots, a.shape[1], b.shape[1], dtype=torch.float32)


@torch.library.custom_op("mux::tile_outer_", mutates_args=("grad",))
def tile_outer_(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    """Add to `grad` in place: what a backward region calls, so that a gradient exists once."""
    _check_tile_outer("tile_outer_", a, b, route, scale, grad.shape[0])
    _check_grad(grad, a, b)
    (batched if a.is_cuda else host).tile_outer(grad, a, b, route, scale)


@tile_outer_.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor, route: Tensor, scale: Tensor | None) -> None:
    _check_tile_outer("tile_outer_", a, b, route, scale, grad.shape[0])
    _check_grad(grad, a, b)


def _tile_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, route, scale, transpose = inputs
    ctx.save_for_backward(x, w, route, scale)
    ctx.transpose = transpose


def _tile_mm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, route, scale = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.mux.tile_mm(dy, w, route, scale, not ctx.transpose)
    if ctx.needs_input_grad[1]:
        a, b = (dy, x) if ctx.transpose else (x, dy)
        dw = torch.ops.mux.tile_outer(a, b, route, scale, w.shape[0])
        # `tile_outer` is float32 whatever x is; autograd wants the gradient in the weight's dtype.
        dw = dw if w.dtype == dw.dtype else dw.to(w.dtype)
    return dx, dw, None, None, None


torch.library.register_autograd("mux::tile_mm", _tile_mm_backward, setup_context=_tile_mm_setup)


@register_flop_formula(torch.ops.mux.tile_mm)
def _tile_mm_flops(x_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * w_shape[1] * w_shape[2]


@register_flop_formula([torch.ops.mux.tile_outer])
def _tile_outer_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@register_flop_formula([torch.ops.mux.tile_outer_])
def _tile_outer_into_flops(grad_shape: Any, a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


# --- attention over packed sequences ---------------------------------------------------------------------------------


def _check_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> None:
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    _check(q.dim() == k.dim() == v.dim() == 3, f"attention: q, k, v must be [T, heads, D], got {shapes}")
    _check(k.shape == v.shape, f"attention: k is {tuple(k.shape)}, v is {tuple(v.shape)}")
    _check(q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], f"attention: q is {tuple(q.shape)}, k is {tuple(k.shape)}")
    heads, groups = q.shape[1], k.shape[1]
    _check(groups > 0 and heads % groups == 0, f"attention: {heads} query heads are not a multiple of {groups} key/value heads")
    _check(q.dtype == k.dtype == v.dtype, f"attention: q is {q.dtype}, k is {k.dtype}, v is {v.dtype}")
    right = cu_seqlens.dim() == 1 and cu_seqlens.dtype == torch.int32
    _check(right, f"attention: cu_seqlens must be int32 [sequences + 1], got {_describe(cu_seqlens)}")
    _check(window >= 0, f"attention: window is {window}, must be 0 (none) or more")


@torch.library.custom_op("mux::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, cu_seqlens, window)
    return _attention_form(q).forward(q, k, v, cu_seqlens, longest, scale, window)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, cu_seqlens, window)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("mux::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_form(q).backward(grad, q, k, v, out, lse, cu_seqlens, longest, scale, window)


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Reference:
    """Plain torch, any device and dtype: CUDA in float32, which the flash kernels do not take."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention(q, k, v, *args)
        return out.contiguous(), lse

    @staticmethod
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = reference.attention_backward(grad, q, k, v, *args)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()


class _Host:
    """torch's flash attention for the CPU, a sequence at a time."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        return host.attention(q, k, v, cu_seqlens, scale, window)

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        longest: Tensor,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return host.attention_backward(grad, q, k, v, out, lse, cu_seqlens, scale, window)


class _Varlen:
    """torch's varlen attention (FlashAttention kernels): bf16 and fp16 on CUDA; key/value heads stay grouped."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        length = int(longest)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, cu_seqlens, length, length, 0.0, not window, False,
            scale=scale, **_window(window),
        )  # fmt: skip
        return out.contiguous(), lse

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        longest: Tensor,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        length = int(longest)
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # no dropout: never read
        with _strictly_deterministic():
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), out, lse, cu_seqlens, cu_seqlens,
                length, length, 0.0, not window,
                seed, seed, scale=scale, **_window(window),
            )  # fmt: skip
        return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _attention_form(q: Tensor) -> type[_Reference] | type[_Host] | type[_Varlen]:
    if not q.is_cuda:
        return _Host
    return _Varlen if q.dtype in (torch.bfloat16, torch.float16) else _Reference


def _window(window: int) -> dict[str, int]:
    # The kernel counts the positions to the left of one's own, the model's config counts the position itself too.
    return {"window_size_left": window - 1 if window else -1, "window_size_right": 0}


class _strictly_deterministic:
    """Ask for FlashAttention's ordered dQ within this block alone: the unordered one differs from run to run.

    The switch is process-global, so it is put back; filling of fresh memory, which it implies, is kept off.
    """

    def __enter__(self) -> None:
        self._mode = torch.get_deterministic_debug_mode()
        self._fill = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *exc: object) -> None:
        torch.set_deterministic_debug_mode(self._mode)
        torch.utils.deterministic.fill_uninitialized_memory = self._fill


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, longest, scale, window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, longest)
    ctx.scale, ctx.window = scale, window
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, longest = ctx.saved_tensors
    grads = torch.ops.mux.attention_backward(grad, q, k, v, out, lse, cu_seqlens, longest, ctx.scale, ctx.window)
    return *grads, None, None, None, None


torch.library.register_autograd("mux::attention", _attention_backward, setup_context=_attention_setup)


def _attention_flops(products: int) -> Callable[..., int]:
    # An upper bound: every position over half a chunk. The true figure depends on the data.
    def flops(*shapes: Any, **kwargs: Any) -> int:
        tokens, heads, size = next(shape for shape in shapes if shape is not None and len(shape) == 3)
        return products * tokens * tokens * heads * size

    return flops


register_flop_formula(torch.ops.mux.attention)(_attention_flops(2))
register_flop_formula(torch.ops.mux.attention_backward)(_attention_flops(5))

TILE_MM = torch.ops.mux.tile_mm.default
TILE_OUTER = torch.ops.mux.tile_outer.default
TILE_OUTER_ = torch.ops.mux.tile_outer_.default
ATTENTION = torch.ops.mux.attention.default
