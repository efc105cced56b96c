"""norm_linear against layer_norm, linear and GELU: the products that open both halves of a block."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import norm_linear

NAMES = ("qkv", "fc1")


def eager(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, activation: str) -> Tensor:
    y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6), weight, bias)
    return F.gelu(y) if activation == "gelu" else y


def fused(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, activation: str) -> Tensor:
    return norm_linear(x, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias, activation=activation)


def case(name: str, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    activation, out = {"qkv": ("none", 3 * width.dim), "fc1": ("gelu", 4 * width.dim)}[name]
    make = functools.partial(tensor, dtype=dtype, device=device)
    tensors = (
        make(batch, width.tokens, width.dim, seed=0),
        make(out, width.dim, seed=1, scale=width.dim**-0.5),
        make(out, seed=2, scale=0.3),
        make(width.dim, seed=3, scale=0.3, mean=1.0),
        make(width.dim, seed=4, scale=0.3),
    )
    return Case(
        "norm_linear",
        f"{width.name} {name}, batch {batch}",
        functools.partial(eager, activation=activation),
        functools.partial(fused, activation=activation),
        tensors,
        flops=2 * batch * width.tokens * width.dim * out,
        bytes=nbytes(*tensors) + batch * width.tokens * out * dtype.itemsize,
    )


@pytest.mark.parametrize("name", NAMES)
def test_norm_linear(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
