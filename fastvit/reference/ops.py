"""The operators in plain torch: slow, obvious, differentiable, in any float dtype.  The only ground truth.

In float16 and bfloat16 they round where eager PyTorch rounds.  Mixed float dtypes compute in the wider one.  With
quantize="int8" (see `fastvit.reference.int8`) everything around an integer product is float32 or wider, and no gradient
passes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
    qk_norm: str = "none",
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    qk_norm_eps: float = 1e-6,
    rel_pos: tuple[Tensor, Tensor] | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    window: tuple[int, int] | None = None,
    shift: tuple[int, int] = (0, 0),
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T + bias) @ v per head; arguments as in `fastvit.ops.attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    packed = cu_seqlens is not None and q.ndim == 3
    if packed:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    q = _normalize(q, qk_norm, q_norm_weight, q_norm_bias, qk_norm_eps)
    k = _normalize(k, qk_norm, k_norm_weight, k_norm_bias, qk_norm_eps)
    if rope is not None:
        q, k = (rotate(t, *rope, interleaved=rope_interleaved) for t in (q, k))
    images = q.shape[0]
    if window is not None:
        assert grid is not None
        q, k, v = (_partition(t, grid, window, shift) for t in (q, k, v))
    (batch, nq, heads, _), nk = q.shape, k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # Scaled before the product, which may be beyond float16's range.
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if rel_pos is not None:
        rows, columns = rel_pos
        relative = rows.unsqueeze(-1) + columns.unsqueeze(-2)
        logits = logits + relative.flatten(-2).to(logits.dtype)
    if bias_table is not None:
        if bias_index is None:
            height, width = window or grid or (1, nq)
            bias_index = relative_index(height, width, nq - height * width, device=q.device)
        logits = logits + bias_table[bias_index.long()].permute(2, 0, 1).to(logits.dtype)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    if any(shift):
        assert grid is not None and window is not None
        regions = _regions(grid, window, shift, q.device)
        apart = regions.unsqueeze(-1) != regions.unsqueeze(-2)
        logits = logits.masked_fill(apart.repeat(images, 1, 1).unsqueeze(1), float("-inf"))
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(nq, device=q.device), right=True)
        logits = logits.masked_fill(sequence.unsqueeze(-1) != sequence, float("-inf"))
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # A row without keys has no largest logit.
    highest = wide.detach().amax(-1, keepdim=True) if nk > 0 else wide.new_zeros(())
    weights = (wide - torch.where(highest.isinf(), 0.0, highest)).exp()
    total = weights.sum(-1, keepdim=True)
    # A row whose keys are all masked sums to zero: its output is zero, not 0 / 0.
    weights = weights / torch.where(total == 0, 1.0, total)
    if dropout_p > 0.0:
        assert dropout_seed is not None
        m, n = torch.arange(nq, device=q.device), torch.arange(nk, device=q.device)
        first = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
        if cu_seqlens is not None:
            # Every sequence counts its own tokens.
            first = sequence.view(1, 1, -1, 1)
            m = m - cu_seqlens[sequence]
            n = m
        stream = first * heads + torch.arange(heads, device=q.device).view(-1, 1, 1)
        keep = philox(dropout_seed, n, m.unsqueeze(-1), stream) >> 1 >= round(dropout_p * 2**31)
        weights = weights * keep / (1.0 - dropout_p)
    out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    if window is not None:
        assert grid is not None
        out = _merge(out, grid, window, shift)
    return out.squeeze(0) if packed else out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of the last tokens of x (B, N, H, D); those before are left alone.

    cos, sin: (P, D), P <= N.  A channel's partner lies D / 2 away (DINOv3), or beside it if `interleaved` (EVA-02).
    """
    prefix, patches = x[:, : x.shape[1] - cos.shape[0]], x[:, x.shape[1] - cos.shape[0] :]
    if interleaved:
        partner = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = patches.chunk(2, dim=-1)
        partner = torch.cat([-second, first], dim=-1)
    patches = patches * cos.to(x.dtype).unsqueeze(1) + partner * sin.to(x.dtype).unsqueeze(1)
    return torch.cat([prefix, patches], dim=1)


def relative_index(height: int, width: int, prefix: int = 0, *, device: torch.device | None = None) -> Tensor:
    """int64 (N, N): which entry of a table of (2 height - 1)(2 width - 1) + 3 prefix a query and a key share.

    Swin's numbering; with a class token (prefix = 1) BEiT's, whose last three entries are class to patch, patch to
    class, and class to class.
    """
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    index = (y.unsqueeze(1) - y + height - 1) * (2 * width - 1) + (x.unsqueeze(1) - x + width - 1)
    if prefix == 0:
        return index
    entries = (2 * height - 1) * (2 * width - 1) + 3
    full = index.new_empty(height * width + 1, height * width + 1)
    full[1:, 1:] = index
    full[0] = entries - 3
    full[:, 0] = entries - 2
    full[0, 0] = entries - 1
    return full


def _partition(x: Tensor, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(B, grid, ...) -> (B * windows, window, ...), both flattened row by row, after rolling by -shift."""
    x = x.unflatten(1, grid).roll((-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _merge(x: Tensor, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """The inverse of `_partition` for (B * windows, window, C)."""
    down, across = grid[0] // window[0], grid[1] // window[1]
    x = x.unflatten(1, window).unflatten(0, (-1, down, across)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2).roll(shift, (1, 2)).flatten(1, 2)


def _regions(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """(windows, window): which part of the image, before it was rolled, each token comes from (Liu et al. 2021)."""
    down = torch.arange(grid[0], device=device) >= grid[0] - shift[0]
    right = torch.arange(grid[1], device=device) >= grid[1] - shift[1]
    regions = down.unsqueeze(1).int() * 2 + right.int()
    return _partition(regions.flatten()[None, :, None, None], grid, window, (0, 0)).flatten(1)


def philox(seed: Tensor, *counters: Tensor) -> Tensor:
    """The first 32 bits, as int64, of Philox4x32-10 (Salmon et al. 2011) at up to four counters below 2^32."""
    c = [*counters, *[torch.zeros((), dtype=torch.int64, device=seed.device)] * (4 - len(counters))]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]

    def product(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The high and low 32 bits, by halves that int64 holds."""
        low = constant * (x & 0xFFFF)
        high = constant * (x >> 16) + (low >> 16)
        return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF

    for _ in range(10):
        (high_0, low_0), (high_2, low_2) = product(0xD2511F53, c[0]), product(0xCD9E8D57, c[2])
        c = [high_2 ^ c[1] ^ key[0], low_2, high_0 ^ c[3] ^ key[1], low_0]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c[0]


def attention_qkvpacked(qkv: Tensor, num_heads: int, **options: Any) -> Tensor:
    """`attention` of a packed (B, N, 3 * num_heads * head_dim) projection."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return attention(q, k, v, **options)


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
    rope: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
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
    options: dict[str, Any] = {"scale": scale, "bias": bias, "rope": rope, "rope_interleaved": rope_interleaved}
    if isinstance(qkv_weight, tuple):
        biases = qkv_bias if isinstance(qkv_bias, tuple) else (None,) * 3
        pairs = zip(qkv_weight, biases, strict=True)
        q, k, v = (project(weight, bias_).unflatten(-1, (num_heads, -1)) for weight, bias_ in pairs)
        heads = attention(q, k, v, **options)
    else:
        assert not isinstance(qkv_bias, tuple)
        heads = attention_qkvpacked(project(qkv_weight, qkv_bias), num_heads, **options)
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


def normalize_image(
    image: Tensor,
    dtype: torch.dtype,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    layout: str = "NCHW",
) -> Tensor:
    """(image - mean) / std as (B, C, H, W), an integer image divided by 255 first and then of `dtype`."""
    if layout == "NHWC":
        image = image.permute(0, 3, 1, 2)
    from_integers = not image.is_floating_point()
    if from_integers:
        # Normalised in float32, as images are before a model in low precision sees them.
        image = image.to(torch.promote_types(dtype, torch.float32)) / 255
    for values, apply in ((mean, torch.sub), (std, torch.div)):
        if values is not None:
            image = apply(image, torch.as_tensor(values, dtype=image.dtype, device=image.device).view(-1, 1, 1))
    return image.to(dtype) if from_integers else image


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
    quantize: Quantize = None,
) -> Tensor:
    """Cut into patches, flatten, project, add positions, prepend; arguments as in `fastvit.ops.patch_embed`."""
    if quantize is None:
        image = normalize_image(image, weight.dtype, mean, std, layout)
    elif layout == "NHWC":
        image = image.permute(0, 3, 1, 2)
    patches = image.unfold(2, weight.shape[2], weight.shape[2]).unfold(3, weight.shape[3], weight.shape[3])
    # (B, C, rows, columns, P1, P2) -> (B, N, C * P1 * P2), the order of a convolution's weight.
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    if quantize is None:
        x = _linear(patches, weight.flatten(1), bias)
    else:
        wide = torch.promote_types(weight.dtype, torch.float32)
        x = int8.patches(patches, weight, mean, std).to(wide)
        x = x if bias is None else x + bias
    if pos_embed is not None:
        x = (x + pos_embed).to(x.dtype)
    if prefix is not None:
        x = torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
    return x if quantize is None else x.to(weight.dtype)


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
