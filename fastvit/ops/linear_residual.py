"""linear_residual: linear, bias, LayerScale, DropPath and residual add as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastvit import reference
from fastvit.ops import _backend, _checks, _int8
from fastvit.ops._library import as_gradients, autocast_dtype, define, gradients_like, in_dtype, register, spread


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    quantize: str | None = None,
) -> Tensor:
    """residual + drop_path * layer_scale * (x @ weight.T + bias), the end of both halves of a ViT block.

    Args:
        x: (..., K), float.
        weight: (N, K), dtype of `x` (any float dtype under autocast).
        bias: (N,).
        residual: (..., N), of any float dtype: the residual stream may be wider than the products.
        layer_scale: (N,), LayerScale's gamma (Touvron et al. 2021).
        drop_path: (B,) for a residual (B, ..., N), each sample's factor: 0 drops the branch, 1 / keep keeps it
            (stochastic depth, Huang et al. 2016).
        quantize: as in `norm_linear`.

    Returns:
        Shape and dtype of `residual`.

    Raises:
        ValueError, TypeError: an argument's shape or dtype is not accepted.
    """
    if has_torch_function((x, weight, residual)):
        return handle_torch_function(
            linear_residual,
            (x, weight, residual),
            x,
            weight,
            bias,
            residual=residual,
            layer_scale=layer_scale,
            drop_path=drop_path,
            quantize=quantize,
        )
    _checks.tensor("x", x)
    return _op(x, weight, bias, residual, layer_scale, drop_path, autocast_dtype(x), quantize)


@_checks.remembered
def _output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    dtype: torch.dtype | None,
    quantize: str | None,
) -> Tensor:
    """Check everything and return the empty result: also the operator's fake version."""
    for name, t in (("x", x), ("weight", weight), ("residual", residual)):
        _checks.floating(name, t)
    _checks.ndim("weight", weight, 2, "(N, K)")
    features, inner = weight.shape
    if x.ndim < 1 or x.shape[-1] != inner:
        raise ValueError(f"x: shape {tuple(x.shape)} does not fit weight {tuple(weight.shape)}; accepted: (..., K)")
    if residual.shape != (*x.shape[:-1], features):
        raise ValueError(f"residual: shape {tuple(residual.shape)} does not fit; accepted: {(*x.shape[:-1], features)}")
    _checks.vector("bias", bias, features)
    _checks.vector("layer_scale", layer_scale, features)
    _checks.drop_path(drop_path, residual)
    _checks.quantize(quantize)
    if dtype is None:
        _checks.same_dtype("weight", weight, x.dtype, "x")
        _checks.same_dtype("bias", bias, x.dtype, "x")
    _checks.same_device(x=x, weight=weight, bias=bias, residual=residual, layer_scale=layer_scale, drop_path=drop_path)
    return residual.new_empty(residual.shape)


def kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    dtype: torch.dtype | None,
    quantize: str | None,
) -> Tensor:
    out = _output(x, weight, bias, residual, layer_scale, drop_path, dtype, quantize)
    if out.numel() == 0:
        return out
    compute = dtype or x.dtype
    backend = _backend.choose(x, compute, weight, bias, residual, layer_scale, drop_path)
    if backend == "cpp":
        contiguous, rows = _backend.contiguous, _backend.rows
        factors = None if drop_path is None else drop_path.float().contiguous()
        out_rows = rows(out)
        _backend.extension().linear_residual(
            out_rows,
            rows(x),
            *_int8.operand(weight, quantize),
            contiguous(bias),
            rows(residual),
            contiguous(layer_scale),
            factors,
            out_rows.shape[0] // residual.shape[0],
            _backend.code(compute),
            torch.get_num_threads(),
        )
        return out
    # The reference's sum goes into `out`: it has the strides of its operands, but the fake version promises dense ones.
    if quantize is not None:
        with torch.autocast(x.device.type, enabled=False):
            quantized = reference.linear_residual(
                x,
                weight,
                bias,
                residual=residual,
                layer_scale=layer_scale,
                drop_path=drop_path,
                quantize=quantize,
            )
            return out.copy_(quantized)
    if backend == "triton":
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _backend.triton_kernel("linear_residual")(
            x, weight, bias, residual=residual, layer_scale=layer_scale, drop_path=drop_path
        )
    return out.copy_(_reference(x, weight, bias, residual, layer_scale, drop_path, dtype, quantize))


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    dtype: torch.dtype | None,
    quantize: str | None,
) -> Tensor:
    # Without `quantize`: a gradient takes rounding for the identity.
    with in_dtype(dtype, x.device):
        return reference.linear_residual(
            x, weight, bias, residual=residual, layer_scale=layer_scale, drop_path=drop_path
        )


def _backward_kernel(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """needs: of x, weight, bias and layer_scale, whose gradients come in this order."""
    compute = dtype or x.dtype
    with torch.autocast(x.device.type, enabled=False):
        grads = _backend.triton_kernel("linear_residual", "linear_residual_backward")(
            grad,
            x.to(compute),
            weight.to(compute),
            None if bias is None else bias.to(compute),
            layer_scale=layer_scale,
            drop_path=drop_path,
            needs=needs,
        )
        return as_gradients(grads, (x, weight, bias, layer_scale), needs)


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:4], arguments[-1])


_backward_op = define(
    "linear_residual_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, "
    "Tensor? drop_path, ScalarType? dtype, bool[] needs) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def _backward(saved: tuple[Any, ...], grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None] | None:
    # Straight through the quantisation, as if there were none.
    x, weight, bias, _, layer_scale, drop_path, dtype, _ = saved
    # A gradient of drop_path, which is drawn at random, is nobody's: it would need the branch itself.
    if needs[5] or grad.numel() == 0 or not _backend.differentiates(x, dtype or x.dtype):
        return None
    wanted = (*needs[:3], needs[4])
    x_grad = weight_grad = bias_grad = scale_grad = None
    if any(wanted):
        grads = _backward_op(grad, x, weight, bias, layer_scale, drop_path, dtype, wanted)
        x_grad, weight_grad, bias_grad, scale_grad = spread(grads, wanted)
    return [x_grad, weight_grad, bias_grad, grad if needs[3] else None, scale_grad, None, None, None]


_op = register(
    "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale, Tensor? drop_path, "
    "ScalarType? dtype, str? quantize) -> Tensor",
    kernel=kernel,
    fake=_output,
    reference=_reference,
    backward=_backward,
)
