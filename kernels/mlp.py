"""mlp: x + drop_path * layer_scale * fc2(activation(fc1(norm(x)))), forward and backward.

Shapes: x (M, D), fc1_weight (H, D), or (2 H, D) = [gate; value] for swiglu, fc2_weight (D, H), out (M, D).

The forward is norm_linear and linear_residual.  In training it keeps one tensor beside x: what fc1 made, before the
activation, 2 H bytes a row in 16 bits (eager keeps norm(x), both sides of the activation and the branch, 4 D + 4 H).

In inference of narrow models it may be one kernel, whose programs keep rows of norm(x) and walk along the hidden
dimension: a block of hidden activations lives in registers alone.  Cost at H = 4 D in 16 bits: 16 M D^2 flops either
way; 24 M D bytes in three launches (x three times, the hidden activations twice, out once), 4 M D in one.  The three do
D / 1.5 flops a byte, below the ridge of an H100 (270) where D < 400: memory bounds them, and one kernel is faster where
it reaches the share D / 1.5 / 270 of the tensor cores' peak, 47 % at D = 192, 63 % at 256, 95 % at 384.  Every program
reads all weights, 16 D^2 bytes, from L2: with 128 rows to a program 128 flops a byte, about what L2 can feed.  By rule
it runs where half the peak would do and programs fill the device; nothing is measured.

Cost of the backward in 16 bits: 8 M D H flops in four products.  ViT-B/16, batch 256 (M = 50,432, D = 768, H = 3,072):
952 GFLOP.  What a product of (M, D) and (D, H) costs in eager beside its flops is the hidden gradient written and read
again by the activation's backward, 2 x 310 MB, 0.2 ms: `_hidden_gradient` multiplies it by the activation's derivative
in its epilogue, where it also makes the hidden activations again, which fc2's weight needs, and sums fc1's bias's.
"""

# ruff: noqa: SIM108 - a constant `if` of Triton's is no expression

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels import choices
from fastvit.kernels.activations import activate, activation_backward, activation_gradients
from fastvit.kernels.launch import arch, launch, multiprocessors, precision, rows
from fastvit.kernels.linear_residual import finish, linear_residual, scale_backward, scale_rows
from fastvit.kernels.norm_linear import norm_linear, projection_backward
from fastvit.kernels.product import GROUP_M, Tile, tile_index, tile_product_transposed, weight_gradient
from torch import Tensor

SCHEDULES = ("composed", "fused")


class _Fused(NamedTuple):
    block_m: int
    block_h: int
    uneven_h: int  # block_h where it doesn't divide H: masks take registers
    num_warps: int
    num_stages: int
    ridge: int  # flops a byte at which the tensor cores in 16 bits and memory take equal time


_FUSED = {
    "sm80": _Fused(64, 32, 32, 4, 2, 150),
    "sm90": _Fused(128, 64, 32, 8, 2, 270),
    "sm100": _Fused(128, 64, 64, 8, 2, 280),
    "gfx942": _Fused(128, 32, 32, 8, 2, 250),
}
# The widest D whose rows of norm(x) and of the result fit a program.
FUSED_WIDTH = 256

# The hidden gradient's product in 16 bits, whose epilogue holds four tiles.  In float32 it is a product of cuBLAS's and
# a pass of its own.
_TILES = {
    "sm80": Tile(128, 64, 32, 8, 3),
    "sm90": Tile(128, 64, 64, 8, 4),
    "sm100": Tile(128, 64, 64, 8, 4),
    "gfx942": Tile(128, 64, 32, 8, 2),
}


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    pre: Tensor | None = None,
) -> Tensor:
    """Launch: same signature and meaning as `fastvit.ops.mlp`.

    `pre` (M, rows of fc1_weight), of the dtype that products run in, receives what fc1 made of norm(x).
    """
    if pre is None and _schedule(x, fc1_weight, fc2_weight, norm, activation) == "fused":
        return _launch_fused(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm, norm_weight, norm_bias, eps, activation, layer_scale,
            drop_path,
        )  # fmt: skip
    hidden = norm_linear(
        x,
        fc1_weight,
        fc1_bias,
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        activation=activation,
        pre=pre,
    )
    return linear_residual(hidden, fc2_weight, fc2_bias, residual=x, layer_scale=layer_scale, drop_path=drop_path)


def _pieces(d: int) -> tuple[int, int]:
    """The largest power of two below `d`, and the rest."""
    width = triton.next_power_of_2(d) // 2
    return width, d - width


def _schedule(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, norm: str, activation: str) -> str:
    """One of SCHEDULES that can run this MLP: the one known to be the fastest, or else by its size."""
    (d, h), m, on = fc2_weight.shape, x.shape[:-1].numel(), arch(x.device)
    dtype, (_, rest) = fc1_weight.dtype, _pieces(d)
    low = dtype == fc2_weight.dtype and dtype in (torch.bfloat16, torch.float16)
    # A product of tensor cores is at least 16 wide.
    fits = d <= FUSED_WIDTH and rest >= 16 and rest == triton.next_power_of_2(rest)
    able = {"composed": True, "fused": low and fits and activation != "swiglu"}
    chosen = choices.choose(on, choices.key("mlp", dtype, f"{norm} {activation}", h, d), m, able)
    if chosen is not None:
        return chosen
    tile = _FUSED[on]
    fills = m >= tile.block_m * multiprocessors(x.device)
    return "fused" if able["fused"] and fills and d / 1.5 <= tile.ridge / 2 else "composed"


def _launch_fused(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, x = x.shape[0], rows(x)
    fc1_weight, fc2_weight = rows(fc1_weight), rows(fc2_weight)
    vectors = (norm_weight, norm_bias, fc1_bias, fc2_bias, layer_scale, drop_path)
    norm_weight, norm_bias, fc1_bias, fc2_bias, layer_scale, drop_path = (
        None if t is None else t.contiguous() for t in vectors
    )
    (m, d), h = x.shape, fc1_weight.shape[0]
    width, rest = _pieces(d)
    tile = _FUSED[arch(x.device)]
    block_h = tile.block_h if h % tile.block_h == 0 else tile.uneven_h
    launch(
        _fused,
        triton.cdiv(m, tile.block_m),
        x,
        x.stride(0),
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_weight.stride(0),
        fc1_bias,
        fc2_weight,
        fc2_weight.stride(0),
        fc2_bias,
        layer_scale,
        drop_path,
        m // batch,
        out,
        m,
        h,
        eps,
        NORM=norm,
        ACTIVATION=activation,
        EVEN_H=h % block_h == 0,
        WIDTH=width,
        REST=rest,
        BLOCK_M=tile.block_m,
        BLOCK_H=block_h,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def mlp_backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias and layer_scale.

    Args:
        grad: of x's shape and dtype.
        pre: as `mlp` fills it.
        fc1_weight, fc2_weight: in the dtype of `pre`.
        needs: which of the eight are wanted; the others may be None.

    Returns:
        x's in the dtype of `x`, all others in float32 or that of their argument.
    """
    need_x, need_fc1, need_fc1_bias, need_fc2, need_fc2_bias, need_norm, need_norm_bias, need_scale = needs
    dtype = pre.dtype
    branch_grad, total = scale_rows(grad, drop_path, dtype, want_sum=need_fc2_bias or need_scale)
    need_q = need_fc2 or need_scale
    below = need_x or need_fc1 or need_fc1_bias or need_norm or need_norm_bias
    scaled = fc2_weight if layer_scale is None else (fc2_weight * layer_scale[:, None]).to(dtype)
    pre_grad, hidden, fc1_bias_grad = hidden_gradient(branch_grad, scaled, pre, activation, want_hidden=need_q)
    fc2_grad = scale_grad = None
    if need_q:
        assert hidden is not None
        fc2_grad = weight_gradient(branch_grad, hidden, dtype if layer_scale is None else torch.float32)
        del hidden
    fc2_bias_grad = total
    if layer_scale is not None:
        fc2_grad, fc2_bias_grad, scale_grad = scale_backward(
            fc2_grad, total, fc2_weight, fc2_bias, layer_scale, need_scale
        )
    x_grad = fc1_grad = norm_grad = norm_bias_grad = None
    if below:
        x_grad, fc1_grad, norm_grad, norm_bias_grad = projection_backward(
            pre_grad,
            x,
            fc1_weight,
            norm,
            norm_weight,
            norm_bias,
            eps,
            (need_x, need_fc1, need_norm or need_norm_bias),
            add=grad,
        )
    return [x_grad, fc1_grad, fc1_bias_grad, fc2_grad, fc2_bias_grad, norm_grad, norm_bias_grad, scale_grad]


def hidden_gradient(
    grad: Tensor, weight: Tensor, pre: Tensor, activation: str, *, want_hidden: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradient of `pre` given that of activation(pre) @ weight.T, activation(pre) if wanted, the sum of the rows.

    Args:
        grad: (M, D) with unit stride in the last dimension.
        weight: (D, H).
        pre: (M, H), or (M, 2 H) for swiglu, contiguous.
    """
    if pre.dtype == torch.float32:
        return activation_backward(torch.mm(grad, weight), pre, activation, want_hidden=want_hidden)
    weight = rows(weight)
    (m, d), h = grad.shape, weight.shape[1]
    tile = _TILES[arch(grad.device)]
    row_tiles = triton.cdiv(m, tile.block_m)
    out = torch.empty_like(pre)
    hidden = torch.empty(m, h, dtype=pre.dtype, device=pre.device) if want_hidden else None
    shares = torch.empty(row_tiles, pre.shape[1], dtype=torch.float32, device=pre.device)
    launch(
        _hidden_gradient,
        row_tiles * triton.cdiv(h, tile.block_n),
        grad,
        grad.stride(0),
        weight,
        weight.stride(0),
        pre,
        out,
        hidden,
        shares,
        m,
        h,
        d,
        ACTIVATION=activation,
        EVEN_K=d % tile.block_k == 0,
        ALIGN=math.gcd(16, d, h, grad.stride(0), weight.stride(0)),
        PRECISION=precision(pre.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, hidden, shares.sum(0)


@triton.jit
def _load_rows(x, x_row, row, column, M, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `row`.. from column `column` on in float32; those beyond the last repeat the last."""
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)[:, None]
    k = column + tl.arange(0, WIDTH)[None, :]
    return tl.load(x + tl.cast(row, tl.int64) * x_row + (m * x_row + k)).to(tl.float32)


@triton.jit
def _affine(values, norm_weight, norm_bias, column, WIDTH: tl.constexpr):
    k = column + tl.arange(0, WIDTH)
    if norm_weight is not None:
        values *= tl.load(norm_weight + k).to(tl.float32)[None, :]
    if norm_bias is not None:
        values += tl.load(norm_bias + k).to(tl.float32)[None, :]
    return values


@triton.jit
def _load_weight(at, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _fused(
    x, x_row, norm_weight, norm_bias, fc1_weight, fc1_row, fc1_bias, fc2_weight, fc2_row, fc2_bias, layer_scale,
    drop_path, sample_rows, out, M, H, eps,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_H: tl.constexpr,
    WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program makes rows of the result.  A row is two pieces, WIDTH and REST: 192 is no power of two, 128 and 64 are.

    What is beyond H counts nothing: activations of 0 are 0.
    """
    D: tl.constexpr = WIDTH + REST
    dtype: tl.constexpr = fc1_weight.dtype.element_ty
    row = tl.program_id(0) * BLOCK_M
    a = _load_rows(x, x_row, row, 0, M, BLOCK_M, WIDTH)
    b = _load_rows(x, x_row, row, WIDTH, M, BLOCK_M, REST)
    if NORM == "layer":
        mean = (tl.sum(a, 1) + tl.sum(b, 1)) / D
        a -= mean[:, None]
        b -= mean[:, None]
    if NORM != "none":
        rstd = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)
        a = _affine(a * rstd[:, None], norm_weight, norm_bias, 0, WIDTH)
        b = _affine(b * rstd[:, None], norm_weight, norm_bias, WIDTH, REST)
    a = a.to(dtype)
    b = b.to(dtype)
    h = tl.arange(0, BLOCK_H)
    k = tl.arange(0, WIDTH)
    k_rest = WIDTH + tl.arange(0, REST)
    fc1_at = fc1_weight + (h[:, None] * fc1_row + k[None, :])
    fc1_rest_at = fc1_weight + (h[:, None] * fc1_row + k_rest[None, :])
    fc2_at = fc2_weight + (k[:, None] * fc2_row + h[None, :])
    fc2_rest_at = fc2_weight + (k_rest[:, None] * fc2_row + h[None, :])
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    for start in tl.range(0, H, BLOCK_H):
        inside = h < H - start
        hidden = tl.dot(a, tl.trans(_load_weight(fc1_at, inside[:, None], EVEN_H)))
        hidden = tl.dot(b, tl.trans(_load_weight(fc1_rest_at, inside[:, None], EVEN_H)), hidden)
        if fc1_bias is not None:
            hidden += tl.load(fc1_bias + start + h, mask=inside, other=0.0).to(tl.float32)[None, :]
        hidden = activate(hidden, ACTIVATION, False).to(dtype)
        acc = tl.dot(hidden, tl.trans(_load_weight(fc2_at, inside[None, :], EVEN_H)), acc)
        acc_rest = tl.dot(hidden, tl.trans(_load_weight(fc2_rest_at, inside[None, :], EVEN_H)), acc_rest)
        fc1_at += BLOCK_H * fc1_row
        fc1_rest_at += BLOCK_H * fc1_row
        fc2_at += BLOCK_H
        fc2_rest_at += BLOCK_H
    finish(acc_rest, fc2_bias, layer_scale, drop_path, sample_rows, x, x_row, out, row, WIDTH, M, D, BLOCK_M, REST)
    finish(acc, fc2_bias, layer_scale, drop_path, sample_rows, x, x_row, out, row, 0, M, D, BLOCK_M, WIDTH)


@triton.jit
def _hidden_gradient(
    grad, grad_row, weight, weight_row, pre, out, hidden, shares, M, N, K,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """shares (tiles of rows, N or 2 N): the tiles' sums of `out`."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    WIDE: tl.constexpr = 2 if GATED else 1
    row_tile, column = tile_index(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = row_tile * BLOCK_M
    column *= BLOCK_N
    acc = tile_product_transposed(
        grad, grad_row, weight, weight_row, row, column, M, N, K, EVEN_K, ALIGN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    i = tl.arange(0, BLOCK_M)[:, None]
    n = column + tl.arange(0, BLOCK_N)
    mask = (row + i < M) & (n[None, :] < N)
    acc = tl.where(mask, acc, 0.0)
    first = tl.cast(row, tl.int64)
    at = first * (N * WIDE) + (i * (N * WIDE) + n[None, :])
    gate = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        value = tl.load(pre + at + N, mask=mask, other=0.0).to(tl.float32)
    else:
        value = gate
    y, gate_grad, value_grad = activation_gradients(acc, gate, value, ACTIVATION, False)
    tl.store(out + at, gate_grad.to(out.dtype.element_ty), mask=mask)
    share = shares + row_tile * (N * WIDE) + n
    tl.store(share, tl.sum(gate_grad, 0), mask=n < N)
    if GATED:
        tl.store(out + at + N, value_grad.to(out.dtype.element_ty), mask=mask)
        tl.store(share + N, tl.sum(value_grad, 0), mask=n < N)
    if hidden is not None:
        at = hidden + first * N + (i * N + n[None, :])
        tl.store(at, y.to(hidden.dtype.element_ty), mask=mask)
