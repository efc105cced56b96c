"""attention: softmax(scale * q @ k.T + bias) @ v per head, read and written in the layout of the products around it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastvit import reference
from fastvit.ops import _backend, _checks
from fastvit.ops._library import autocast_dtype, in_dtype, register


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multi-head attention (Vaswani et al. 2017) that never holds an Nq x Nk matrix (Dao et al. 2022).

    Args:
        q: (B, Nq, num_heads, head_dim), float.  Any strides: slices of a packed qkv are read in place.
        k, v: (B, Nk, num_heads, head_dim), dtype of `q` (any float dtype under autocast).
        scale: of the logits; head_dim ** -0.5 by default.
        bias: broadcastable to (B, num_heads, Nq, Nk), float, added to the scaled logits.  -inf masks a key; a row
            that masks every key gives zeros.

    Returns:
        (B, Nq, num_heads * head_dim), contiguous; dtype of `q`, or autocast's.

    Raises:
        ValueError, TypeError: an argument's shape or dtype is not accepted.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(attention, (q, k, v), q, k, v, scale=scale, bias=bias)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _op(q, k, v, scale, bias, autocast_dtype(q))


def attention_qkvpacked(
    qkv: Tensor, num_heads: int, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """`attention` of a packed projection.

    Args:
        qkv: (B, N, 3 * num_heads * head_dim), as a `qkv` linear writes it: [q; k; v], each with heads outermost.
        num_heads: must divide the last dimension / 3.
        scale, bias: as in `attention`.

    Returns:
        (B, N, num_heads * head_dim).
    """
    if has_torch_function((qkv,)):
        return handle_torch_function(attention_qkvpacked, (qkv,), qkv, num_heads, scale=scale, bias=bias)
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv: shape {tuple(qkv.shape)} with num_heads={num_heads} does not fit; "
            "accepted: (B, N, 3 * num_heads * head_dim)"
        )
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return attention(q, k, v, scale=scale, bias=bias)


def _output(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Check everything and return the empty result: also the operator's fake version."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.floating(name, t)
        _checks.ndim(name, t, 4, "(B, N, num_heads, head_dim)")
    batch, nq, heads, head_dim = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q {tuple(q.shape)}; accepted: (B, Nk, H, D)")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)} does not fit; accepted: k's, {tuple(k.shape)}")
    if k.shape[1] == 0 and nq > 0:
        raise ValueError(f"k: shape {tuple(k.shape)} has no keys; accepted: Nk >= 1")
    _checks.attention_bias(bias, (batch, heads, nq, k.shape[1]))
    if dtype is None:
        _checks.same_dtype("k", k, q.dtype, "q")
        _checks.same_dtype("v", v, q.dtype, "q")
    _checks.same_device(q=q, k=k, v=v, bias=bias)
    return q.new_empty((batch, nq, heads * head_dim), dtype=dtype or q.dtype)


def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    out = _output(q, k, v, scale, bias, dtype)
    if out.numel() == 0:
        return out
    backend = _backend.choose(q, out.dtype, k, v, bias)
    if backend == "cpp":
        tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]
        if bias is not None:
            bias = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        _backend.extension().attention(  # type: ignore[union-attr]
            _backend.view(out.unflatten(-1, q.shape[2:])),
            *map(_backend.view, tensors),
            _backend.view(bias),
            scale,
            _backend.code(out.dtype),
            torch.get_num_threads(),
        )
        return out
    if backend == "triton":
        if dtype is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return _backend.triton_kernel("attention")(q, k, v, scale=scale, bias=bias)
    return _reference(q, k, v, scale, bias, dtype)


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    with in_dtype(dtype, q.device):
        return reference.attention(q, k, v, scale=scale, bias=bias)


_op = register(
    "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? bias, ScalarType? dtype) -> Tensor",
    kernel=kernel,
    fake=_output,
    reference=_reference,
)
