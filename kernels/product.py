"""The products that norm_linear, linear_residual and mlp share: tiles accumulated in float32, and pure products."""

# ruff: noqa: SIM108 - a constant `if` of Triton's is no expression

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels.launch import arch, precision
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

# Rows of tiles that run before the next ones: they share columns of weight in L2.
GROUP_M = 8

# The rows above which persistent products run where choices.json knows nothing better.  Those make three rounds of
# tiles on an H100 at N = 768, so that the last round is nearly full.
PERSISTENT_ROWS = 16384


class Persistent(NamedTuple):
    """A tile of a persistent product, in `parts` accumulators side by side; flat: all tiles' steps are one loop.

    Triton specialises warps for Hopper only if asked for four, and gives each half of 128 rows four of its own: 256
    columns at once leave an epilogue no registers there.  On Blackwell accumulators lie in tensor memory, two of which
    take warps, and with them registers, of their own.  Triton specialises flat loops of one accumulator there, and from
    3.7 on nested ones too.
    """

    tile: Tile
    parts: int
    flat: bool


def persists(*operands: Tensor) -> bool:
    """Can a persistent product read and write `operands`, rows of unit stride?

    The descriptors of TMA take addresses and strides that are multiples of 16 bytes, and no stride of 0.
    """
    return all(
        t.stride(0) > 0 and t.stride(0) * t.element_size() % 16 == 0 and (t.is_meta or t.data_ptr() % 16 == 0)
        for t in operands
    )


def tile_for(device: torch.device, dtype: torch.dtype, m: int) -> Tile:
    """The tile of a product of `m` rows in `dtype`."""
    kind = precision(dtype) if dtype == torch.float32 else "16"
    return next(tile for (of, most), tile in _TILES[arch(device)].items() if of == kind and (most is None or m <= most))


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad.T @ x: (M, N), (M, K) -> (N, K), accumulated in float32 and rounded once, to `dtype`.

    A pure product with nothing to fuse and M long sums in few tiles, which cuBLAS splits better than a tile loop.
    """
    grad = grad.t()
    if dtype == x.dtype or torch.version.hip is not None:
        return torch.mm(grad, x).to(dtype)
    if grad.device.type == "cuda":
        return torch.mm(grad, x, out_dtype=torch.float32).to(dtype)
    return torch.mm(grad.float(), x.float()).to(dtype)


@triton.jit
def tile_index(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a tile.  GROUP_M rows of tiles come before the next, so that they share weights in L2."""
    rows = tl.cdiv(M, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * columns)
    inside = tile % (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    return group * GROUP_M + inside % height, inside // height


@triton.jit
def tile_product(
    x, x_row, weight, weight_row, mean, rstd, norm_weight, norm_bias, row, column, M, N, K, VALUE,
    NORM: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `row`.. of norm(x) times rows `column`.. of weight; GATED: times rows VALUE + `column`.. too.

    Products run in weight's dtype.  Rows are normalised, or only converted, between shared memory and the tensor core,
    by the row statistics `mean` and `rstd` [M]; NORM "none" with x in weight's dtype leaves them as they are.
    Rows and columns beyond the last repeat the last and are for the caller to leave out.
    """
    if ALIGN < 16:  # a common divisor of K and both strides; Triton finds 16 in the arguments itself
        x_row = tl.multiple_of(x_row, ALIGN)
        weight_row = tl.multiple_of(weight_row, ALIGN)
        K = tl.multiple_of(K, ALIGN)
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - column)
    k = tl.arange(0, BLOCK_K)
    # In-tile offsets fit 32 bits, tensors need not.
    x_at = x + tl.cast(row, tl.int64) * x_row + (m[:, None] * x_row + k[None, :])
    weight_at = weight + tl.cast(column, tl.int64) * weight_row + (n[:, None] * weight_row + k[None, :])
    if GATED:
        value_at = weight_at + tl.cast(VALUE, tl.int64) * weight_row
        value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if NORM != "none":
        scale = tl.load(rstd + row + m)[:, None]
        if NORM == "layer":
            centre = tl.load(mean + row + m)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        inside = k < K - start
        if EVEN_K:
            a = tl.load(x_at)
            b = tl.load(weight_at)
        else:
            a = tl.load(x_at, mask=inside[None, :], other=0.0)
            b = tl.load(weight_at, mask=inside[None, :], other=0.0)
        if NORM != "none":
            a = a.to(tl.float32)
            if NORM == "layer":
                a = a - centre
            a = a * scale
            if norm_weight is not None:
                a = a * tl.load(norm_weight + start + k, mask=inside, other=0.0).to(tl.float32)[None, :]
            if norm_bias is not None:
                a = a + tl.load(norm_bias + start + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        a = a.to(weight.dtype.element_ty)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        if GATED:
            if EVEN_K:
                v = tl.load(value_at)
            else:
                v = tl.load(value_at, mask=inside[None, :], other=0.0)
            value = tl.dot(a, tl.trans(v), value, input_precision=PRECISION)
            value_at += BLOCK_K
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if GATED:
        return acc, value
    else:
        return acc, acc


@triton.jit
def streamed_products(
    x_tiles, weight_tiles, row, first, second, K,
    TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `row`.. of x times rows `first`.. of weight, loaded by TMA; TWO: times rows `second`.. too."""
    a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        x = x_tiles.load([row, k])
        a = tl.dot(x, weight_tiles.load([first, k]).T, a)
        if TWO:
            b = tl.dot(x, weight_tiles.load([second, k]).T, b)
    return a, b


@triton.jit
def tile_product_transposed(
    x, x_row, weight, weight_row, row, column, M, N, K,
    EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `row`.. of x (M, K) times columns `column`.. of weight (K, N): the gradient of a linear's input.

    Rows beyond the last repeat the last and columns are zero: for the caller to leave out.
    """
    if ALIGN < 16:  # a common divisor of N, K and both strides
        x_row = tl.multiple_of(x_row, ALIGN)
        weight_row = tl.multiple_of(weight_row, ALIGN)
        N = tl.multiple_of(N, ALIGN)
        K = tl.multiple_of(K, ALIGN)
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)
    n = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + tl.cast(row, tl.int64) * x_row + (m[:, None] * x_row + k[None, :])
    weight_at = weight + (k[:, None] * weight_row + n[None, :])
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at)
            b = tl.load(weight_at, mask=n[None, :] < N, other=0.0)
        else:
            inside = k < K - start
            a = tl.load(x_at, mask=inside[None, :], other=0.0)
            b = tl.load(weight_at, mask=inside[:, None] & (n[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_at += BLOCK_K
        weight_at += BLOCK_K * tl.cast(weight_row, tl.int64)
    return acc
