"""norm_linear: LayerNorm or RMSNorm, linear, bias and activation as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastvit import reference
from fastvit.ops import _backend, _checks, _int8
from fastvit.ops._library import as_gradients, autocast_dtype, define, gradients_like, in_dtype, register, spread


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    quantize: str | None = None,
) -> Tensor:
    """activation(norm(x) @ weight.T + bias), computed without writing norm(x).

    Args:
        x: (..., K), float.
        weight: (N, K), dtype of `x` (any float dtype under autocast).
        bias: (N,).
        norm: "layer" (Ba et al. 2016), "rms" (Zhang and Sennrich 2019) or "none", over the last dimension.
        norm_weight, norm_bias: (K,), of any float dtype.
        eps: added to the variance (mean square for "rms").
        activation: "none", "gelu" (erf), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x)), "silu", "relu", or "swiglu"
            (Shazeer 2020), for which `weight` packs [gate; value] in (2H, K) and the result is silu(gate) * value.
        quantize: None, or "int8" for a product of integers: norm(x) is quantised per row and the weight per output
            channel, both rotated first (see `fastvit.reference.int8`).  The weight's int8 form is made at the first
            call, kept beside it in a byte per element, and made anew when the weight changes.  Gradients are those of
            the float product.  Fast on CPU in float32 and bfloat16; elsewhere plain torch computes the same, slowly.

    Returns:
        (..., N), or (..., N / 2) for "swiglu"; dtype of `x`, or autocast's.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or name is not accepted.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(
            norm_linear,
            (x, weight),
            x,
            weight,
            bias,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            activation=activation,
            quantize=quantize,
        )
    _checks.tensor("x", x)
    return _op(x, weight, bias, norm_weight, norm_bias, norm, eps, activation, autocast_dtype(x), quantize)


@_checks.remembered
def _output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    dtype: torch.dtype | None,
    quantize: str | None,
) -> Tensor:
    """Check everything and return the empty result: also the operator's fake version."""
    _checks.floating("x", x)
    _checks.floating("weight", weight)
    _checks.ndim("weight", weight, 2, "(N, K)")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: shape {tuple(x.shape)} does not fit weight {tuple(weight.shape)}; accepted: (..., K)")
    _checks.one_of("activation", activation, _checks.ACTIVATIONS)
    _checks.quantize(quantize)
    features = weight.shape[0]
    _checks.vector("bias", bias, features)
    _checks.norm(norm, norm_weight, norm_bias, weight.shape[1])
    if activation == "swiglu":
        if features % 2:
            raise ValueError(f"weight: {features} rows can't be [gate; value]; accepted for swiglu: an even number")
        features //= 2
    if dtype is None:
        _checks.same_dtype("weight", weight, x.dtype, "x")
        _checks.same_dtype("bias", bias, x.dtype, "x")
    _checks.same_device(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    return x.new_empty((*x.shape[:-1], features), dtype=dtype or x.dtype)


def kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    dtype: torch.dtype | None,
    quantize: str | None,
) -> Tensor:
    out = _output(x, weight, bias, norm_weight, norm_bias, norm, eps, activation, dtype, quantize)
    if out.numel() == 0:
        return out
    backend = _backend.choose(x, out.dtype, weight, bias, norm_weight, norm_bias)
    if backend == "cpp":
        _backend.extension().norm_linear(
            _backend.rows(out),
            _backend.rows(x),
            *_int8.operand(weight, quantize),
            *map(_backend.contiguous, (bias, norm_weight, norm_bias)),
            _checks.NORMS.index(norm),
            eps,
            _checks.ACTIVATIONS.index(activation),
            _backend.code(out.dtype),
            torch.get_num_threads(),
        )
        return out
    if quantize is not None:
        with torch.autocast(x.device.type, enabled=False):
            return reference.norm_linear(
                x,
                weight,
                bias,
                norm=norm,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                eps=eps,
                activation=activation,
                quantize=quantize,
            ).to(out.dtype)
    if backend == "triton":
        if dtype is not None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return _backend.triton_kernel("norm_linear")(
            x,
            weight,
            bias,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            activation=activation,
        ).to(out.dtype)
    return _reference(x, weight, bias, norm_weight, norm_bias, norm, eps, activation, dtype, quantize)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    dtype: torch.dtype | None,
    quantize: str | None,
) -> Tensor:
    # Without `quantize`: a gradient takes rounding for the identity.
    with in_dtype(dtype, x.device):
        return reference.norm_linear(
            x,
            weight,
            bias,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            activation=activation,
        )


def _backward_kernel(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """needs: of x, weight, bias, norm_weight and norm_bias, whose gradients come in this order."""
    compute = dtype or x.dtype
    with torch.autocast(x.device.type, enabled=False):
        grads = _backend.triton_kernel("norm_linear", "norm_linear_backward")(
            grad,
            x,
            weight.to(compute),
            None if bias is None else bias.to(compute),
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            activation=activation,
            needs=needs,
        )
        return as_gradients(grads, (x, weight, bias, norm_weight, norm_bias), needs)


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:5], arguments[-1])


_backward_op = define(
    "norm_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "str norm, float eps, str activation, ScalarType? dtype, bool[] needs) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def _backward(saved: tuple[Any, ...], grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None] | None:
    # Straight through the quantisation, as if there were none.
    *arguments, dtype, _ = saved
    x = arguments[0]
    if not _backend.differentiates(x, dtype or x.dtype) or grad.numel() == 0:
        return None
    return [*spread(_backward_op(grad, *arguments, dtype, needs[:5]), needs[:5]), *[None] * 5]


_op = register(
    "norm_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, str norm, float eps, "
    "str activation, ScalarType? dtype, str? quantize) -> Tensor",
    kernel=kernel,
    fake=_output,
    reference=_reference,
    backward=_backward,
)
