"""norm_linear: activation(norm(x) @ weight.T + bias).

Shapes: x (M, K), weight (N, K), or (2 N, K) = [gate; value] for swiglu, out (M, N).

Cost in 16 bits: 2 M N K flops (twice that for swiglu), 2 (M K + N K + M N) bytes.  ViT-B/16, batch 256, FC1
(M = 50,432, K = 768, N = 3,072): 238 GFLOP and 392 MB, 607 flops a byte: the tensor cores bound it everywhere, and what
counts is that neither norm(x) nor the product before its activation touches memory (78 and 310 MB each way).

Two launches: `_statistics` reads x once for mean and 1/std of each row (M K bytes * 2, bound by memory), `_product`
normalises tiles of x on their way to the tensor cores.  Padding K with zeros is harmless: where weight is 0, whatever
norm(x) makes of the padding counts nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels.activations import activate
from fastvit.kernels.launch import arch, compute_dtype, launch, precision, rows
from fastvit.kernels.product import tile_index, tile_product
from torch import Tensor


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# (dtype of the product, rows of x up to) -> tile.  swiglu halves block_n: it has two accumulators.
_TILES = {
    "sm80": {
        ("16", 2048): Tile(64, 64, 64, 4, 3),
        ("16", None): Tile(128, 128, 32, 8, 3),
        ("tf32", None): Tile(64, 64, 32, 4, 3),
        ("ieee", None): Tile(64, 64, 16, 8, 2),
    },
    "sm90": {
        ("16", 2048): Tile(64, 64, 64, 4, 4),
        ("16", 16384): Tile(64, 128, 64, 4, 4),
        ("16", None): Tile(128, 128, 64, 8, 3),
        ("tf32", None): Tile(128, 128, 32, 8, 3),
        ("ieee", None): Tile(64, 64, 16, 8, 2),
    },
    "sm100": {
        ("16", 2048): Tile(64, 64, 64, 4, 4),
        ("16", None): Tile(128, 128, 64, 8, 3),
        ("tf32", None): Tile(128, 128, 32, 8, 3),
        ("ieee", None): Tile(64, 64, 16, 4, 2),
    },
    "gfx942": {
        ("16", 2048): Tile(64, 64, 32, 4, 2),
        ("16", None): Tile(128, 128, 32, 8, 2),
        ("tf32", None): Tile(64, 64, 32, 4, 2),
        ("ieee", None): Tile(64, 64, 16, 4, 2),
    },
}

_GROUP_M = 8


def tile_for(device: torch.device, dtype: torch.dtype, m: int) -> Tile:
    """The tile of a product of `m` rows in `dtype`; linear_residual has the same main loop and the same table."""
    kind = precision(dtype) if dtype == torch.float32 else "16"
    return next(tile for (of, most), tile in _TILES[arch(device)].items() if of == kind and (most is None or m <= most))


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
) -> Tensor:
    """Launch: same signature and meaning as `fastvit.ops.norm_linear`.

    The result has the dtype that products run in: the narrower of `x` and `weight`.
    """
    dtype = compute_dtype(x, weight)
    gated = activation == "swiglu"
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(*x.shape[:-1], features, dtype=dtype, device=x.device)
    x, weight = rows(x), rows(weight.to(dtype))
    m, k = x.shape
    bias, norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (bias, norm_weight, norm_bias))
    mean = rstd = None
    if norm != "none":
        mean, rstd = torch.empty(2, m, dtype=torch.float32, device=x.device)
        block_k = triton.next_power_of_2(k)
        block_m = max(1, min(16, 4096 // block_k))
        launch(
            _statistics,
            triton.cdiv(m, block_m),
            x,
            x.stride(0),
            mean,
            rstd,
            m,
            k,
            eps,
            CENTRED=norm == "layer",
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=min(16, max(4, block_k // 1024)),
            num_stages=1,
        )
    tile = tile_for(x.device, dtype, m)
    block_n = tile.block_n // 2 if gated else tile.block_n
    launch(
        _product,
        triton.cdiv(m, tile.block_m) * triton.cdiv(features, block_n),
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        bias,
        mean,
        rstd,
        norm_weight,
        norm_bias,
        out,
        m,
        features,
        k,
        NORM=norm,
        ACTIVATION=activation,
        EVEN_K=k % tile.block_k == 0,
        ALIGN=math.gcd(16, k, x.stride(0), weight.stride(0)),
        PRECISION=precision(dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=_GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


@triton.jit
def row_moments(values, K, eps, inside, CENTRED: tl.constexpr):
    """Mean (0 unless CENTRED) and 1 / sqrt(variance + eps) of rows of float32, in two passes over registers."""
    if CENTRED:
        mean = tl.sum(values, 1) / K
        values = tl.where(inside, values - mean[:, None], 0.0)
    else:
        mean = tl.zeros_like(tl.sum(values, 1))
    return mean, 1.0 / tl.sqrt(tl.sum(values * values, 1) / K + eps)


@triton.jit
def _statistics(x, x_row, mean, rstd, M, K, eps, CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M
    m = row + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)[None, :]
    at = x + tl.cast(row, tl.int64) * x_row + (tl.arange(0, BLOCK_M)[:, None] * x_row + k)
    values = tl.load(at, mask=(m[:, None] < M) & (k < K), other=0.0).to(tl.float32)
    centre, scale = row_moments(values, K, eps, k < K, CENTRED)
    tl.store(mean + m, centre, mask=m < M)
    tl.store(rstd + m, scale, mask=m < M)


@triton.jit
def _product(
    x, x_row, weight, weight_row, bias, mean, rstd, norm_weight, norm_bias, out, M, N, K,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    row, column = tile_index(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row *= BLOCK_M
    column *= BLOCK_N
    acc, value = tile_product(
        x, x_row, weight, weight_row, mean, rstd, norm_weight, norm_bias, row, column, M, N, K, N,
        NORM, GATED, EVEN_K, ALIGN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if bias is not None:
            value += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, "silu", True) * value
    else:
        acc = activate(acc, ACTIVATION, out.dtype.element_ty == tl.float32)
    at = out + tl.cast(row, tl.int64) * N + (tl.arange(0, BLOCK_M)[:, None] * N + n[None, :])
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
