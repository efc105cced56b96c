"""linear_residual: residual + drop_path * layer_scale * (x @ weight.T + bias), forward and backward.

Shapes: x (M, K), weight (N, K), residual and out (M, N), drop_path (B,) with M / B rows to a sample.

Cost in 16 bits: 2 M N K flops, 2 (M K + N K + 2 M N) bytes.  ViT-B/16, batch 256 (M = 50,432, N = 768): the attention
projection (K = 768) 59 GFLOP and 234 MB, 254 flops a byte, at the ridge of an H100 (270); FC2 (K = 3,072) 238 GFLOP
and 469 MB, bound by the tensor cores.  Reading the residual in the epilogue saves eager's two passes over (M, N), for
LayerScale and for the sum.

One of three schedules runs, by choices.json or the product's size.  A program for each tile, whose prologue and
epilogue the tensor cores wait for: on Hopper its registers leave no room for a second one.  There, persistent programs
of tiles twice as wide, warp-specialised and fed by TMA: they read L2 a quarter less and load the next tile's first
operands while they end one, which still waits twice for the residual, some 2 us beside the 8 or 33 that the products of
K = 768 or 3,072 take.  On Blackwell, the same with one accumulator, in tensor memory, of 128 columns.  Or cuBLAS, and a
pass that adds the rest.  None is measured: `benchmarks.tune` decides.

The backward needs the inputs alone, not the branch, and passes over no (M, N) tensor but the gradient g, once.  With
h = drop_path * g and Q = h.T @ x, the two products being pure:

    x's gradient            h @ (layer_scale * weight)
    weight's                layer_scale * Q
    bias's                  layer_scale * sum_m h
    layer_scale's           sum_k weight * Q + bias * sum_m h     (the branch is weight @ x + bias)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastvit.kernels import choices
from fastvit.kernels.launch import arch, compute_dtype, launch, multiprocessors, precision, rows
from fastvit.kernels.product import (
    GROUP_M,
    PERSISTENT_ROWS,
    Persistent,
    Tile,
    persists,
    streamed_products,
    tile_for,
    tile_index,
    tile_product,
    weight_gradient,
)
from torch import Tensor

SCHEDULES = ("product", "persistent", "cublas")

_PERSISTENT = {
    "sm90": Persistent(Tile(128, 256, 64, 4, 3), 2, False),
    # 256 columns of residual and result exceed shared memory.
    "sm100": Persistent(Tile(128, 128, 64, 8, 3), 1, True),
}

# What a program of `_scale_rows` or `_finish` holds at a time, on every architecture: it is bound by memory.
_ROWS_BLOCK_M, _ROWS_BLOCK_N = 16, 256
_ROWS_PROGRAMS_PER_MULTIPROCESSOR = 8
_SCALE_BLOCK_K = 1024


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
    schedule = _schedule(x, weight, residual)
    if schedule != "product":
        run = _by_cublas if schedule == "cublas" else _launch_persistent
        run(x, weight, bias, layer_scale, drop_path, m // batch, residual, out)
        return out
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
        GROUP_M=GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _schedule(x: Tensor, weight: Tensor, residual: Tensor) -> str:
    """One of SCHEDULES that can run this product: the one known to be the fastest, or else by its size."""
    (m, k), n, on = x.shape, weight.shape[0], arch(x.device)
    # The result is contiguous.
    aligned = on in _PERSISTENT and persists(x, weight, residual) and n * residual.element_size() % 16 == 0
    able = {
        "product": True,
        "persistent": aligned and x.dtype == weight.dtype != torch.float32,
        # cuBLAS rounds the branch, which would be all that a wider residual stream sees of it.
        "cublas": residual.dtype == weight.dtype,
    }
    chosen = choices.choose(on, choices.key("linear_residual", weight.dtype, "residual", n, k), m, able)
    if chosen is not None:
        return chosen
    if able["persistent"] and m > PERSISTENT_ROWS:
        block_n = _PERSISTENT[on].tile.block_n
        # A ninth of the columns may be padding: the narrower tiles of "product" have less.
        if 8 * block_n * triton.cdiv(n, block_n) <= 9 * n:
            return "persistent"
    return "product"


def _launch_persistent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    sample_rows: int,
    residual: Tensor,
    out: Tensor,
) -> None:
    (m, k), n = x.shape, weight.shape[0]
    tile, parts, flat = _PERSISTENT[arch(x.device)]
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    programs = min(tiles, multiprocessors(x.device))
    launch(
        _persistent,
        programs,
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        bias,
        layer_scale,
        drop_path,
        sample_rows,
        residual,
        residual.stride(0),
        out,
        m,
        n,
        k,
        programs,
        PARTS=parts,
        FLAT=flat,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        descriptors=True,
    )


def _by_cublas(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    sample_rows: int,
    residual: Tensor,
    out: Tensor,
) -> None:
    branch = torch.mm(x.to(weight.dtype), weight.t())
    m, n = branch.shape
    columns = triton.cdiv(n, _ROWS_BLOCK_N)
    launch(
        _finish,
        columns * triton.cdiv(m, _ROWS_BLOCK_M),
        branch,
        bias,
        layer_scale,
        drop_path,
        sample_rows,
        residual,
        residual.stride(0),
        out,
        m,
        n,
        columns,
        BLOCK_M=_ROWS_BLOCK_M,
        BLOCK_N=_ROWS_BLOCK_N,
        num_warps=8,
        num_stages=1,
    )


def linear_residual_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and layer_scale, those that `needs` asks for.  The residual's is `grad` itself.

    Args:
        grad: of residual's shape and dtype.
        x, weight, bias: in the dtype that products run in, as `linear_residual` takes them.

    Returns:
        x's in the dtype that products run in, all others in float32 or that of their argument.
    """
    dtype = compute_dtype(x, weight)
    shape, x = x.shape, rows(x)
    want_weight, want_sum = needs[1] or needs[3], needs[2] or needs[3]
    branch_grad, total = scale_rows(grad, drop_path, dtype, want_sum=want_sum)
    x_grad = weight_grad = bias_grad = scale_grad = None
    if needs[0]:
        scaled = weight if layer_scale is None else (weight * layer_scale[:, None]).to(dtype)
        x_grad = torch.mm(branch_grad, scaled).view(shape)
    if want_weight:
        weight_grad = weight_gradient(branch_grad, x, dtype if layer_scale is None else torch.float32)
    bias_grad = total
    if layer_scale is not None:
        weight_grad, bias_grad, scale_grad = scale_backward(weight_grad, total, weight, bias, layer_scale, needs[3])
    return [x_grad, weight_grad, bias_grad, scale_grad]


def scale_rows(
    grad: Tensor, drop_path: Tensor | None, dtype: torch.dtype, *, want_sum: bool
) -> tuple[Tensor, Tensor | None]:
    """drop_path * grad as (M, N) in `dtype`, and the sum of its rows in float32: one pass over `grad`."""
    batch, grad = grad.shape[0], rows(grad)
    m, n = grad.shape
    if drop_path is None and grad.dtype == dtype:
        return grad, grad.sum(0, dtype=torch.float32) if want_sum else None
    columns = triton.cdiv(n, _ROWS_BLOCK_N)
    most = max(1, _ROWS_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(grad.device) // columns)
    strips = min(most, triton.cdiv(m, 4 * _ROWS_BLOCK_M))
    out = torch.empty(m, n, dtype=dtype, device=grad.device)
    shares = torch.empty(strips, n, dtype=torch.float32, device=grad.device) if want_sum else None
    launch(
        _scale_rows,
        columns * strips,
        grad,
        grad.stride(0),
        None if drop_path is None else drop_path.contiguous(),
        m // batch,
        out,
        shares,
        m,
        n,
        columns,
        strips,
        BLOCK_M=_ROWS_BLOCK_M,
        BLOCK_N=_ROWS_BLOCK_N,
        num_warps=8,
        num_stages=2,
    )
    return out, None if shares is None else shares.sum(0)


def scale_backward(
    weight_grad: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor,
    want_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """LayerScale's part: gradients of weight, bias and layer_scale from Q (N, K) and the sum of h (N,) in float32."""
    bias_grad = None if total is None else total * layer_scale
    if weight_grad is None:
        return None, bias_grad, None
    n, k = weight_grad.shape
    weight = rows(weight)
    out = torch.empty(n, k, dtype=weight.dtype, device=weight.device)
    scale_grad = torch.empty(n, dtype=torch.float32, device=weight.device) if want_scale else None
    launch(
        _scale_backward,
        n,
        weight_grad,
        total,
        weight,
        weight.stride(0),
        None if bias is None else bias.contiguous(),
        layer_scale.contiguous(),
        out,
        scale_grad,
        k,
        BLOCK_K=_SCALE_BLOCK_K,
        num_warps=4,
        num_stages=1,
    )
    return out, bias_grad, scale_grad


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
    finish(
        acc, bias, layer_scale, drop_path, sample_rows, residual, residual_row, out, row, column, M, N, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit
def _persistent(
    x, x_row, weight, weight_row, bias, layer_scale, drop_path, sample_rows, residual, residual_row, out, M, N, K,
    programs, PARTS: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Each program makes every `programs`-th tile: one group of warps loads, while the others multiply and store.

    Two PARTS end one after the other: all their columns of residual and result at once spill, or, in float32, exceed
    shared memory.
    """
    PART: tl.constexpr = BLOCK_N // PARTS
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [x_row, 1], [BLOCK_M, BLOCK_K])
    weight_tiles = tl.make_tensor_descriptor(weight, [N, K], [weight_row, 1], [PART, BLOCK_K])
    residual_tiles = tl.make_tensor_descriptor(residual, [M, N], [residual_row, 1], [BLOCK_M, PART])
    out_tiles = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, PART])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLAT, warp_specialize=True):
        row, column = tile_index(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row *= BLOCK_M
        column *= BLOCK_N
        left, right = streamed_products(
            x_tiles, weight_tiles, row, column, column + PART, K, PARTS == 2, BLOCK_M, PART, BLOCK_K
        )
        m = row + tl.arange(0, BLOCK_M)
        n = column + tl.arange(0, PART)
        left = _scaled(left, bias, layer_scale, drop_path, sample_rows, m, n, M, N)
        left += residual_tiles.load([row, column]).to(tl.float32)
        out_tiles.store([row, column], left.to(out.dtype.element_ty))
        if PARTS == 2:
            right = _scaled(right, bias, layer_scale, drop_path, sample_rows, m, n + PART, M, N)
            right += residual_tiles.load([row, column + PART]).to(tl.float32)
            out_tiles.store([row, column + PART], right.to(out.dtype.element_ty))


@triton.jit
def _scaled(acc, bias, layer_scale, drop_path, sample_rows, m, n, M, N):
    """drop_path * layer_scale * (acc + bias) of rows `m` and columns `n`."""
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if layer_scale is not None:
        acc *= tl.load(layer_scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if drop_path is not None:
        acc *= tl.load(drop_path + m // sample_rows, mask=m < M, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def finish(
    acc, bias, layer_scale, drop_path, sample_rows, residual, residual_row, out, row, column, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store residual + drop_path * layer_scale * (acc + bias)."""
    i = tl.arange(0, BLOCK_M)[:, None]
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    mask = (m[:, None] < M) & (n[None, :] < N)
    acc = _scaled(acc, bias, layer_scale, drop_path, sample_rows, m, n, M, N)
    at = residual + tl.cast(row, tl.int64) * residual_row + (i * residual_row + n[None, :])
    acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = out + tl.cast(row, tl.int64) * N + (i * N + n[None, :])
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    branch, bias, layer_scale, drop_path, sample_rows, residual, residual_row, out, M, N, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // columns * BLOCK_M
    column = tl.program_id(0) % columns * BLOCK_N
    i = tl.arange(0, BLOCK_M)[:, None]
    n = column + tl.arange(0, BLOCK_N)[None, :]
    at = branch + tl.cast(row, tl.int64) * N + (i * N + n)
    acc = tl.load(at, mask=(row + i < M) & (n < N), other=0.0).to(tl.float32)
    finish(
        acc, bias, layer_scale, drop_path, sample_rows, residual, residual_row, out, row, column, M, N, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit
def _scale_rows(
    grad, grad_row, drop_path, sample_rows, out, shares, M, N, columns, strips,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program walks down a strip of rows.  shares (strips, N): the strips' sums of `out`."""
    strip = tl.program_id(0) // columns
    i = tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for row in tl.range(strip * BLOCK_M, M, strips * BLOCK_M):
        mask = (row + i < M) & (n[None, :] < N)
        first = tl.cast(row, tl.int64)
        g = tl.load(grad + first * grad_row + (i * grad_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
        if drop_path is not None:
            g *= tl.load(drop_path + (row + i) // sample_rows, mask=row + i < M, other=0.0).to(tl.float32)
        total += tl.sum(g, 0)
        tl.store(out + first * N + (i * N + n[None, :]), g.to(out.dtype.element_ty), mask=mask)
    if shares is not None:
        tl.store(shares + strip * N + n, total, mask=n < N)


@triton.jit
def _scale_backward(
    product, total, weight, weight_row, bias, layer_scale, out, scale_grad, K, BLOCK_K: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0)
    first = tl.cast(n, tl.int64)
    scale = tl.load(layer_scale + n).to(tl.float32)
    dot = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        q = tl.load(product + first * K + k, mask=k < K, other=0.0)
        if scale_grad is not None:
            dot += q * tl.load(weight + first * weight_row + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(out + first * K + k, (q * scale).to(out.dtype.element_ty), mask=k < K)
    if scale_grad is not None:
        gradient = tl.sum(dot, 0)
        if bias is not None:
            gradient += tl.load(bias + n).to(tl.float32) * tl.load(total + n)
        tl.store(scale_grad + n, gradient)
