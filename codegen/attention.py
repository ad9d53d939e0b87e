"""mux::attention: causal attention over packed sequences, with the forms it runs in.

A sequence longer than a chunk is cut: `before` holds the keys and values of its earlier pieces, which the chunk's first sequence, a
later piece, sees before its own. Forms know of it as keys and values of more rows than there are queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from codegen import host, reference_attention
from codegen.checks import check, describe


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bounds: Tensor, window: int, before: Tensor | None = None
) -> None:
    """q [T, H, D], k and v [T, G, D], before [2, C, G, D] of one dtype, H a multiple of G; int32 cu_seqlens [sequences + 1] and,
    on the CPU, bounds [2]."""
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
    right = bounds.shape == (2,) and bounds.dtype == torch.int32 and bounds.device.type == "cpu"
    check(right, f"{op}: bounds must be int32 [2] on the CPU, got {describe(bounds)}")
    check(window >= 0, f"{op}: window is {window}, must be 0 (none) or more")
    if before is not None:
        right = before.dim() == 4 and before.shape[0] == 2 and before.shape[2:] == k.shape[1:] and before.dtype == k.dtype
        check(right, f"{op}: before must be {k.dtype} [2, C, {groups}, {k.shape[2]}], got {describe(before)}")


def behind(before: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values behind those of earlier pieces: [C + T, G, D] each."""
    if before is None or before.shape[1] == 0:
        return k, v
    return torch.cat([before[0], k]), torch.cat([before[1], v])


def apart(before: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor) -> list[Tensor]:
    """Gradients of q, k and v, and of `before` where there is one, from those of what `behind` made."""
    if before is None:
        return [dq, dk, dv]
    rows = before.shape[1]
    # The slices are copied: what they come from would live as long as they.
    return [dq, *((x[rows:].clone() for x in (dk, dv)) if rows else (dk, dv)), torch.stack([dk[:rows], dv[:rows]])]


@torch.library.custom_op("mux::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    scale: float,
    window: int,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference_attention.attention`; `before`: [2, C, G, D] keys and values before those of the first sequence, or None."""
    check_attention("attention", q, k, v, cu_seqlens, bounds, window, before)
    return attention_form(q.device, q.dtype).forward(q, *behind(before, k, v), cu_seqlens, bounds, scale, window)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    scale: float,
    window: int,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_attention("attention", q, k, v, cu_seqlens, bounds, window, before)
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
    bounds: Tensor,
    scale: float,
    window: int,
    before: Tensor | None = None,
) -> list[Tensor]:
    """dq, dk, dv, and the gradient of `before` where it is given."""
    found = attention_form(q.device, q.dtype).backward(grad, q, *behind(before, k, v), out, lse, cu_seqlens, bounds, scale, window)
    return apart(before, *found)


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    scale: float,
    window: int,
    before: Tensor | None = None,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, before) if x is not None]


class _Reference:
    """Plain torch, any device and dtype: CUDA in float32, which the flash kernels do not take."""

    text = "plain torch, a sequence at a time, slow: flash attention on CUDA takes bf16 and fp16 alone"
    waits = True

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

    text = "torch flash attention, a sequence at a time"
    waits = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bounds: Tensor, scale: float, window: int
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
        bounds: Tensor,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return host.attention_backward(grad, q, k, v, out, lse, cu_seqlens, scale, window)


class _Varlen:
    """torch's varlen attention (FlashAttention kernels): bf16 and fp16 on CUDA; key/value heads stay grouped."""

    text = "torch varlen attention (FlashAttention)"
    waits = False

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bounds: Tensor, scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        borders, keys, rows, length = _counted(q, k, cu_seqlens, bounds)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q.contiguous(), k.contiguous(), v.contiguous(), borders, keys, rows, length, 0.0, not window, False,
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
        bounds: Tensor,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        borders, keys, rows, length = _counted(q, k, cu_seqlens, bounds)
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # no dropout: never read
        with _strictly_deterministic():
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), out, lse, borders, keys,
                rows, length, 0.0, not window, seed, seed, scale=scale, **_window(window),
            )  # fmt: skip
        return dq.contiguous(), dk.contiguous(), dv.contiguous()


def attention_form(device: torch.device, dtype: torch.dtype) -> type[_Reference] | type[_Host] | type[_Varlen]:
    """What runs `reference_attention.attention` and its gradients on a device: `text` says it; `waits`: the host reads borders."""
    if device.type != "cuda":
        return _Host
    return _Varlen if dtype in (torch.bfloat16, torch.float16) else _Reference


def _counted(q: Tensor, k: Tensor, cu_seqlens: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """The borders of the sequences that there are, in queries and in keys, and bounds of their lengths.

    Every border costs the backward 128 rows of dQ in float32, which it fills with zeros and reads. The kernel aligns the last query
    with the last key.
    """
    rows, count = bounds.tolist()
    # Where sequences times heads are fewer than multiprocessors dQ is summed in so many parts: always of all borders then, or a
    # row's bits would follow the number of sequences beside it.
    if count * q.shape[1] < torch.cuda.get_device_properties(q.device).multi_processor_count:
        count = cu_seqlens.shape[0] - 1
    borders, before = cu_seqlens[: count + 1], k.shape[0] - q.shape[0]
    if not before:
        return borders, borders, rows, rows
    keys = borders + before
    keys[0] = 0
    return borders, keys, rows, rows + before


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
    q, k, v, cu_seqlens, bounds, scale, window, *before = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, bounds, *(x for x in before if x is not None))
    ctx.scale, ctx.window = scale, window
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, bounds, *before = ctx.saved_tensors
    dq, dk, dv, *found = torch.ops.mux.attention_backward(
        grad, q, k, v, out, lse, cu_seqlens, bounds, ctx.scale, ctx.window, *before
    )
    return dq, dk, dv, None, None, None, None, *(found or [None])


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
