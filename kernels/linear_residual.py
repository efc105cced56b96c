"""linear_residual: residual + drop_path * layer_scale * (x @ weight.T + bias).

Shapes: x (M, K), weight (N, K), residual and out (M, N), drop_path (B,) with M / B rows to a sample.

Cost in 16 bits: 2 M N K flops, 2 (M K + N K + 2 M N) bytes.  ViT-B/16, batch 256 (M = 50,432, N = 768): the attention
projection (K = 768) 59 GFLOP and 234 MB, 254 flops a byte, at the ridge of an H100 (270); FC2 (K = 3,072) 238 GFLOP
and 469 MB, bound by the tensor cores.  Reading the residual in the epilogue saves eager's two passes over (M, N), for
LayerScale and for the sum.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastvit.kernels.launch import compute_dtype, launch, precision, rows
from fastvit.kernels.norm_linear import tile_for
from fastvit.kernels.product import tile_index, tile_product
from torch import Tensor

_GROUP_M = 8


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    """Launch: same signature and meaning as `fastvit.ops.linear_residual`."""
    dtype = compute_dtype(x, weight)
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    batch = residual.shape[0]
    x, weight, residual = rows(x), rows(weight.to(dtype)), rows(residual)
    bias, layer_scale, drop_path = (None if t is None else t.contiguous() for t in (bias, layer_scale, drop_path))
    m, k = x.shape
    n = weight.shape[0]
    tile = tile_for(x.device, dtype, m)
    launch(
        _product,
        triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        bias,
        layer_scale,
        drop_path,
        m // batch,
        residual,
        residual.stride(0),
        out,
        m,
        n,
        k,
        EVEN_K=k % tile.block_k == 0,
        ALIGN=math.gcd(16, k, x.stride(0), weight.stride(0)),
        PRECISION=precision(dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=_GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


@triton.jit
def _product(
    x, x_row, weight, weight_row, bias, layer_scale, drop_path, sample_rows, residual, residual_row, out, M, N, K,
    EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, column = tile_index(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row *= BLOCK_M
    column *= BLOCK_N
    acc, _ = tile_product(
        x, x_row, weight, weight_row, None, None, None, None, row, column, M, N, K, 0,
        "none", False, EVEN_K, ALIGN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    i = tl.arange(0, BLOCK_M)[:, None]
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    mask = (m[:, None] < M) & (n[None, :] < N)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if layer_scale is not None:
        acc *= tl.load(layer_scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if drop_path is not None:
        acc *= tl.load(drop_path + m // sample_rows, mask=m < M, other=0.0).to(tl.float32)[:, None]
    at = residual + tl.cast(row, tl.int64) * residual_row + (i * residual_row + n[None, :])
    acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = out + tl.cast(row, tl.int64) * N + (i * N + n[None, :])
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)
