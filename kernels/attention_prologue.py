"""What happens to q and k before attention: LayerNorm or RMSNorm over the head dim, then rotary positions.

Shapes: x (B, N, H, D) with any strides between rows, y (B, N, H, D); weight and bias (D,); cos and sin (P, D) for the
last P tokens.

Two ways.  `load_q` and `load_k` do it in registers, inside attention's forward.  A rotated pair of channels
is two tiles of half the head dim each, never put together again: q k^T is the sum of two products of depth D / 2.
Halves that lie D / 2 apart are loaded as they are, pairs that lie side by side are split in registers; half a head dim
is padded by itself (36 of 72: 32 + 16 with 12 columns masked).  cos and sin are the same for every head and come from
L1.

`prologue` is a pass over memory before attention, 4 N H D bytes in 16 bits each for q and k, which attention reads
again.  attention.py says when it is the cheaper one.  The backward of attention takes what the pass writes, made anew
(8 N H D bytes more than attention's own) rather than kept (4 N H D written in the forward, and as much memory for every
layer until the backward).  `prologue_backward` makes statistics and rotation anew from x, too; its gradients of weight
and bias are partial sums of each program, added up in order.
"""

# ruff: noqa: RUF005 - Triton's tuples only grow by +, and its constant `if` is no expression

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels.attention_call import rope_tables, unit_stride
from fastvit.kernels.attention_tile import first, image_rows, load, load_piece, rows_of
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
    cos, sin = (None, None) if rope is None else rope_tables(rope)
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
        ROPE_STRIDE=0 if cos is None else cos.stride(0),
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
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROPE_STRIDE: tl.constexpr, ROWS: tl.constexpr,
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
            c = tl.load(cos + patch * ROPE_STRIDE + d, mask=rotated, other=1.0).to(tl.float32)
            s = tl.load(sin + patch * ROPE_STRIDE + d, mask=rotated, other=0.0).to(tl.float32)
            result = result * c + partner * _sign(d, HEAD_DIM, INTERLEAVED) * s
        tl.store(y + row.to(tl.int64) * HEAD_DIM + d, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    x, grad, dx, weight, bias, d_weight, d_bias, cos, sin, rows, tokens, heads, prefix,
    x_batch, x_row, x_head, eps,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROPE_STRIDE: tl.constexpr, ROWS: tl.constexpr,
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
            c = tl.load(cos + patch * ROPE_STRIDE + d, mask=rotated, other=1.0).to(tl.float32)
            s = tl.load(sin + patch * ROPE_STRIDE + other, mask=rotated, other=0.0).to(tl.float32)
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


@triton.constexpr_function
def _left_alone(C):
    return C.norm == "none" and C.rope == "none"


@triton.jit
def load_q(head, start, prologue, place, ROWS: tl.constexpr, C: tl.constexpr):
    """Rows start .. start + ROWS of q as products take them; beyond the last anything finite."""
    if _left_alone(C):
        return load(head, start, place.nq, place, True, ROWS, C)
    else:
        return _prepare(head, prologue.q_weight, prologue.q_bias, prologue, start, place.nq, place, True, ROWS, C)


@triton.jit
def load_k(head, start, prologue, place, MASKED: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):
    if _left_alone(C):
        return load(head, start, place.nk, place, MASKED, ROWS, C)
    else:
        return _prepare(head, prologue.k_weight, prologue.k_bias, prologue, start, place.nk, place, MASKED, ROWS, C)


@triton.jit
def _prepare(
    head, weight, bias, prologue, start, limit, place, MASKED: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr
):
    """Rows start .. start + ROWS of q or k, normalised and rotated.

    One tile per piece of the head dim, as `load`; of a rotated one two, of its first and its second half.
    """
    xs = _load_wide(head, start, limit, place, MASKED, ROWS, C)
    if C.norm != "none":
        xs = _normalise(xs, weight, bias, prologue.eps, C)
    if C.rope != "none":
        n = tl.arange(0, ROWS)
        patch = place.before.to(tl.int32) + image_rows(start + n, place, C) - prologue.prefix
        xs = _rotate(xs, prologue, patch, n < limit - start, C)
    pieces = ()
    for i in tl.static_range(len(xs)):
        pieces = pieces + (xs[i].to(head.ptr.dtype.element_ty),)
    return pieces


@triton.constexpr_function
def _width(C, piece):
    return C.halves[piece // 2] if C.halves else C.split[piece]


@triton.constexpr_function
def _begin(C, piece):
    """The first column of a piece, counted in its half if q and k are rotated."""
    return sum(C.halves[: piece // 2]) if C.halves else sum(C.split[:piece])


@triton.constexpr_function
def _columns(C):
    return C.head_dim // 2 if C.halves else C.head_dim


@triton.jit
def _channels(d, piece: tl.constexpr, C: tl.constexpr):
    """Which channels the columns d of a piece are."""
    if C.rope == "interleaved":
        return 2 * d + piece % 2
    elif C.rope == "half":
        return d + piece % 2 * (C.head_dim // 2)
    else:
        return d


@triton.jit
def _halves(ptr, at, valid, MASKED: tl.constexpr, i: tl.constexpr, C: tl.constexpr):
    """The i-th pieces of two halves that are rotated with one another."""
    WIDTHS: tl.constexpr = C.halves
    HEAD_DIM: tl.constexpr = C.head_dim
    HALF: tl.constexpr = C.head_dim // 2
    FIRST: tl.constexpr = first(WIDTHS, i)
    WIDTH: tl.constexpr = WIDTHS[i]
    if C.rope == "half":
        a = load_piece(ptr, at, valid, MASKED, HALF, FIRST, WIDTH)
        b = load_piece(ptr + HALF, at, valid, MASKED, HALF, FIRST, WIDTH)
    else:
        both = load_piece(ptr, at, valid, MASKED, HEAD_DIM, 2 * FIRST, 2 * WIDTH)
        a, b = tl.split(tl.reshape(both, [at.shape[0], WIDTH, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _load_wide(head, start, limit, place, MASKED: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):
    """In float32; halves take turns."""
    xs = ()
    if C.rope == "none":
        pieces = load(head, start, limit, place, MASKED, ROWS, C)
        for i in tl.static_range(len(pieces)):
            xs = xs + (pieces[i].to(tl.float32),)
    else:
        valid = tl.arange(0, ROWS) < limit - start
        ptr, at = rows_of(head, start, place, ROWS, C)
        for i in tl.static_range(len(C.halves)):
            xs = xs + _halves(ptr, at, valid, MASKED, i, C)
    return xs


@triton.jit
def _normalise(xs, weight, bias, eps, C: tl.constexpr):
    COLUMNS: tl.constexpr = _columns(C)
    if C.norm == "layer":
        total = tl.sum(xs[0], 1)
        for i in tl.static_range(1, len(xs)):
            total += tl.sum(xs[i], 1)
        mean = (total / C.head_dim)[:, None]
        centred = ()
        for i in tl.static_range(len(xs)):
            d = _begin(C, i) + tl.arange(0, _width(C, i))
            # Columns that pad a piece stay 0.
            centred = centred + (tl.where(d[None, :] < COLUMNS, xs[i] - mean, 0.0),)
        xs = centred
    squares = tl.sum(xs[0] * xs[0], 1)
    for i in tl.static_range(1, len(xs)):
        squares += tl.sum(xs[i] * xs[i], 1)
    rstd = tl.rsqrt(squares / C.head_dim + eps)[:, None]
    ys = ()
    for i in tl.static_range(len(xs)):
        d = _begin(C, i) + tl.arange(0, _width(C, i))
        y = xs[i] * rstd
        if weight is not None:
            y *= tl.load(weight + _channels(d, i, C), mask=d < COLUMNS, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            y += tl.load(bias + _channels(d, i, C), mask=d < COLUMNS, other=0.0).to(tl.float32)[None, :]
        ys = ys + (y,)
    return ys


@triton.jit
def _rotate(xs, prologue, patch, valid, C: tl.constexpr):
    rotated = valid & (patch >= 0)
    at = patch * C.rope_stride
    ys = ()
    for i in tl.static_range(len(C.halves)):
        cos_a, cos_b = _halves(prologue.cos, at, rotated, True, i, C)
        sin_a, sin_b = _halves(prologue.sin, at, rotated, True, i, C)
        a = xs[2 * i]
        b = xs[2 * i + 1]
        turned = rotated[:, None]
        ys = ys + (tl.where(turned, a * cos_a - b * sin_a, a), tl.where(turned, b * cos_b + a * sin_b, b))
    return ys
