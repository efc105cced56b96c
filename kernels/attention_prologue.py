"""What happens to q and k before attention: LayerNorm or RMSNorm over the head dim, then rotary positions.

Shapes: x (B, N, H, D) with any strides between rows, y (B, N, H, D); weight and bias (D,); cos and sin (P, D) for the
last P tokens.

One pass over memory: 4 N H D bytes in 16 bits.  Attention reads a key once for every block of queries; normalised there
it would be normalised as often.  The backward makes statistics and rotation anew from x, so nothing is kept for it; its
gradients of weight and bias are partial sums of each program, added up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels.attention_call import unit_stride
from fastvit.kernels.launch import launch, multiprocessors
from torch import Tensor

# Rows of a head dim padded to 128 that one block takes, and warps.
_ROWS, _WARPS = 32, 4


def prologue(
    x: Tensor,
    *,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Launch: x normalised and rotated, contiguous, in its own dtype."""
    x = unit_stride(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_forward, x, y, None, None, None, norm, weight, bias, eps, rope, interleaved)
    return y


def prologue_backward(
    grad: Tensor,
    x: Tensor,
    *,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch: the gradients of x, weight and bias.  grad is contiguous (B, N, H, D)."""
    x = unit_stride(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = _programs(x)
    partial = [
        None if t is None else torch.empty(count, x.shape[-1], dtype=torch.float32, device=x.device)
        for t in (weight, bias)
    ]
    _launch(_backward, x, grad, dx, *partial, norm, weight, bias, eps, rope, interleaved)
    d_weight, d_bias = (
        None if sums is None or t is None else sums.sum(0).to(t.dtype)
        for sums, t in zip(partial, (weight, bias), strict=True)
    )
    return dx, d_weight, d_bias


def _programs(x: Tensor) -> int:
    """Each takes several blocks of rows, so that there are few partial sums."""
    return min(-(-x.numel() // x.shape[-1] // _ROWS), 8 * multiprocessors(x.device))


def _launch(
    kernel: object,
    x: Tensor,
    y: Tensor,
    dx: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rope: tuple[Tensor, Tensor] | None,
    interleaved: bool,
) -> None:
    batch, tokens, heads, head_dim = x.shape
    cos, sin = (None, None) if rope is None else (t.contiguous() for t in rope)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    launch(
        kernel,
        _programs(x),
        x,
        y,
        dx,
        weight,
        bias,
        d_weight,
        d_bias,
        cos,
        sin,
        batch * tokens * heads,
        tokens,
        heads,
        0 if cos is None else tokens - cos.shape[0],
        *x.stride()[:3],
        eps,
        HEAD_DIM=head_dim,
        PADDED=triton.next_power_of_2(head_dim),
        NORM=norm,
        INTERLEAVED=interleaved,
        ROWS=max(1, _ROWS * 128 // max(128, triton.next_power_of_2(head_dim))),
        num_warps=_WARPS,
        num_stages=1,
    )


@triton.jit
def _partner(d, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel that d is rotated with."""
    if INTERLEAVED:
        return d ^ 1
    else:
        return tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)


@triton.jit
def _sign(d, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        return tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        return tl.where(d < HEAD_DIM // 2, -1.0, 1.0)


@triton.jit
def _row_statistics(x, d, eps, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Mean (0 for RMSNorm) and 1 / standard deviation, as columns."""
    mean = tl.zeros([x.shape[0], 1], tl.float32)
    if NORM == "layer":
        mean = tl.sum(x, 1, keep_dims=True) / HEAD_DIM
    centred = tl.where(d < HEAD_DIM, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / HEAD_DIM + eps)


@triton.jit
def _affine(x, mean, rstd, weight, bias, d, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    if NORM != "none":
        x = (x - mean) * rstd
        if weight is not None:
            x *= tl.load(weight + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    return x


@triton.jit
def _at(row, tokens, heads, batch_stride, row_stride, head_stride):
    token = row // heads
    at = (token // tokens).to(tl.int64) * batch_stride + (token % tokens).to(tl.int64) * row_stride
    return at + (row % heads).to(tl.int64) * head_stride


@triton.jit
def _forward(
    x, y, dx, weight, bias, d_weight, d_bias, cos, sin, rows, tokens, heads, prefix,
    x_batch, x_row, x_head, eps,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, PADDED)[None, :]
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (d < HEAD_DIM)
        at = x + _at(row, tokens, heads, x_batch, x_row, x_head)
        values = tl.load(at + d, mask=mask, other=0.0).to(tl.float32)
        mean, rstd = values, values
        if NORM != "none":
            mean, rstd = _row_statistics(values, d, eps, HEAD_DIM, NORM)
        result = _affine(values, mean, rstd, weight, bias, d, HEAD_DIM, NORM)
        if cos is not None:
            patch = row // heads % tokens - prefix
            rotated = mask & (patch >= 0)
            other = _partner(d, HEAD_DIM, INTERLEAVED)
            partner = tl.load(at + other, mask=rotated, other=0.0).to(tl.float32)
            partner = _affine(partner, mean, rstd, weight, bias, other, HEAD_DIM, NORM)
            c = tl.load(cos + patch * HEAD_DIM + d, mask=rotated, other=1.0).to(tl.float32)
            s = tl.load(sin + patch * HEAD_DIM + d, mask=rotated, other=0.0).to(tl.float32)
            result = result * c + partner * _sign(d, HEAD_DIM, INTERLEAVED) * s
        tl.store(y + row.to(tl.int64) * HEAD_DIM + d, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    x, grad, dx, weight, bias, d_weight, d_bias, cos, sin, rows, tokens, heads, prefix,
    x_batch, x_row, x_head, eps,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, PADDED)[None, :]
    weight_sums = tl.zeros([PADDED], tl.float32)
    bias_sums = tl.zeros([PADDED], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (d < HEAD_DIM)
        to = row.to(tl.int64) * HEAD_DIM
        g = tl.load(grad + to + d, mask=mask, other=0.0).to(tl.float32)
        if cos is not None:
            # Back by the same angle: the partner's sine, and the other sign.
            patch = row // heads % tokens - prefix
            rotated = mask & (patch >= 0)
            other = _partner(d, HEAD_DIM, INTERLEAVED)
            partner = tl.load(grad + to + other, mask=rotated, other=0.0).to(tl.float32)
            c = tl.load(cos + patch * HEAD_DIM + d, mask=rotated, other=1.0).to(tl.float32)
            s = tl.load(sin + patch * HEAD_DIM + other, mask=rotated, other=0.0).to(tl.float32)
            g = g * c - partner * _sign(d, HEAD_DIM, INTERLEAVED) * s
        if NORM != "none":
            values = tl.load(x + _at(row, tokens, heads, x_batch, x_row, x_head) + d, mask=mask, other=0.0)
            values = values.to(tl.float32)
            mean, rstd = _row_statistics(values, d, eps, HEAD_DIM, NORM)
            hat = tl.where(mask, (values - mean) * rstd, 0.0)
            weight_sums += tl.sum(g * hat, 0)
            bias_sums += tl.sum(g, 0)
            if weight is not None:
                g *= tl.load(weight + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
            inner = g - hat * (tl.sum(g * hat, 1, keep_dims=True) / HEAD_DIM)
            if NORM == "layer":
                inner -= tl.sum(g, 1, keep_dims=True) / HEAD_DIM
            g = inner * rstd
        tl.store(dx + to + d, g.to(dx.dtype.element_ty), mask=mask)
    channel = tl.arange(0, PADDED)
    into = tl.program_id(0) * HEAD_DIM + channel
    if d_weight is not None:
        tl.store(d_weight + into, weight_sums, mask=channel < HEAD_DIM)
    if d_bias is not None:
        tl.store(d_bias + into, bias_sums, mask=channel < HEAD_DIM)
