"""self_attention against layer_norm, linear, SDPA, linear, LayerScale and add: the first half of a block."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import self_attention

# Tokens of ViT-B/16 at 224 and at 384 pixels.
NAMES = (197, 577)


def eager(
    x: Tensor, qkv: Tensor, b: Tensor, proj: Tensor, proj_b: Tensor, gain: Tensor, shift: Tensor, ls: Tensor, heads: int
) -> Tensor:
    y = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, 1e-6), qkv, b)
    q, k, v = y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x + ls * F.linear(y, proj, proj_b)


def fused(
    x: Tensor, qkv: Tensor, b: Tensor, proj: Tensor, proj_b: Tensor, gain: Tensor, shift: Tensor, ls: Tensor, heads: int
) -> Tensor:
    norm = {"norm_weight": gain, "norm_bias": shift}
    return self_attention(x, qkv, b, proj, proj_b, num_heads=heads, layer_scale=ls, **norm)


def case(name: int, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    tokens, dim = name, width.dim
    make = functools.partial(tensor, dtype=dtype, device=device)
    tensors = (
        make(batch, tokens, dim, seed=0),
        make(3 * dim, dim, seed=1, scale=dim**-0.5),
        make(3 * dim, seed=2, scale=0.3),
        make(dim, dim, seed=3, scale=dim**-0.5),
        make(dim, seed=4, scale=0.3),
        make(dim, seed=5, scale=0.3, mean=1.0),
        make(dim, seed=6, scale=0.3),
        make(dim, seed=7, scale=0.3),
    )
    return Case(
        "self_attention",
        f"{width.name}, {tokens} tokens, batch {batch}",
        functools.partial(eager, heads=width.num_heads),
        functools.partial(fused, heads=width.num_heads),
        tensors,
        flops=8 * batch * tokens * dim * dim + 4 * batch * tokens * tokens * dim,
        bytes=nbytes(*tensors) + nbytes(tensors[0]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_self_attention(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
