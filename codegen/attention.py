"""mux::attention: causal attention over packed sequences, with the forms it runs in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import host, reference_attention
from codegen.checks import check, describe


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> None:
    """q [T, H, D], k and v [T, G, D] of one dtype, H a multiple of G; cu_seqlens int32 [sequences + 1]."""
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    check(q.dim() == k.dim() == v.dim() == 3, f"{op}: q, k, v must be [T, heads, D], got {shapes}")
    check(k.shape == v.shape, f"{op}: k is {tuple(k.shape)}, v is {tuple(v.shape)}")
    check(q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2], f"{op}: q is {tuple(q.shape)}, k is {tuple(k.shape)}")
    heads, groups = q.shape[1], k.shape[1]
    check(
        heads > 0 and groups > 0 and heads % groups == 0,
        f"{op}: {heads} query heads are not a multiple of {groups} key/value heads",
    )
    check(q.dtype == k.dtype == v.dtype, f"{op}: q is {q.dtype}, k is {k.dtype}, v is {v.dtype}")
    right = cu_seqlens.dim() == 1 and cu_seqlens.dtype == torch.int32
    check(right, f"{op}: cu_seqlens must be int32 [sequences + 1], got {describe(cu_seqlens)}")
    check(window >= 0, f"{op}: window is {window}, must be 0 (none) or more")


@torch.library.custom_op("mux::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    check_attention("attention", q, k, v, cu_seqlens, window)
    return attention_form(q).forward(q, k, v, cu_seqlens, longest, scale, window)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    check_attention("attention", q, k, v, cu_seqlens, window)
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
    return attention_form(q).backward(grad, q, k, v, out, lse, cu_seqlens, longest, scale, window)


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
        out, lse = reference_attention.attention(q, k, v, *args)
        return out.contiguous(), lse

    @staticmethod
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = reference_attention.attention_backward(grad, q, k, v, *args)
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


def attention_form(q: Tensor) -> type[_Reference] | type[_Host] | type[_Varlen]:
    """What runs `reference_attention.attention` and its gradients on q's device and in its dtype."""
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

ATTENTION = torch.ops.mux.attention.default
