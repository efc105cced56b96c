"""linear_residual against linear, LayerScale and add: the products that close both halves of a block."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import linear_residual

NAMES = ("proj", "fc2")


def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, layer_scale: Tensor) -> Tensor:
    return residual + layer_scale * F.linear(x, weight, bias)


def fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, layer_scale: Tensor) -> Tensor:
    return linear_residual(x, weight, bias, residual=residual, layer_scale=layer_scale)


def case(name: str, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    inner = {"proj": width.dim, "fc2": 4 * width.dim}[name]
    make = functools.partial(tensor, dtype=dtype, device=device)
    tensors = (
        make(batch, width.tokens, inner, seed=0),
        make(width.dim, inner, seed=1, scale=inner**-0.5),
        make(width.dim, seed=2, scale=0.3),
        make(batch, width.tokens, width.dim, seed=3),
        make(width.dim, seed=4, scale=0.3),
    )
    return Case(
        "linear_residual",
        f"{width.name} {name}, batch {batch}",
        eager,
        fused,
        tensors,
        flops=2 * batch * width.tokens * width.dim * inner,
        bytes=nbytes(*tensors) + batch * width.tokens * width.dim * dtype.itemsize,
    )


@pytest.mark.parametrize("name", NAMES)
def test_linear_residual(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
