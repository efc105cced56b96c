"""self_attention: the first half of a pre-norm block as one operator, whose q, k and v are never tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastvit import reference
from fastvit.ops import _backend, _checks, _int8
from fastvit.ops._library import autocast_dtype, in_dtype, register
from fastvit.ops.attention import attention
from fastvit.ops.attention import kernel as attention_kernel
from fastvit.ops.linear_residual import kernel as linear_residual_kernel
from fastvit.ops.linear_residual import linear_residual
from fastvit.ops.norm_linear import kernel as norm_linear_kernel
from fastvit.ops.norm_linear import norm_linear

# Bytes of q, k, v and heads of one sample, beyond which a thread should not keep them for good.
MOST_SCRATCH = 64 << 20

Three = tuple[Tensor, Tensor, Tensor]
OptionalThree = tuple[Tensor | None, Tensor | None, Tensor | None]


def self_attention(
    x: Tensor,
    qkv_weight: Tensor | Three,
    qkv_bias: Tensor | OptionalThree | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    scale: float | None = None,
    bias: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    quantize: str | tuple[str | None, str | None] | None = None,
) -> Tensor:
    """x + drop_path * layer_scale * proj(attention(qkv(norm(x)))).

    The same as `norm_linear`, `attention` and then `linear_residual`; the C++ kernel keeps q, k, v and the heads in
    cache.

    Args:
        x: (B, N, D), float; also the residual.
        qkv_weight: (3 * num_heads * head_dim, D), [q; k; v] with heads outermost, or the three as a tuple; dtype of
            `x` (any float dtype under autocast).
        qkv_bias: as long as the weight, or a tuple of three; any may be None.
        proj_weight: (D, num_heads * head_dim).
        proj_bias: (D,).
        num_heads: heads.
        scale, bias, rope, rope_interleaved: as in `attention`.
        norm, norm_weight, norm_bias, eps: as in `norm_linear`.
        layer_scale, drop_path: as in `linear_residual`.
        quantize: as in `norm_linear`, or a pair for (qkv, proj), such as ("int8", None).

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or name is not accepted.
    """
    weights = qkv_weight if isinstance(qkv_weight, tuple) else (qkv_weight, None, None)
    if has_torch_function((x, *weights, proj_weight)):
        return handle_torch_function(
            self_attention,
            (x, *weights, proj_weight),
            x,
            qkv_weight,
            qkv_bias,
            proj_weight,
            proj_bias,
            num_heads=num_heads,
            scale=scale,
            bias=bias,
            rope=rope,
            rope_interleaved=rope_interleaved,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            layer_scale=layer_scale,
            drop_path=drop_path,
            quantize=quantize,
        )
    _checks.tensor("x", x)
    _checks.tensor("proj_weight", proj_weight)
    biases = qkv_bias if isinstance(qkv_bias, tuple) else (qkv_bias, None, None)
    for name, given in (("qkv_weight", weights), ("qkv_bias", biases)):
        if len(given) != 3:
            raise ValueError(f"{name}: {len(given)} tensors; accepted: one, or a tuple of three")
    if isinstance(qkv_bias, tuple) and not isinstance(qkv_weight, tuple):
        raise ValueError("qkv_bias: a tuple of three, but qkv_weight is one packed tensor; give both in one form")
    if scale is None:
        head_dim = proj_weight.shape[-1] // max(num_heads, 1) if proj_weight.ndim else 0
        scale = head_dim**-0.5 if head_dim else 1.0
    cos, sin = _checks.pair("rope", rope, "cos and sin, each (P, head_dim)")
    dtype, pair = autocast_dtype(x), _checks.quantize_pair(quantize, "(qkv, proj)")
    arguments = (
        x,
        *(t for pair in zip(weights, biases, strict=True) for t in pair),
        proj_weight,
        proj_bias,
        num_heads,
        scale,
        bias,
        cos,
        sin,
        rope_interleaved,
        norm_weight,
        norm_bias,
        norm,
        eps,
        layer_scale,
        drop_path,
        dtype,
        *pair,
    )
    if pair == (None, None) and _backend.trains(x, dtype or x.dtype, arguments):
        _output(*arguments)
        return _differentiable(*arguments)
    return _op(*arguments)


class _Arguments(NamedTuple):
    """What the registered operator takes, in its order."""

    x: Tensor
    q_weight: Tensor  # or all three, packed
    q_bias: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None
    v_weight: Tensor | None
    v_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    num_heads: int
    scale: float
    bias: Tensor | None
    rope_cos: Tensor | None
    rope_sin: Tensor | None
    rope_interleaved: bool
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm: str
    eps: float
    layer_scale: Tensor | None
    drop_path: Tensor | None
    dtype: torch.dtype | None
    quantize_qkv: str | None
    quantize_proj: str | None

    def attention(self) -> dict[str, Any]:
        """The options of `ops.attention`."""
        rope = None if self.rope_cos is None or self.rope_sin is None else (self.rope_cos, self.rope_sin)
        return {"scale": self.scale, "bias": self.bias, "rope": rope, "rope_interleaved": self.rope_interleaved}

    def projections(self) -> list[tuple[str, Tensor, Tensor | None]]:
        """One packed [q; k; v], or three."""
        if self.k_weight is None or self.v_weight is None:
            return [("qkv", self.q_weight, self.q_bias)]
        return [
            ("q", self.q_weight, self.q_bias),
            ("k", self.k_weight, self.k_bias),
            ("v", self.v_weight, self.v_bias),
        ]


@_checks.remembered
def _output(*arguments: Any) -> Tensor:
    """Check everything and return the empty result: also the operator's fake version."""
    a = _Arguments(*arguments)
    x, projections = a.x, a.projections()
    _checks.floating("x", x)
    _checks.ndim("x", x, 3, "(B, N, D)")
    _checks.floating("proj_weight", a.proj_weight)
    _checks.ndim("proj_weight", a.proj_weight, 2, "(D, num_heads * head_dim)")
    batch, tokens, _ = x.shape
    features, inner = a.proj_weight.shape
    if x.shape[-1] != features:
        raise ValueError(
            f"x: shape {tuple(x.shape)} does not fit proj_weight {tuple(a.proj_weight.shape)}; accepted: (B, N, D)"
        )
    if a.num_heads < 1 or inner % a.num_heads:
        raise ValueError(f"num_heads: {a.num_heads}; accepted: a divisor of proj_weight's {inner} columns")
    rows = inner * 3 // len(projections)
    for name, weight, bias in projections:
        _checks.floating(f"{name}_weight", weight)
        if weight.shape != (rows, features):
            raise ValueError(
                f"{name}_weight: shape {tuple(weight.shape)} does not fit proj_weight "
                f"{tuple(a.proj_weight.shape)}; accepted: {(rows, features)}"
            )
        _checks.vector(f"{name}_bias", bias, rows)
    _checks.vector("proj_bias", a.proj_bias, features)
    _checks.norm(a.norm, a.norm_weight, a.norm_bias, features)
    _checks.vector("layer_scale", a.layer_scale, features)
    _checks.drop_path(a.drop_path, x)
    _checks.quantize(a.quantize_qkv)
    _checks.quantize(a.quantize_proj)
    _checks.attention_bias(a.bias, (batch, a.num_heads, tokens, tokens))
    _checks.rope(a.rope_cos, a.rope_sin, tokens, tokens, inner // a.num_heads)
    named: dict[str, Tensor | None] = {f"{name}_weight": weight for name, weight, _ in projections}
    named |= {f"{name}_bias": bias for name, _, bias in projections}
    named |= {"proj_weight": a.proj_weight, "proj_bias": a.proj_bias}
    if a.dtype is None:
        for name, operand in named.items():
            _checks.same_dtype(name, operand, x.dtype, "x")
    others = {"norm_weight": a.norm_weight, "norm_bias": a.norm_bias, "bias": a.bias}
    others |= {"rope[0]": a.rope_cos, "rope[1]": a.rope_sin}
    _checks.same_device(x=x, **named, **others, layer_scale=a.layer_scale, drop_path=a.drop_path)
    return x.new_empty(x.shape)


def _kernel(*arguments: Any) -> Tensor:
    out = _output(*arguments)
    if out.numel() == 0:
        return out
    a = _Arguments(*arguments)
    compute = a.dtype or a.x.dtype
    backend = _backend.choose(a.x, compute, *(t for t in arguments[1:] if isinstance(t, Tensor)))
    scratch = 4 * a.x.shape[1] * a.proj_weight.shape[1] * compute.itemsize
    if backend != "cpp" or scratch > MOST_SCRATCH:
        return _composed(a)
    contiguous = _backend.contiguous
    weights: list[Tensor | None] = []
    for _, weight, weight_bias in a.projections():
        weights += [*_int8.operand(weight, a.quantize_qkv), contiguous(weight_bias)]
    weights += [None] * (9 - len(weights))
    weights += [*_int8.operand(a.proj_weight, a.quantize_proj), contiguous(a.proj_bias)]
    tables = [None if t is None else _backend.unit_stride(t) for t in (a.rope_cos, a.rope_sin)]
    factors = None if a.drop_path is None else a.drop_path.float().contiguous()
    batch, tokens, _ = a.x.shape
    bias = None if a.bias is None else a.bias.expand(batch, a.num_heads, tokens, tokens)
    _backend.extension().self_attention(
        _backend.rows(out),
        _backend.rows(a.x),
        *weights,
        contiguous(a.norm_weight),
        contiguous(a.norm_bias),
        _checks.NORMS.index(a.norm),
        a.eps,
        bias,
        a.scale,
        *tables,
        a.rope_interleaved,
        contiguous(a.layer_scale),
        factors,
        batch,
        a.num_heads,
        _backend.code(compute),
        torch.get_num_threads(),
    )
    return out


def _composed(a: _Arguments) -> Tensor:
    """By the operators that this one is made of, each on its own backend."""
    norm = (a.norm_weight, a.norm_bias, a.norm, a.eps, "none", a.dtype, a.quantize_qkv)
    projected = [norm_linear_kernel(a.x, weight, bias, *norm) for _, weight, bias in a.projections()]
    if len(projected) == 1:
        q, k, v = projected[0].unflatten(-1, (3, a.num_heads, -1)).unbind(2)
    else:
        q, k, v = (t.unflatten(-1, (a.num_heads, -1)) for t in projected)
    options = {"rope_cos": a.rope_cos, "rope_sin": a.rope_sin, "rope_interleaved": a.rope_interleaved}
    heads = attention_kernel(q, k, v, scale=a.scale, bias=a.bias, dtype=a.dtype, **options)
    ends = (a.x, a.layer_scale, a.drop_path, a.dtype, a.quantize_proj)
    return linear_residual_kernel(heads, a.proj_weight, a.proj_bias, *ends)


def _differentiable(*arguments: Any) -> Tensor:
    """By operators that keep q, k, v and heads for backwards of their own."""
    a = _Arguments(*arguments)
    norm: dict[str, Any] = {"norm": a.norm, "norm_weight": a.norm_weight, "norm_bias": a.norm_bias, "eps": a.eps}
    with in_dtype(a.dtype, a.x.device):
        projected = [norm_linear(a.x, weight, bias, **norm) for _, weight, bias in a.projections()]
        if len(projected) == 1:
            q, k, v = projected[0].unflatten(-1, (3, a.num_heads, -1)).unbind(2)
        else:
            q, k, v = (t.unflatten(-1, (a.num_heads, -1)) for t in projected)
        heads = attention(q, k, v, **a.attention())
        return linear_residual(
            heads, a.proj_weight, a.proj_bias, residual=a.x, layer_scale=a.layer_scale, drop_path=a.drop_path
        )


def _recomputed(*arguments: Any) -> Tensor:
    """What the backward of `self_attention` itself recomputes: with kernels where there are any, else the reference."""
    a = _Arguments(*arguments)
    return (_differentiable if _backend.differentiates(a.x, a.dtype or a.x.dtype) else _reference)(*arguments)


def _reference(*arguments: Any) -> Tensor:
    a = _Arguments(*arguments)
    projections = a.projections()
    packed = len(projections) == 1
    with in_dtype(a.dtype, a.x.device):
        return reference.self_attention(
            a.x,
            a.q_weight if packed else tuple(weight for _, weight, _ in projections),
            a.q_bias if packed else tuple(bias for _, _, bias in projections),
            a.proj_weight,
            a.proj_bias,
            num_heads=a.num_heads,
            **a.attention(),
            norm=a.norm,
            norm_weight=a.norm_weight,
            norm_bias=a.norm_bias,
            eps=a.eps,
            layer_scale=a.layer_scale,
            drop_path=a.drop_path,
        )


_op = register(
    "self_attention(Tensor x, Tensor q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? v_weight, "
    "Tensor? v_bias, Tensor proj_weight, Tensor? proj_bias, int num_heads, float scale, Tensor? bias, "
    "Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved, Tensor? norm_weight, Tensor? norm_bias, str norm, "
    "float eps, Tensor? layer_scale, Tensor? drop_path, ScalarType? dtype, str? quantize_qkv, str? quantize_proj) "
    "-> Tensor",
    kernel=_kernel,
    fake=_output,
    reference=_recomputed,
)
