"""pool: final norm, token or mean pooling and the classifier head as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastvit import reference
from fastvit.ops import _backend, _checks
from fastvit.ops._library import as_gradients, autocast_dtype, define, gradients_like, in_dtype, register, spread


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
    """Tokens to one vector per image, or to its logits.  Only what is pooled is normalised.

    Args:
        x: (B, N, D), float.
        mode: "token": token 0, norm, head.  "avg": mean over the patch tokens, norm, head.  "norm_avg": norm, mean
            over the patch tokens, head.
        num_prefix_tokens: class and register tokens, left out of the means.
        norm: "layer", "rms" or "none"; norm_weight, norm_bias: (D,), of any float dtype; eps as in `norm_linear`.
        weight: (C, D), the head, dtype of `x` (any float dtype under autocast); None returns the pooled vector.
        bias: (C,).

    Returns:
        (B, C), or (B, D) without a head; dtype of `x`, or autocast's.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or name is not accepted.
    """
    if has_torch_function((x,)):
        return handle_torch_function(
            pool,
            (x,),
            x,
            mode=mode,
            num_prefix_tokens=num_prefix_tokens,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            weight=weight,
            bias=bias,
        )
    _checks.tensor("x", x)
    # Without a head nothing is multiplied, so autocast has nothing to lower.
    dtype = None if weight is None else autocast_dtype(x)
    return _op(x, mode, num_prefix_tokens, norm, norm_weight, norm_bias, eps, weight, bias, dtype)


@_checks.remembered
def _output(
    x: Tensor,
    mode: str,
    num_prefix_tokens: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Check everything and return the empty result: also the operator's fake version."""
    _checks.floating("x", x)
    _checks.ndim("x", x, 3, "(B, N, D)")
    _checks.one_of("mode", mode, _checks.POOL_MODES)
    batch, tokens, dim = x.shape
    if mode == "token" and tokens < 1:
        raise ValueError(f"x: shape {tuple(x.shape)} has no token; accepted: N >= 1")
    if mode != "token" and not 0 <= num_prefix_tokens < tokens:
        raise ValueError(f"num_prefix_tokens: {num_prefix_tokens} leaves no patch; accepted: 0 to {tokens - 1}")
    _checks.norm(norm, norm_weight, norm_bias, dim)
    if weight is None:
        if bias is not None:
            raise ValueError("bias: given without weight; accepted: both, or neither")
    else:
        _checks.floating("weight", weight)
        if weight.ndim != 2 or weight.shape[1] != dim:
            raise ValueError(f"weight: shape {tuple(weight.shape)} does not fit; accepted: (C, {dim})")
        _checks.vector("bias", bias, weight.shape[0])
        if dtype is None:
            _checks.same_dtype("weight", weight, x.dtype, "x")
            _checks.same_dtype("bias", bias, x.dtype, "x")
    _checks.same_device(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    return x.new_empty((batch, dim if weight is None else weight.shape[0]), dtype=dtype or x.dtype)


def _kernel(
    x: Tensor,
    mode: str,
    num_prefix_tokens: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    out = _output(x, mode, num_prefix_tokens, norm, norm_weight, norm_bias, eps, weight, bias, dtype)
    if out.numel() == 0:
        return out
    backend = _backend.choose(x, out.dtype, norm_weight, norm_bias, weight, bias)
    if backend == "cpp":
        contiguous = _backend.contiguous
        _backend.extension().pool(
            out,
            _backend.unit_stride(x),
            _checks.POOL_MODES.index(mode),
            num_prefix_tokens,
            _checks.NORMS.index(norm),
            contiguous(norm_weight),
            contiguous(norm_bias),
            eps,
            contiguous(weight),
            contiguous(bias),
            _backend.code(out.dtype),
            torch.get_num_threads(),
        )
        return out
    if backend == "triton":
        if dtype is not None and weight is not None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return _backend.triton_kernel("pool")(
            x,
            mode=mode,
            num_prefix_tokens=num_prefix_tokens,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            weight=weight,
            bias=bias,
        ).to(out.dtype)
    # Into `out`: a token that nothing changes would be a view of x.
    return out.copy_(_reference(x, mode, num_prefix_tokens, norm, norm_weight, norm_bias, eps, weight, bias, dtype))


def _reference(
    x: Tensor,
    mode: str,
    num_prefix_tokens: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    with in_dtype(dtype, x.device):
        return reference.pool(
            x,
            mode=mode,
            num_prefix_tokens=num_prefix_tokens,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            weight=weight,
            bias=bias,
        )


def _backward_kernel(
    grad: Tensor,
    x: Tensor,
    mode: str,
    num_prefix_tokens: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """needs: of x, norm_weight, norm_bias, weight and bias, whose gradients come in this order."""
    with torch.autocast(x.device.type, enabled=False):
        grads = _backend.triton_kernel("pool", "pool_backward")(
            grad,
            x,
            mode=mode,
            num_prefix_tokens=num_prefix_tokens,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            weight=None if weight is None else weight.to(dtype or x.dtype),
            needs=needs,
        )
        return as_gradients(grads, (x, norm_weight, norm_bias, weight, bias), needs)


# Where the operator's arguments have x, norm_weight, norm_bias, weight and bias.
_DIFFERENTIABLE = (0, 4, 5, 7, 8)


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like([arguments[i] for i in _DIFFERENTIABLE], arguments[-1])


_backward_op = define(
    "pool_backward(Tensor grad, Tensor x, str mode, int num_prefix_tokens, str norm, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, Tensor? weight, Tensor? bias, ScalarType? dtype, bool[] needs) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def _backward(saved: tuple[Any, ...], grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None] | None:
    x, dtype = saved[0], saved[-1]
    if not _backend.differentiates(x, dtype or x.dtype) or grad.numel() == 0:
        return None
    wanted = [needs[i] for i in _DIFFERENTIABLE]
    grads = dict(zip(_DIFFERENTIABLE, spread(_backward_op(grad, *saved, wanted), wanted), strict=True))
    return [grads.get(i) for i in range(len(needs))]


_op = register(
    "pool(Tensor x, str mode, int num_prefix_tokens, str norm, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor? weight, Tensor? bias, ScalarType? dtype) -> Tensor",
    kernel=_kernel,
    fake=_output,
    reference=_reference,
    backward=_backward,
)
