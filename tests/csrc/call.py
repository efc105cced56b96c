"""Calls of fastvit._C with a fresh output, filled with NaN.

`kernels` is fastvit._C itself, or a driver of an emulated machine: the fixture `isa` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit import _C
from fastvit.reference.int8 import rotation

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu")
NORMS = ("none", "layer", "rms")
MODES = ("token", "avg", "norm_avg")


# Levels that multiply bf16 as bf16; elsewhere it is multiplied as f32.
BF16_PRODUCTS = ("avx512_bf16", "amx", "neon_bf16")

kernels: Any = _C

# A weight in float, or int8 rows and their scales.
Weight = Tensor | tuple[Tensor, Tensor]


def operand(weight: Weight) -> tuple[Tensor, Tensor | None]:
    return weight if isinstance(weight, tuple) else (weight, None)


def quantized(x: Tensor, threads: int = 2) -> tuple[Tensor, Tensor]:
    """(rotated int8 rows, scales) of (M, K)."""
    values = torch.full((x.shape[0], rotation(x.shape[1])[1]), 99, dtype=torch.int8)
    scale = blank(x.shape[0], dtype=torch.float32)
    kernels.quantize_rows(values, scale, x, threads)
    return values, scale


def packed(weight: Tensor) -> Tensor:
    """The panels of an int8 weight (N, K)."""
    panels = torch.full((kernels.packed_bytes(*weight.shape),), 99, dtype=torch.int8)
    kernels.pack_weight(panels, weight)
    return panels


def compute_code(dtype: torch.dtype) -> int:
    return {torch.float32: 0, torch.bfloat16: 1}[dtype]


def blank(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def norm_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    compute: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    threads: int = 2,
) -> Tensor:
    rows = operand(weight)[0].shape[0]
    width = rows // 2 if activation == "swiglu" else rows
    out = blank(x.shape[0], width, dtype=out_dtype or compute)
    tensors = (*operand(weight), bias, norm_weight, norm_bias)
    codes = (NORMS.index(norm), eps, ACTIVATIONS.index(activation), compute_code(compute), threads)
    kernels.norm_linear(out, x, *tensors, *codes)
    return out


def linear_residual(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    rows_per_sample: int = 1,
    out: Tensor | None = None,
    compute: torch.dtype = torch.float32,
    threads: int = 2,
) -> Tensor:
    out = blank(*residual.shape, dtype=residual.dtype) if out is None else out
    tensors = (out, x, *operand(weight), bias, residual, layer_scale, row_scale)
    kernels.linear_residual(*tensors, rows_per_sample, compute_code(compute), threads)
    return out


def mlp(
    x: Tensor,
    weight1: Weight,
    bias1: Tensor,
    weight2: Weight,
    bias2: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    activation: str,
    layer_scale: Tensor,
    row_scale: Tensor,
    rows_per_sample: int,
    *,
    compute: torch.dtype,
    threads: int = 2,
) -> Tensor:
    out = blank(*x.shape, dtype=x.dtype)
    tensors = (out, x, *operand(weight1), bias1, *operand(weight2), bias2, norm_weight, norm_bias)
    codes = (NORMS.index("layer"), 1e-6, ACTIVATIONS.index(activation))
    kernels.mlp(*tensors, *codes, layer_scale, row_scale, rows_per_sample, compute_code(compute), threads)
    return out


def self_attention(
    x: Tensor,
    projections: list[tuple[Weight, Tensor]],
    proj_weight: Weight,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    attn_bias: Tensor,
    layer_scale: Tensor,
    row_scale: Tensor,
    samples: int,
    num_heads: int,
    rope: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    interleaved: bool = False,
    *,
    compute: torch.dtype,
    threads: int = 2,
) -> Tensor:
    out = blank(*x.shape, dtype=x.dtype)
    qkv = [t for weight, bias in projections for t in (*operand(weight), bias)] + [None] * (9 - 3 * len(projections))
    tensors = (out, x, *qkv, *operand(proj_weight), proj_bias, norm_weight, norm_bias)
    inner = operand(projections[0][0])[0].shape[0] * len(projections) // 3
    scale = (inner // num_heads) ** -0.5
    turns = (*rope, int(interleaved))
    ends = (attn_bias, scale, *turns, layer_scale, row_scale, samples, num_heads)
    kernels.self_attention(*tensors, NORMS.index("layer"), 1e-6, *ends, compute_code(compute), threads)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, threads: int = 2) -> None:
    """In place."""
    kernels.rotate(x, cos, sin, int(interleaved), threads)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    compute: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    threads: int = 2,
) -> Tensor:
    out = blank(*q.shape, dtype=out_dtype or compute)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernels.attention(out, q, k, v, bias, scale, compute_code(compute), threads)
    return out


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    channel_scale: Tensor | None = None,
    channel_shift: Tensor | None = None,
    weight_scale: Tensor | None = None,
    weight_shift: Tensor | None = None,
    pack: bool = False,
    channels_last: bool = False,
    compute: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    threads: int = 2,
) -> Tensor:
    height, width = image.shape[1:3] if channels_last else image.shape[2:]
    patches = (height // weight.shape[2]) * (width // weight.shape[3])
    rows = patches + (0 if prefix is None else prefix.shape[-2])
    out = blank(image.shape[0], rows, weight.shape[0], dtype=out_dtype or compute)
    of_weight = (weight_scale, weight_shift, packed(weight.flatten(1)) if pack else None)
    tensors = (out, image, weight, *of_weight, bias, pos_embed, prefix, channel_scale, channel_shift)
    kernels.patch_embed(*tensors, channels_last, compute_code(compute), threads)
    return out


def pool(
    x: Tensor,
    *,
    mode: str,
    num_prefix_tokens: int = 1,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    compute: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    threads: int = 2,
) -> Tensor:
    width = x.shape[-1] if weight is None else weight.shape[0]
    out = blank(x.shape[0], width, dtype=out_dtype or compute)
    codes = (MODES.index(mode), num_prefix_tokens, NORMS.index(norm))
    vectors = (norm_weight, norm_bias, eps, weight, bias)
    kernels.pool(out, x, *codes, *vectors, compute_code(compute), threads)
    return out
