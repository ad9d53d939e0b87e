"""Every kernel once over sizes that need all masks: `compute-sanitizer --tool memcheck python -m tests.gpu.sanitize`.

Features and ranks are no multiples of any tile, slots are unused, blocks are nobody's, one route names a slot that does not exist.
"""

from __future__ import annotations

import os
from typing import Any

# Each tensor an allocation of its own: behind torch's caching allocator a read past its end is a read of its neighbour.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

import codegen.ops  # noqa: F401  (registers the operators)

BLOCKS, TILE, FEATURES, OUTPUTS = 5, 128, 208, (336, 48)


def main() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    def whole(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    tokens = BLOCKS * TILE
    x, dys = normal(tokens, FEATURES), [normal(tokens, size) for size in OUTPUTS]
    weights = [normal(size, FEATURES) for size in OUTPUTS]
    a, b = [normal(3, 24, FEATURES), normal(2, 5, FEATURES)], [normal(3, 12, 336), normal(3, 12, 48), normal(2, 5, 48)]
    scale = [torch.ones(table.shape[0], device="cuda") for table in b]
    route = [whole([0, -1, 2, -1, 7]), whole([-1, 1, -1, -1, -1])]
    drop, sites, counters = (
        [whole([[1, 2, 1 << 30]] * 2)],
        [whole([[9, 0]])],
        torch.arange(tokens, dtype=torch.int32, device="cuda"),
    )
    rest = scale, route, drop, sites, counters, counters, [0, 1, 1], [0, 1]
    for form in ("accumulate", "epilogue", "fused"):
        forms = f"y={form},{form} dx={form}"
        *_, narrow = torch.ops.mux.linears(x, weights, [None, None], a, b, *rest, forms)
        grads, dx = [torch.zeros(table.shape, device="cuda") for table in (*a, *b)], torch.empty_like(x)
        torch.ops.mux.linears_backward_(grads, dx, dys, x, narrow, weights, a, b, *rest, forms)
    vectors = [normal(3, 1, FEATURES) for _ in range(2)]
    for otherwise in (None, torch.zeros_like(x)):
        y = torch.ops.mux.tile_affine(x, *vectors, vectors[0][0, 0], route[0], otherwise)
    torch.ops.mux.tile_sum_(torch.zeros(3, 1, FEATURES, device="cuda"), y, x, route[0])
    torch.ops.mux.drop(x, drop[0], sites[0], route[0].clamp(max=1), counters, counters)
    table, index = normal(3, 50, FEATURES).requires_grad_(), torch.randint(0, 50, (tokens,), device="cuda")
    torch.ops.mux.tile_gather(table, index, route[0]).sum().backward()
    places = torch.stack([torch.randperm(FEATURES * 48, device="cuda")[:70] for _ in range(3)])
    places = torch.stack([places // FEATURES, places % FEATURES], 1).int()
    values, y = normal(3, 1, 70).requires_grad_(), normal(tokens, 48)
    torch.ops.mux.tile_sparse(y, x.detach().requires_grad_(), values, places, route[0], 48, False).sum().backward()
    q, k, kv = normal(tokens, 6, 24), normal(tokens, 2, 24), normal(3, 2 * 2 * 20, 24).requires_grad_()
    lengths, borders = whole([20, 3, 0]), whole([0, 100, 128, 384, tokens])
    out, _ = torch.ops.mux.prefixed_attention(q.requires_grad_(), k, k, [kv], [lengths], route[:1], borders, whole([256]), 0.3, 0)
    out.sum().backward()
    for rows in (normal(1, tokens, FEATURES), normal(1, tokens, 4100)):
        normed = "v0: float32 = to(x0); v1: float32 = mean(v0); v2: bfloat16 = mul(x0, x1); v3: float32 = add(v1, v2)"
        torch.ops.mux.rowwise([rows, normal(rows.shape[-1])], f"{normed}; return v1, v2, v3")
        torch.ops.mux.rowwise([rows], "v0: bfloat16 = silu(x0); return v0")
    heads = normal(1, tokens // 4, 6, 48).transpose(1, 2)
    turned = "v0: bfloat16 = slice(x0, 24, 48); v1: bfloat16 = slice(x0, 0, 24); v2: bfloat16 = neg(v0); v3: bfloat16 = cat(v2, v1)"
    torch.ops.mux.rowwise([heads], f"{turned}; v4: bfloat16 = pad(v2, 48, 7); return v3 in 0 2 1 3, v4")
    logits, places = normal(37, 4100).requires_grad_(), torch.randint(-2, 4103, (37,), device="cuda")
    sum(torch.ops.mux.lse(logits, places)).sum().backward()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
