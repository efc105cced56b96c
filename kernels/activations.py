"""Activations of a float32 accumulator and their derivatives: in the epilogues of products, and as passes over memory.

Shapes of a pass: pre (M, N), or (M, 2 N) = [gate; value] for swiglu, out and hidden (M, N).

Cost in 16 bits: forward 4 M N bytes (6 for swiglu), backward 6 M N (10), 2 M N more where it makes the activation
again.  Some 20 operations an element: bound by memory.
"""

# ruff: noqa: SIM108 - a constant `if` of Triton's is no expression

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels.launch import launch, multiprocessors
from torch import Tensor

# What a program of a pass holds at a time, on every architecture.
_BLOCK_M, _BLOCK_N, _NUM_WARPS = 16, 256, 8
_PROGRAMS_PER_MULTIPROCESSOR = 8


def activation_forward(pre: Tensor, out: Tensor, activation: str) -> None:
    """out = activation(pre).

    Args:
        pre: (M, N), or (M, 2 N) = [gate; value] for swiglu, contiguous.
        out: (..., N) of M rows, contiguous.
    """
    m, n = pre.shape[0], out.shape[-1]
    columns = triton.cdiv(n, _BLOCK_N)
    launch(
        _activate,
        columns * triton.cdiv(m, _BLOCK_M),
        pre,
        out,
        m,
        n,
        columns,
        ACTIVATION=activation,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        num_warps=_NUM_WARPS,
        num_stages=1,
    )


def activation_backward(
    grad: Tensor, pre: Tensor, activation: str, *, want_hidden: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradient of `pre` given that of activation(pre); activation(pre) too, if wanted; the sum of the rows.

    Args:
        grad: (M, N) with unit stride in the last dimension, any float dtype.
        pre: (M, N), or (M, 2 N) = [gate; value] for swiglu, contiguous.

    Returns:
        The first two in the dtype of `pre`, the sum (N,) or (2 N,) in float32.
    """
    m, n = grad.shape
    columns = triton.cdiv(n, _BLOCK_N)
    most = max(1, _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(grad.device) // columns)
    strips = min(most, triton.cdiv(m, 4 * _BLOCK_M))
    out = torch.empty_like(pre)
    hidden = torch.empty(m, n, dtype=pre.dtype, device=pre.device) if want_hidden else None
    shares = torch.empty(strips, pre.shape[1], dtype=torch.float32, device=pre.device)
    launch(
        _activation_backward,
        columns * strips,
        grad,
        grad.stride(0),
        pre,
        out,
        hidden,
        shares,
        m,
        n,
        columns,
        strips,
        ACTIVATION=activation,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        num_warps=_NUM_WARPS,
        num_stages=2,
    )
    return out, hidden, shares.sum(0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _phi_exact(x):
    """Phi(x), the normal distribution, with an error below 2e-7, and exp(-x^2 / 2), of which it is made.

    erfc of Abramowitz and Stegun 7.1.26, whose tail keeps its relative precision.  libdevice's erf costs more and
    spills.
    """
    t = 1.0 / tl.fma(tl.abs(x), 0.3275911 * 0.7071067811865476, 1.0)
    p = tl.fma(t, 1.061405429, -1.453152027)
    p = tl.fma(t, p, 1.421413741)
    p = tl.fma(t, p, -0.284496736)
    p = tl.fma(t, p, 0.254829592)
    bell = tl.exp2(x * x * -0.7213475204444817)
    half_erfc = 0.5 * p * t * bell
    return tl.where(x >= 0.0, 1.0 - half_erfc, half_erfc), bell


@triton.jit
def _gelu_exact(x):
    phi, _ = _phi_exact(x)
    return x * phi


@triton.jit
def _phi_polynomial(x):
    """Phi(x) for results of 16 bits, of fused multiply-adds: x Phi(x) has an error below 5e-5, 1.2e-5 rms on N(0, 1).

    Phi - 1/2 as an odd polynomial, fitted minimax in the error of x Phi(x) on [0, 4.3], where it meets 1/2.
    """
    s = x * x
    p = tl.fma(s, 4.3553435163934395e-11, -4.368990946801432e-09)
    p = tl.fma(s, p, 1.9396939876514807e-07)
    p = tl.fma(s, p, -5.068020072940271e-06)
    p = tl.fma(s, p, 8.769724809098989e-05)
    p = tl.fma(s, p, -0.0010744509054347873)
    p = tl.fma(s, p, 0.009703656658530235)
    p = tl.fma(s, p, -0.06616592407226562)
    p = tl.fma(s, p, 0.39880532026290894)
    return tl.where(tl.abs(x) > 4.3, tl.where(x > 0.0, 1.0, 0.0), tl.fma(x, p, 0.5))


@triton.jit
def _gelu_polynomial(x):
    return x * _phi_polynomial(x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """ACTIVATION as in `fastvit.ops.norm_linear`, swiglu apart.  EXACT: to float32 rather than 16 bits."""
    if ACTIVATION == "gelu":
        if EXACT:
            x = _gelu_exact(x)
        else:
            x = _gelu_polynomial(x)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 x (1 + tanh u) = x sigmoid(2 u)
        x = x * _sigmoid(x * tl.fma(x * x, 0.0713548162726009, 1.5957691216057308))
    elif ACTIVATION == "quick_gelu":
        x = x * _sigmoid(x * 1.702)
    elif ACTIVATION == "silu":
        x = x * _sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # maximum would lose a NaN
    return x


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation of x and its derivative, swiglu apart."""
    if ACTIVATION == "gelu":
        if EXACT:
            phi, bell = _phi_exact(x)
        else:
            phi = _phi_polynomial(x)
            bell = tl.exp2(x * x * -0.7213475204444817)
        return x * phi, tl.fma(x * bell, 0.3989422804014327, phi)
    elif ACTIVATION == "gelu_tanh":
        s = x * x
        gate = _sigmoid(x * tl.fma(s, 0.0713548162726009, 1.5957691216057308))
        slope = tl.fma(s, 0.2140644488178027, 1.5957691216057308)
        return x * gate, tl.fma(x * slope * gate, 1.0 - gate, gate)
    elif ACTIVATION == "quick_gelu":
        gate = _sigmoid(x * 1.702)
        return x * gate, tl.fma(x * 1.702 * gate, 1.0 - gate, gate)
    elif ACTIVATION == "silu":
        gate = _sigmoid(x)
        return x * gate, tl.fma(x * gate, 1.0 - gate, gate)
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _activate(
    pre, out, M, N, columns, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    WIDE: tl.constexpr = 2 if GATED else 1
    row = tl.program_id(0) // columns * BLOCK_M
    i = tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row + i < M) & (n < N)
    first = tl.cast(row, tl.int64)
    at = pre + first * (N * WIDE) + (i * (N * WIDE) + n)
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        y = activate(y, "silu", EXACT) * tl.load(at + N, mask=mask, other=0.0).to(tl.float32)
    else:
        y = activate(y, ACTIVATION, EXACT)
    tl.store(out + first * N + (i * N + n), y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activation_gradients(grad, gate, value, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(activation, gradient of gate, gradient of value); `value` counts for swiglu alone."""
    if ACTIVATION == "swiglu":
        silu, slope = activate_with_derivative(gate, "silu", EXACT)
        return silu * value, grad * value * slope, grad * silu
    else:
        y, slope = activate_with_derivative(gate, ACTIVATION, EXACT)
        return y, grad * slope, grad


@triton.jit
def _activation_backward(
    grad, grad_row, pre, out, hidden, shares, M, N, columns, strips,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program walks down a strip of rows.  shares (strips, N or 2 N): the strips' sums of `out`."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    EXACT: tl.constexpr = pre.dtype.element_ty == tl.float32
    WIDE: tl.constexpr = 2 if GATED else 1
    strip = tl.program_id(0) // columns
    i = tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    total_value = tl.zeros([BLOCK_N], tl.float32)
    for row in tl.range(strip * BLOCK_M, M, strips * BLOCK_M):
        mask = (row + i < M) & (n[None, :] < N)
        first = tl.cast(row, tl.int64)
        g = tl.load(grad + first * grad_row + (i * grad_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
        at = first * (N * WIDE) + (i * (N * WIDE) + n[None, :])
        gate = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            value = tl.load(pre + at + N, mask=mask, other=0.0).to(tl.float32)
        else:
            value = gate
        y, gate_grad, value_grad = activation_gradients(g, gate, value, ACTIVATION, EXACT)
        tl.store(out + at, gate_grad.to(out.dtype.element_ty), mask=mask)
        total += tl.sum(gate_grad, 0)
        if GATED:
            tl.store(out + at + N, value_grad.to(out.dtype.element_ty), mask=mask)
            total_value += tl.sum(value_grad, 0)
        if hidden is not None:
            at = hidden + first * N + (i * N + n[None, :])
            tl.store(at, y.to(hidden.dtype.element_ty), mask=mask)
    at = shares + strip * (N * WIDE) + n
    tl.store(at, total, mask=n < N)
    if GATED:
        tl.store(at + N, total_value, mask=n < N)
