"""The operators in plain torch, for any dtype: float64 is the truth, bf16 is what eager PyTorch makes of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def normed(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    if norm == "none":
        return x
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def activated(y: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, value = y.chunk(2, dim=-1)
        return F.silu(gate) * value
    return {
        "none": lambda t: t,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
        "silu": F.silu,
        "relu": F.relu,
    }[activation](y)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if bias is not None:
        scores = scores + bias
    # A row without any allowed key gives NaN here and zeros by definition.
    return torch.einsum("bhqk,bkhd->bqhd", torch.nan_to_num(scores.softmax(-1)), v)


def as_eager(result: Tensor, compute: torch.dtype, out: torch.dtype) -> Tensor:
    """What eager PyTorch would give with products in `compute` and an output of dtype `out`, as a yardstick.

    bf16 products stored as f32 are still judged by bf16's error: float64 says that to `assert_close`.
    """
    result = result.to(out)
    return result.double() if torch.bfloat16 in (compute, out) else result
