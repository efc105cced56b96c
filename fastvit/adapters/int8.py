"""Which linears of a block may multiply in int8: each is tried without data, on tokens that are hard to quantise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit.adapters.parts import BlockParts, Projection, Quantization, heads, hidden, read_norm
from fastvit.adapters.probe import isolated_copy

# A rotated product whose rows are nearly Gaussian is off by 1.0 to 1.4 %.  One that is off by several times as much has
# weights that a scale per channel can't hold, or inputs that even the rotation leaves with outliers.
LIMIT = 0.04

_TOKENS = 64
_MASSIVE_CHANNELS, _CHANNEL_FACTOR = 3, 100.0
_TOKEN_FACTOR = 1000.0


def choose_quantization(block: nn.Module, read: Any) -> Quantization:
    """int8 for every linear of `block` whose product stays within `LIMIT`; for the others, a note of the error."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        ops.use_backend("auto"),
    ):
        twin = isolated_copy(block, torch.float32)
        parts: BlockParts = read(twin)
        errors = _errors(parts, _synthetic_tokens(parts))
    chosen = {name: "int8" if error <= LIMIT else None for name, error in errors.items()}
    notes = tuple(
        (name, f"int8 error {error:.1%} on synthetic tokens, limit {LIMIT:.0%}".replace("%", " %"))
        for name, error in errors.items()
        if chosen[name] is None
    )
    return Quantization(**chosen, notes=notes)


def _synthetic_tokens(p: BlockParts) -> Tensor:
    """(1, N, D): Gaussian, with massive channels as a deep ViT's residual stream has, and one massive token."""
    tokens, features = _TOKENS if p.bias is None else p.bias.shape[-1], p.qkv[0][0].shape[1]
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, tokens, features, generator=generator, device="cpu")
    channels = torch.randperm(features, generator=generator, device="cpu")[:_MASSIVE_CHANNELS]
    x[..., channels] *= _CHANNEL_FACTOR
    x[:, 0] *= _TOKEN_FACTOR
    return x


def _errors(p: BlockParts, x: Tensor) -> dict[str, float]:
    """Each linear's error on the input that it has when the block runs in float32."""
    norm1, norm2 = read_norm(p.norm1, x.dtype), read_norm(p.norm2, x.dtype)
    attended = heads(p, x, norm1)
    after = ops.linear_residual(attended, *p.proj, residual=x, layer_scale=p.layer_scale1)
    return {
        "qkv": max(_error(p.norm1(x), projection) for projection in p.qkv),
        "proj": _error(attended, p.proj),
        "fc1": max(_error(p.norm2(after), projection) for projection in p.fc1),
        "fc2": _error(hidden(p, after, norm2), p.fc2),
    }


def _error(x: Tensor, projection: Projection) -> float:
    """The relative L2 error of a token's product, as a root mean square over tokens: a massive one counts once."""
    weight = projection[0]
    exact = F.linear(x, weight)
    difference = (ops.norm_linear(x, weight, norm="none", quantize="int8") - exact).norm(dim=-1)
    size = exact.norm(dim=-1)
    # Nothing is wrong with a product of zeros; a NaN is never within a limit.
    relative = torch.where((difference == 0) & (size == 0), 0.0, difference / size)
    return float(relative.square().mean().sqrt())
