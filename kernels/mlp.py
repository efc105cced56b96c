"""mlp in training: x + drop_path * layer_scale * fc2(activation(fc1(norm(x)))), forward and backward.

Shapes: x (M, D), fc1_weight (H, D), or (2 H, D) = [gate; value] for swiglu, fc2_weight (D, H), out (M, D).

The forward is norm_linear and linear_residual, and keeps one tensor beside x: what fc1 made, before the activation, 2 H
bytes a row in 16 bits (eager keeps norm(x), both sides of the activation and the branch, 4 D + 4 H).

Cost of the backward in 16 bits: 8 M D H flops in four products.  ViT-B/16, batch 256 (M = 50,432, D = 768, H = 3,072):
952 GFLOP.  What a product of (M, D) and (D, H) costs in eager beside its flops is the hidden gradient written and read
again by the activation's backward, 2 x 310 MB, 0.2 ms: `_hidden_gradient` multiplies it by the activation's derivative
in its epilogue, where it also makes the hidden activations again, which fc2's weight needs, and sums fc1's bias's.
"""

# ruff: noqa: SIM108 - a constant `if` of Triton's is no expression

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastvit.kernels.activations import activation_backward, activation_gradients
from fastvit.kernels.launch import arch, compute_dtype, launch, precision, rows
from fastvit.kernels.linear_residual import linear_residual, scale_backward, scale_rows
from fastvit.kernels.norm_linear import norm_linear, projection_backward
from fastvit.kernels.product import GROUP_M, Tile, tile_index, tile_product_transposed, weight_gradient
from torch import Tensor

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
) -> tuple[Tensor, Tensor]:
    """`fastvit.ops.mlp`, and what fc1 made of norm(x) (M, rows of fc1_weight), in the dtype that products run in."""
    m = x.shape[:-1].numel()
    pre = torch.empty(m, fc1_weight.shape[0], dtype=compute_dtype(x, fc1_weight), device=x.device)
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
    return linear_residual(
        hidden, fc2_weight, fc2_bias, residual=x, layer_scale=layer_scale, drop_path=drop_path
    ), pre  # fmt: skip


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
        pre: as `mlp` returns it.
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
