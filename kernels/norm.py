"""LayerNorm and RMSNorm of rows, forward and backward: what norm_linear and pool share.

Shapes: x (M, K), weight and bias (K,), statistics (M,).

Cost in 16 bits: statistics read 2 M K bytes, the backward reads x and the gradient and writes one (6 M K bytes, 8 with
the residual's gradient), at some 20 operations an element: all are bound by memory.  ViT-B/16, batch 256 (M = 50,432,
K = 768): 232 MB, 77 us at 3 TB/s.

The backward is one pass.  A program keeps whole rows in registers, so that the statistics are made again from the row
that it holds anyway and nothing but x need be saved, and walks over many rows, so that its shares of the gradients of
weight and bias stay in registers too.  Those are written once for each program and summed in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels.launch import launch, multiprocessors
from torch import Tensor


class _Rows(NamedTuple):
    elements: int  # of x, that a program holds at a time
    num_warps: int


# Row width up to -> what a program holds.  The same everywhere: all that these kernels do is to keep memory busy.
_FORWARD = {1024: _Rows(4096, 4), 8192: _Rows(4096, 8), None: _Rows(4096, 16)}
_BACKWARD = {1024: _Rows(2048, 4), 4096: _Rows(4096, 8), None: _Rows(8192, 16)}

# Programs of the backward: enough to fill the device, each with rows enough that its share of the weight's and bias's
# gradients (8 K bytes) is small beside the rows it reads.
_PROGRAMS_PER_MULTIPROCESSOR = 4
_LEAST_ROWS = 16


def _rows(table: dict[int | None, _Rows], k: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_K, num_warps) for rows of `k`."""
    block_k = triton.next_power_of_2(k)
    rows = next(rows for most, rows in table.items() if most is None or block_k <= most)
    return max(1, min(16, rows.elements // block_k)), block_k, rows.num_warps


def row_block(k: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_K, num_warps) of a pass over rows of `k`."""
    return _rows(_FORWARD, k)


def statistics(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Mean (0 for "rms") and 1 / std of each row of `x` (M, K), in float32."""
    mean, rstd = torch.empty(2, x.shape[0], dtype=torch.float32, device=x.device)
    _launch_forward(_statistics, x, (mean, rstd), eps, norm)
    return mean, rstd


def normalize(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, norm: str, eps: float, dtype: torch.dtype
) -> Tensor:
    """norm(x) in `dtype`, contiguous: the operand of a weight's gradient."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch_forward(_normalize, x, (norm_weight, norm_bias, out), eps, norm)
    return out


def _launch_forward(kernel: object, x: Tensor, tensors: tuple[Tensor | None, ...], eps: float, norm: str) -> None:
    m, k = x.shape
    block_m, block_k, num_warps = _rows(_FORWARD, k)
    launch(
        kernel,
        triton.cdiv(m, block_m),
        x,
        x.stride(0),
        *tensors,
        m,
        k,
        eps,
        CENTRED=norm == "layer",
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=1,
    )


def norm_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm: str,
    eps: float,
    *,
    add: Tensor | None = None,
    want_x: bool = True,
    want_affine: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of norm_weight and of norm_bias, given that of norm(x).

    Args:
        grad, x: (M, K) with unit stride in the last dimension.
        add: (M, K), added to x's gradient: what reaches x beside the norm.

    Returns:
        x's gradient in the dtype of `x`; the other two in float32.  None for what is not wanted.
    """
    m, k = x.shape
    block_m, block_k, num_warps = _rows(_BACKWARD, k)
    most = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device)
    programs = max(1, min(most, triton.cdiv(m, max(_LEAST_ROWS, block_m))))
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else None
    shares = torch.empty(2, programs, k, dtype=torch.float32, device=x.device) if want_affine else None
    launch(
        _backward,
        programs,
        grad,
        grad.stride(0),
        x,
        x.stride(0),
        norm_weight,
        add,
        0 if add is None else add.stride(0),
        out,
        shares,
        m,
        k,
        programs,
        eps,
        CENTRED=norm == "layer",
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=2,
    )
    return (out, None, None) if shares is None else (out, *shares.sum(1))


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
def _normalize(
    x, x_row, weight, bias, out, M, K, eps, CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M
    i = tl.arange(0, BLOCK_M)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (row + i < M) & (k < K)
    values = tl.load(x + tl.cast(row, tl.int64) * x_row + (i * x_row + k), mask=mask, other=0.0).to(tl.float32)
    mean, rstd = row_moments(values, K, eps, k < K, CENTRED)
    values = (values - mean[:, None]) * rstd[:, None]
    if weight is not None:
        values *= tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + tl.cast(row, tl.int64) * K + (i * K + k), values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad, grad_row, x, x_row, weight, add, add_row, out, shares, M, K, programs, eps,
    CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - n * mean(g * n)) with g = weight * grad and n the normalised row; RMSNorm: no mean(g).

    shares (2, programs, K): the programs' sums of grad * n and of grad.
    """
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK_M)[:, None]
    k = tl.arange(0, BLOCK_K)
    inside = k[None, :] < K
    if weight is not None:
        gamma = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros([BLOCK_K], tl.float32)
    sum_bias = tl.zeros([BLOCK_K], tl.float32)
    for row in tl.range(program * BLOCK_M, M, programs * BLOCK_M):
        first = tl.cast(row, tl.int64)
        mask = (row + i < M) & inside
        n = tl.load(x + first * x_row + (i * x_row + k[None, :]), mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + first * grad_row + (i * grad_row + k[None, :]), mask=mask, other=0.0).to(tl.float32)
        mean, rstd = row_moments(n, K, eps, inside, CENTRED)
        n = tl.where(mask, (n - mean[:, None]) * rstd[:, None], 0.0)
        if shares is not None:
            sum_weight += tl.sum(g * n, 0)
            sum_bias += tl.sum(g, 0)
        if out is not None:
            if weight is not None:
                g *= gamma
            d = g - n * (tl.sum(g * n, 1) / K)[:, None]
            if CENTRED:
                d -= (tl.sum(g, 1) / K)[:, None]
            d *= rstd[:, None]
            if add is not None:
                at = add + first * add_row + (i * add_row + k[None, :])
                d += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + first * K + (i * K + k[None, :]), d.to(out.dtype.element_ty), mask=mask)
    if shares is not None:
        at = tl.cast(program, tl.int64) * K + k
        tl.store(shares + at, sum_weight, mask=k < K)
        tl.store(shares + tl.cast(programs, tl.int64) * K + at, sum_bias, mask=k < K)
