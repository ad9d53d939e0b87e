"""mux::lse on the device: what torch computes, with the same bits whenever it runs."""

from __future__ import annotations

import pytest
import torch

from codegen.ops import LSE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("features", [128256, 64128, 50257, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_cross_entropy_and_its_gradient(dtype: torch.dtype, features: int) -> None:
    generator = torch.Generator("cuda").manual_seed(features)
    logits = (torch.randn(256, features, device="cuda", generator=generator) * 4).to(dtype).requires_grad_()
    index = torch.randint(features, (256,), device="cuda", generator=generator)
    index[:2] = torch.tensor([-5, features], device="cuda")
    here = index[2:]
    seeds = torch.rand(256, device="cuda", generator=generator)
    sums, nll = LSE(logits, index)
    (grad,) = torch.autograd.grad(nll, logits, seeds)
    other = logits.detach().double().requires_grad_()
    exact = torch.cat([other[:2].logsumexp(1), torch.nn.functional.cross_entropy(other[2:], here, reduction="none")])
    (expected,) = torch.autograd.grad(exact, other, seeds.double())
    torch.testing.assert_close(sums.double(), other.logsumexp(1), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(nll.double(), exact, rtol=2e-6, atol=4e-6)
    size = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected, rtol=size, atol=1e-7)
    again = LSE(logits, index)
    assert torch.equal(sums, again[0])
    assert torch.equal(nll, again[1])
