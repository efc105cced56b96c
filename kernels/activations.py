"""Activations of a float32 accumulator and their derivatives, for the epilogues of products."""

# ruff: noqa: SIM108 - a constant `if` of Triton's is no expression

from __future__ import annotations

import triton
import triton.language as tl


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
