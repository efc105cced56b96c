"""The operators in plain torch: slow, obvious, differentiable, in any float dtype.  The only ground truth.

In float16 and bfloat16 they round where eager PyTorch rounds.  Mixed float dtypes compute in the wider one.  With
quantize="int8" (see `fastvit.reference.int8`) everything around an integer product is float32 or wider, and no gradient
passes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.reference import int8

Quantize = str | None
QuantizePair = Quantize | tuple[Quantize, Quantize]


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.linear(x.to(dtype), weight.to(dtype), _cast(bias, dtype))


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _normalize(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    dim = (x.shape[-1],)
    if norm == "layer":
        return F.layer_norm(x, dim, _cast(weight, x.dtype), _cast(bias, x.dtype), eps)
    if norm == "rms":
        return F.rms_norm(x, dim, _cast(weight, x.dtype), eps)
    return x


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    return x


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
    quantize: Quantize = None,
) -> Tensor:
    """activation(norm(x) @ weight.T + bias); arguments as in `fastvit.ops.norm_linear`."""
    x = x.to(torch.promote_types(x.dtype, weight.dtype))
    if quantize is not None:
        wide = _normalize(_wide(x), norm, norm_weight, norm_bias, eps)
        return _activate(int8.linear(wide, weight, bias), activation).to(x.dtype)
    return _activate(_linear(_normalize(x, norm, norm_weight, norm_bias, eps), weight, bias), activation)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """softmax(scale * q @ k.T + bias) @ v per head; arguments as in `fastvit.ops.attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # Scaled before the product, which may be beyond float16's range.
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    wide = logits if logits.dtype == torch.float64 else logits.float()
    highest = wide.detach().amax(-1, keepdim=True)
    weights = (wide - torch.where(highest.isinf(), 0.0, highest)).exp()
    total = weights.sum(-1, keepdim=True)
    # A row whose keys are all masked sums to zero: its output is zero, not 0 / 0.
    weights = weights / torch.where(total == 0, 1.0, total)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def attention_qkvpacked(
    qkv: Tensor, num_heads: int, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """`attention` of a packed (B, N, 3 * num_heads * head_dim) projection."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return attention(q, k, v, scale=scale, bias=bias)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    quantize: Quantize = None,
) -> Tensor:
    """residual + drop_path * layer_scale * (x @ weight.T + bias); arguments as in `fastvit.ops.linear_residual`."""
    branch = _linear(x, weight, bias) if quantize is None else int8.linear(x, weight, bias)
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop_path is not None:
        branch = branch * drop_path.view(-1, *[1] * (branch.ndim - 1)).to(branch.dtype)
    return (residual + branch).to(residual.dtype)


def self_attention(
    x: Tensor,
    qkv_weight: Tensor | tuple[Tensor, ...],
    qkv_bias: Tensor | tuple[Tensor | None, ...] | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    scale: float | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    quantize: QuantizePair = None,
) -> Tensor:
    """x + drop_path * layer_scale * proj(attention(qkv(norm(x)))); arguments as in `fastvit.ops.self_attention`."""
    of_qkv, of_proj = quantize if isinstance(quantize, tuple) else (quantize, quantize)
    project = partial(norm_linear, x, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, quantize=of_qkv)
    if isinstance(qkv_weight, tuple):
        biases = qkv_bias if isinstance(qkv_bias, tuple) else (None,) * 3
        pairs = zip(qkv_weight, biases, strict=True)
        q, k, v = (project(weight, bias_).unflatten(-1, (num_heads, -1)) for weight, bias_ in pairs)
        heads = attention(q, k, v, scale=scale, bias=bias)
    else:
        assert not isinstance(qkv_bias, tuple)
        heads = attention_qkvpacked(project(qkv_weight, qkv_bias), num_heads, scale=scale, bias=bias)
    return linear_residual(
        heads, proj_weight, proj_bias, residual=x, layer_scale=layer_scale, drop_path=drop_path, quantize=of_proj
    )


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
    quantize: QuantizePair = None,
) -> Tensor:
    """x + drop_path * layer_scale * fc2(activation(fc1(norm(x)))); arguments as in `fastvit.ops.mlp`."""
    of_fc1, of_fc2 = quantize if isinstance(quantize, tuple) else (quantize, quantize)
    hidden = norm_linear(
        x,
        fc1_weight,
        fc1_bias,
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        activation=activation,
        quantize=of_fc1,
    )
    return linear_residual(
        hidden, fc2_weight, fc2_bias, residual=x, layer_scale=layer_scale, drop_path=drop_path, quantize=of_fc2
    )


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    layout: str = "NCHW",
) -> Tensor:
    """Cut into patches, flatten, project, add positions, prepend; arguments as in `fastvit.ops.patch_embed`."""
    if layout == "NHWC":
        image = image.permute(0, 3, 1, 2)
    from_integers = not image.is_floating_point()
    if from_integers:
        # Normalised in float32, as images are before a model in low precision sees them.
        image = image.to(torch.promote_types(weight.dtype, torch.float32)) / 255
    for values, apply in ((mean, torch.sub), (std, torch.div)):
        if values is not None:
            image = apply(image, torch.as_tensor(values, dtype=image.dtype, device=image.device).view(-1, 1, 1))
    if from_integers:
        image = image.to(weight.dtype)
    patches = image.unfold(2, weight.shape[2], weight.shape[2]).unfold(3, weight.shape[3], weight.shape[3])
    # (B, C, rows, columns, P1, P2) -> (B, N, C * P1 * P2), the order of a convolution's weight.
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = _linear(patches, weight.flatten(1), bias)
    if pos_embed is not None:
        x = (x + pos_embed).to(x.dtype)
    if prefix is not None:
        x = torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
    return x


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
    """Final norm, token or mean pooling and head; arguments as in `fastvit.ops.pool`."""
    if weight is not None:
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
    if mode == "norm_avg":
        x = _normalize(x, norm, norm_weight, norm_bias, eps)[:, num_prefix_tokens:].mean(1)
    else:
        x = x[:, 0] if mode == "token" else x[:, num_prefix_tokens:].mean(1)
        x = _normalize(x, norm, norm_weight, norm_bias, eps)
    return x if weight is None else _linear(x, weight, bias)
