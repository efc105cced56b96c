"""pool: final norm, token or mean pooling, classifier head, forward and backward.

Shapes: x (B, N, D), head weight (C, D), out (B, C), or (B, D) without a head.

Cost in 16 bits: "token" reads one row a sample, the means all of x once: 2 B N D bytes, about 4 B N D flops, bound by
memory (ViT-B/16, batch 256: 77 MB); the head is 2 B D C flops (0.4 GFLOP) and the 1.5 MB of its weight.

Two launches: `_pool` makes the pooled and normalised vector, one program for each sample, and norm_linear's product
the logits.  The vector stays float32 between them.  "norm_avg" applies the norm's weight and bias once, after the
mean: they are the same for every token.

The backward needs the inputs alone: the pooled vector is made again, the norm's backward runs on what was normalised,
and x's gradient is written once, zeros included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastvit.kernels.launch import compute_dtype, launch, rows
from fastvit.kernels.norm import norm_backward, row_moments
from fastvit.kernels.norm_linear import norm_linear
from fastvit.kernels.product import weight_gradient
from torch import Tensor

# Elements of x that a program holds at a time, whatever the architecture: reading x is all that it does.
_BLOCK = 8192
_NUM_WARPS = 8


def pool(
    x: Tensor,
    *,
    mode: str = "token",
    num_prefix_tokens: int = 1,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Launch: same signature and meaning as `fastvit.ops.pool`.

    The result has the dtype of `x`, or with a head the narrower of `x` and `weight`.
    """
    out = _pooled(
        x, mode, num_prefix_tokens, norm, norm_weight, norm_bias, eps, x.dtype if weight is None else torch.float32
    )
    if weight is None:
        return out
    return norm_linear(out, weight.to(compute_dtype(x, weight)), bias, norm="none")


def _pooled(
    x: Tensor,
    mode: str,
    num_prefix_tokens: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The pooled and normalised vector (B, D) in `dtype`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, tokens, dim = x.shape
    norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
    out = torch.empty(batch, dim, dtype=dtype, device=x.device)
    first, last = (0, 1) if mode == "token" else (num_prefix_tokens, tokens)
    block_d = triton.next_power_of_2(dim)
    launch(
        _pool,
        batch,
        x,
        x.stride(0),
        x.stride(1),
        norm_weight,
        norm_bias,
        out,
        first,
        last,
        dim,
        eps,
        NORM=norm,
        NORM_FIRST=mode == "norm_avg",
        BLOCK_N=1 if mode == "token" else max(1, _BLOCK // block_d),
        BLOCK_D=block_d,
        num_warps=_NUM_WARPS,
        num_stages=1,
    )
    return out


def pool_backward(
    grad: Tensor,
    x: Tensor,
    *,
    mode: str,
    num_prefix_tokens: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, norm_weight, norm_bias, weight and bias, those that `needs` asks for, given that of the result.

    Args:
        grad: (B, C), or (B, D) without a head.
        weight: in the dtype that products run in.

    Returns:
        x's in the dtype of `x`, all others in float32 or that of their argument.
    """
    need_x, need_norm_weight, need_norm_bias, need_weight, need_bias = needs
    x_grad = weight_grad = bias_grad = norm_weight_grad = norm_bias_grad = None
    if need_bias:
        bias_grad = grad.sum(0, dtype=torch.float32)
    if weight is not None:
        dtype = compute_dtype(x, weight)
        grad = grad.to(dtype)
        if need_weight:
            pooled = _pooled(x, mode, num_prefix_tokens, norm, norm_weight, norm_bias, eps, dtype)
            weight_grad = weight_gradient(grad, pooled, dtype)
        if need_x or need_norm_weight or need_norm_bias:
            grad = torch.mm(grad, weight)
    if not (need_x or need_norm_weight or need_norm_bias):
        return [None, None, None, weight_grad, bias_grad]

    batch, tokens, dim = x.shape
    first, last = (0, 1) if mode == "token" else (num_prefix_tokens, tokens)
    if mode == "avg":  # the norm's input, in float32 so that its rounding reaches no gradient
        normed = _pooled(x, mode, num_prefix_tokens, "none", None, None, eps, torch.float32)
    else:
        normed = rows(x[:, first:last])
    if mode == "norm_avg":
        grad = (grad.float() / (last - first))[:, None].expand(batch, last - first, dim)
    grad = rows(grad)
    if norm != "none":
        normed_grad, norm_weight_grad, norm_bias_grad = norm_backward(
            grad,
            normed,
            None if norm_weight is None else norm_weight.contiguous(),
            norm,
            eps,
            want_x=need_x,
            want_affine=need_norm_weight or need_norm_bias,
        )
    else:
        normed_grad = grad
    if need_x and normed_grad is not None:
        if mode == "avg":
            normed_grad = (normed_grad.float() / (last - first))[:, None]
        else:
            normed_grad = normed_grad.view(batch, last - first, dim)
        x_grad = torch.empty(batch, tokens, dim, dtype=x.dtype, device=x.device)
        x_grad[:, :first] = 0
        x_grad[:, first:last] = normed_grad
        x_grad[:, last:] = 0
    return [x_grad, norm_weight_grad, norm_bias_grad, weight_grad, bias_grad]


@triton.jit
def _pool(
    x, x_batch, x_row, norm_weight, norm_bias, out, first, last, D, eps,
    NORM: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)
    inside = d[None, :] < D
    x += sample * x_batch
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_N):
        mask = (start + n < last) & inside
        at = x + tl.cast(start, tl.int64) * x_row + (n * x_row + d[None, :])
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if NORM_FIRST and NORM != "none":
            mean, rstd = row_moments(values, D, eps, inside, NORM == "layer")
            values = tl.where(mask, (values - mean[:, None]) * rstd[:, None], 0.0)
        total += tl.sum(values, 0)
    pooled = total / (last - first)
    if NORM != "none":
        if not NORM_FIRST:
            mean, rstd = row_moments(pooled[None, :], D, eps, inside, NORM == "layer")
            pooled = tl.sum((pooled[None, :] - mean[:, None]) * rstd[:, None], 0)
        if norm_weight is not None:
            pooled *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
        if norm_bias is not None:
            pooled += tl.load(norm_bias + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + sample * D + d, pooled.to(out.dtype.element_ty), mask=d < D)
