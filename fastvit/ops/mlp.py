"""mlp: the second half of a pre-norm block as one operator, whose hidden activations are never a tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastvit import reference
from fastvit.ops import _backend, _checks, _int8
from fastvit.ops._library import as_gradients, autocast_dtype, define, gradients_like, in_dtype, register, spread
from fastvit.ops.linear_residual import kernel as linear_residual_kernel
from fastvit.ops.norm_linear import kernel as norm_linear_kernel


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    quantize: str | tuple[str | None, str | None] | None = None,
) -> Tensor:
    """x + drop_path * layer_scale * fc2(activation(fc1(norm(x)))).

    The same as `norm_linear` and then `linear_residual`; the hidden activations stay in cache in the C++ kernel, and in
    registers in the one that narrow models may get on GPUs.

    Args:
        x: (..., D), float; also the residual.
        fc1_weight: (H, D), dtype of `x` (any float dtype under autocast); (2 H, D), [gate; value], for swiglu.
        fc1_bias: (H,), or (2 H,) for swiglu.
        fc2_weight: (D, H).
        fc2_bias: (D,).
        norm, norm_weight, norm_bias, eps, activation: as in `norm_linear`.
        layer_scale, drop_path: as in `linear_residual`.
        quantize: as in `norm_linear`, or a pair for (fc1, fc2), such as ("int8", None).

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or name is not accepted.
    """
    if has_torch_function((x, fc1_weight, fc2_weight)):
        return handle_torch_function(
            mlp,
            (x, fc1_weight, fc2_weight),
            x,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            activation=activation,
            layer_scale=layer_scale,
            drop_path=drop_path,
            quantize=quantize,
        )
    _checks.tensor("x", x)
    dtype, pair = autocast_dtype(x), _checks.quantize_pair(quantize, "(fc1, fc2)")
    arguments = (
        x,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        norm_weight,
        norm_bias,
        norm,
        eps,
        activation,
        layer_scale,
        drop_path,
        dtype,
        *pair,
    )
    if pair == (None, None) and _backend.trains(x, dtype or x.dtype, arguments):
        return _training_op(*arguments)[0]
    return _op(*arguments)


class _Arguments(NamedTuple):
    """What the registered operator takes, in its order."""

    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm: str
    eps: float
    activation: str
    layer_scale: Tensor | None
    drop_path: Tensor | None
    dtype: torch.dtype | None
    quantize_fc1: str | None
    quantize_fc2: str | None


@_checks.remembered
def _output(*arguments: Any) -> Tensor:
    """Check everything and return the empty result: also the operator's fake version."""
    a = _Arguments(*arguments)
    weights = {"fc1_weight": a.fc1_weight, "fc2_weight": a.fc2_weight}
    for name, t in (("x", a.x), *weights.items()):
        _checks.floating(name, t)
    _checks.ndim("fc1_weight", a.fc1_weight, 2, "(H, D)")
    _checks.ndim("fc2_weight", a.fc2_weight, 2, "(D, H)")
    features, hidden = a.fc2_weight.shape
    if a.x.ndim < 1 or a.x.shape[-1] != features:
        raise ValueError(
            f"x: shape {tuple(a.x.shape)} does not fit fc2_weight {(features, hidden)}; accepted: (..., D)"
        )
    _checks.one_of("activation", a.activation, _checks.ACTIVATIONS)
    rows = 2 * hidden if a.activation == "swiglu" else hidden
    if a.fc1_weight.shape != (rows, features):
        raise ValueError(
            f"fc1_weight: shape {tuple(a.fc1_weight.shape)} does not fit fc2_weight {(features, hidden)} and "
            f"activation {a.activation}; accepted: {(rows, features)}"
        )
    _checks.vector("fc1_bias", a.fc1_bias, rows)
    _checks.vector("fc2_bias", a.fc2_bias, features)
    _checks.norm(a.norm, a.norm_weight, a.norm_bias, features)
    _checks.vector("layer_scale", a.layer_scale, features)
    _checks.drop_path(a.drop_path, a.x)
    _checks.quantize(a.quantize_fc1)
    _checks.quantize(a.quantize_fc2)
    operands = {**weights, "fc1_bias": a.fc1_bias, "fc2_bias": a.fc2_bias}
    if a.dtype is None:
        for name, operand in operands.items():
            _checks.same_dtype(name, operand, a.x.dtype, "x")
    vectors = {"norm_weight": a.norm_weight, "norm_bias": a.norm_bias}
    _checks.same_device(x=a.x, **operands, **vectors, layer_scale=a.layer_scale, drop_path=a.drop_path)
    return a.x.new_empty(a.x.shape)


def _kernel(*arguments: Any) -> Tensor:
    out = _output(*arguments)
    if out.numel() == 0:
        return out
    a = _Arguments(*arguments)
    compute = a.dtype or a.x.dtype
    backend = _backend.choose(a.x, compute, *(t for t in arguments[1:] if isinstance(t, Tensor)))
    if backend == "triton" and a.quantize_fc1 is None and a.quantize_fc2 is None:
        return _backend.triton_kernel("mlp")(**_lowered(a), fc1_bias=_to(a.fc1_bias, a.dtype))
    if backend != "cpp":
        starts = (a.norm_weight, a.norm_bias, a.norm, a.eps, a.activation, a.dtype, a.quantize_fc1)
        hidden = norm_linear_kernel(a.x, a.fc1_weight, a.fc1_bias, *starts)
        ends = (a.x, a.layer_scale, a.drop_path, a.dtype, a.quantize_fc2)
        return linear_residual_kernel(hidden, a.fc2_weight, a.fc2_bias, *ends)
    contiguous, out_rows = _backend.contiguous, _backend.rows(out)
    factors = None if a.drop_path is None else a.drop_path.float().contiguous()
    _backend.extension().mlp(
        out_rows,
        _backend.rows(a.x),
        *_int8.operand(a.fc1_weight, a.quantize_fc1),
        contiguous(a.fc1_bias),
        *_int8.operand(a.fc2_weight, a.quantize_fc2),
        contiguous(a.fc2_bias),
        contiguous(a.norm_weight),
        contiguous(a.norm_bias),
        _checks.NORMS.index(a.norm),
        a.eps,
        _checks.ACTIVATIONS.index(a.activation),
        contiguous(a.layer_scale),
        factors,
        out_rows.shape[0] // a.x.shape[0],
        _backend.code(compute),
        torch.get_num_threads(),
    )
    return out


def _reference(*arguments: Any) -> Tensor:
    values = _Arguments(*arguments)._asdict()
    del values["quantize_fc1"], values["quantize_fc2"]  # a gradient takes rounding for the identity
    with in_dtype(values.pop("dtype"), values["x"].device):
        return reference.mlp(**values)


def _composed(*arguments: Any) -> Tensor:
    """What the backward of `mlp` itself recomputes: with kernels where there are any, else the reference."""
    a = _Arguments(*arguments)
    if not _backend.differentiates(a.x, a.dtype or a.x.dtype):
        return _reference(*arguments)
    return _training_op(*arguments)[0]


def _training_output(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = _Arguments(*arguments)
    dtype = a.dtype or a.x.dtype
    shape = (a.x.shape[:-1].numel(), a.fc1_weight.shape[0]) if _backend.differentiates(a.x, dtype) else (0,)
    return _output(*arguments), a.x.new_empty(shape, dtype=dtype)


def _training_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The result, and what the activation was applied to, for the backward."""
    a = _Arguments(*arguments)
    if not _backend.differentiates(a.x, a.dtype or a.x.dtype):
        return _kernel(*arguments), a.x.new_empty(0, dtype=a.dtype or a.x.dtype)
    _, pre = _training_output(*arguments)
    return _backend.triton_kernel("mlp")(**_lowered(a), fc1_bias=_to(a.fc1_bias, a.dtype), pre=pre), pre


def _to(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return t if t is None or dtype is None else t.to(dtype)


def _lowered(a: _Arguments) -> dict[str, Any]:
    """What the launchers share, with the products' operands in their dtype."""
    arguments = a._asdict()
    for name in ("fc1_bias", "dtype", "quantize_fc1", "quantize_fc2"):
        del arguments[name]
    for name in ("fc1_weight", "fc2_weight", "fc2_bias"):
        arguments[name] = _to(arguments[name], a.dtype)
    return arguments


# The arguments that may need a gradient, in the order of mlp_backward's results.
_DIFFERENTIABLE = (*_Arguments._fields[:7], "layer_scale")


def _backward_kernel(grad: Tensor, pre: Tensor, *arguments: Any) -> list[Tensor]:
    """The last argument, `needs`: of _DIFFERENTIABLE, in that order."""
    *rest, needs = arguments
    a = _Arguments(*rest)
    with torch.autocast(a.x.device.type, enabled=False):
        grads = _backend.triton_kernel("mlp", "mlp_backward")(grad, pre, **_lowered(a), needs=needs)
        return as_gradients(grads, [getattr(a, name) for name in _DIFFERENTIABLE], needs)


def _backward_fake(grad: Tensor, pre: Tensor, *arguments: Any) -> list[Tensor]:
    *rest, needs = arguments
    return gradients_like([getattr(_Arguments(*rest), name) for name in _DIFFERENTIABLE], needs)


def _backward(saved: tuple[Any, ...], grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None] | None:
    *arguments, pre = saved
    wants = dict(zip(_Arguments._fields, needs, strict=True))
    if pre.numel() == 0 or wants["drop_path"]:
        return None
    wanted = [wants[name] for name in _DIFFERENTIABLE]
    if not any(wanted):
        return [None] * len(needs)
    grads = dict(zip(_DIFFERENTIABLE, spread(_backward_op(grad, pre, *arguments, wanted), wanted), strict=True))
    return [grads.get(name) for name in _Arguments._fields]


_ARGUMENTS = (
    "Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? norm_weight, "
    "Tensor? norm_bias, str norm, float eps, str activation, Tensor? layer_scale, Tensor? drop_path, "
    "ScalarType? dtype, str? quantize_fc1, str? quantize_fc2"
)
_op = register(f"mlp({_ARGUMENTS}) -> Tensor", kernel=_kernel, fake=_output, reference=_composed)
_training_op = register(
    f"mlp_training({_ARGUMENTS}) -> (Tensor, Tensor)",
    kernel=_training_kernel,
    fake=_training_output,
    reference=_reference,
    backward=_backward,
    save=lambda arguments, result: (result[1],),
)
_backward_op = define(
    f"mlp_backward(Tensor grad, Tensor pre, {_ARGUMENTS}, bool[] needs) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
