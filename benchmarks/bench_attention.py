"""attention against scaled_dot_product_attention, from packed qkv to (B, N, C), layout changes included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import attention

# Tokens of ViT-B/16 at 224 and at 384 pixels.
NAMES = (197, 577)


def eager(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def fused(qkv: Tensor) -> Tensor:
    return attention(*qkv.unbind(2))


def case(name: int, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    tokens, heads = name, width.num_heads
    qkv = tensor(batch, tokens, 3, heads, width.dim // heads, dtype=dtype, device=device, seed=0)
    return Case(
        "attention",
        f"{heads} heads of {width.dim // heads}, {tokens} tokens, batch {batch}",
        eager,
        fused,
        (qkv,),
        flops=4 * batch * tokens * tokens * width.dim,
        bytes=nbytes(qkv) * 4 // 3,
    )


@pytest.mark.parametrize("name", NAMES)
def test_attention(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
