"""pool against final norm, pooling and head."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import pool

NAMES = ("token", "norm_avg")


def eager(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, mode: str) -> Tensor:
    # As models spell it: every token is normalised, also where only the class token is read.
    y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6)
    return F.linear(y[:, 0] if mode == "token" else y[:, 1:].mean(dim=1), weight, bias)


def fused(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, mode: str) -> Tensor:
    return pool(x, mode=mode, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)


def case(name: str, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    make = functools.partial(tensor, dtype=dtype, device=device)
    tensors = (
        make(batch, width.tokens, width.dim, seed=0),
        make(width.dim, seed=1, scale=0.3, mean=1.0),
        make(width.dim, seed=2, scale=0.3),
        make(width.num_classes, width.dim, seed=3, scale=width.dim**-0.5),
        make(width.num_classes, seed=4, scale=0.3),
    )
    read = batch * width.dim * dtype.itemsize if name == "token" else nbytes(tensors[0])
    return Case(
        "pool",
        f"{width.name} {name}, batch {batch}",
        functools.partial(eager, mode=name),
        functools.partial(fused, mode=name),
        tensors,
        flops=2 * batch * width.dim * width.num_classes,
        bytes=read + nbytes(*tensors[1:]) + batch * width.num_classes * dtype.itemsize,
    )


@pytest.mark.parametrize("name", NAMES)
def test_pool(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
