"""mlp against layer_norm, linear, GELU, linear, LayerScale and add: the second half of a block."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import mlp

NAMES = ("gelu",)


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gain: Tensor, shift: Tensor, ls: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, 1e-6), w1, b1))
    return x + ls * F.linear(hidden, w2, b2)


def fused(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gain: Tensor, shift: Tensor, ls: Tensor) -> Tensor:
    return mlp(x, w1, b1, w2, b2, norm_weight=gain, norm_bias=shift, layer_scale=ls)


def case(name: str, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    dim, hidden = width.dim, 4 * width.dim
    make = functools.partial(tensor, dtype=dtype, device=device)
    tensors = (
        make(batch, width.tokens, dim, seed=0),
        make(hidden, dim, seed=1, scale=dim**-0.5),
        make(hidden, seed=2, scale=0.3),
        make(dim, hidden, seed=3, scale=hidden**-0.5),
        make(dim, seed=4, scale=0.3),
        make(dim, seed=5, scale=0.3, mean=1.0),
        make(dim, seed=6, scale=0.3),
        make(dim, seed=7, scale=0.3),
    )
    return Case(
        "mlp",
        f"{width.name}, batch {batch}",
        eager,
        fused,
        tensors,
        flops=4 * batch * width.tokens * dim * hidden,
        bytes=nbytes(*tensors) + nbytes(tensors[0]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_mlp(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
