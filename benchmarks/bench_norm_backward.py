"""The backward of LayerNorm against torch's, which is given the forward's statistics: gradients of x, weight and bias.

All three are made, x's is compared: tests/kernels/test_norm.py compares the others.  On a GPU alone: it is a kernel of
Triton's, which norm_linear and pool share.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor

# Widths of ViT-S, B, L and of giant models.
NAMES = (384, 768, 1024, 1408)


def eager(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    wanted = [True, True, True]
    return torch.ops.aten.native_layer_norm_backward(grad, x, weight.shape, mean, rstd, weight, bias, wanted)[0]


def fused(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    from fastvit.kernels.norm import norm_backward

    x_grad, _, _ = norm_backward(grad, x, weight, "layer", 1e-6)
    assert x_grad is not None
    return x_grad


def case(name: int, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    rows, k = batch * width.tokens, name if width is VIT_B else width.dim
    make = functools.partial(tensor, dtype=dtype, device=device)
    x, weight, bias = make(rows, k, seed=1), make(k, seed=2, mean=1.0, scale=0.3), make(k, seed=3, scale=0.3)
    _, mean, rstd = torch.native_layer_norm(x, [k], weight, bias, 1e-6)
    tensors = (make(rows, k, seed=0), x, weight, bias, mean, rstd)
    return Case(
        "norm_backward",
        f"{rows} rows of {k}, batch {batch}",
        eager,
        fused,
        tensors,
        flops=20 * rows * k,
        bytes=nbytes(*tensors[:3]) + nbytes(x, weight, bias),
    )


@pytest.mark.parametrize("name", NAMES)
def test_norm_backward(benchmark, name, dtype, batch, device):
    if device != "cuda":
        pytest.skip("a kernel of Triton's alone")
    run_in_pytest(benchmark, case(name, dtype, batch, device))
