"""The one place for test data, which is never nice: random norm weights, massive channels, odd sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.bench.models import randomize

__all__ = ["HEAD_DIMS", "MLP_WIDTHS", "TOKEN_COUNTS", "generator", "randomize", "strided", "tokens", "vector", "weight"]

TOKEN_COUNTS = (1, 5, 50, 197, 198, 201, 257, 577)
HEAD_DIMS = (32, 40, 64, 72, 76, 80, 88, 96, 104, 112, 128)
MLP_WIDTHS = (2730, 3420, 4304)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, seed: int = 0, massive: int = 3, offset: float = 0.0) -> Tensor:
    """float64 activations (..., D) whose first few random channels are 100 times larger ("massive activations")."""
    g = generator(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64) + offset
    channels = torch.randperm(shape[-1], generator=g)[: min(massive, shape[-1] // 8)]
    x[..., channels] *= 100.0
    return x


def weight(*shape: int, seed: int = 1) -> Tensor:
    """float64 (N, K, ...) scaled by fan-in, so that activations keep their size through depth."""
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * fan_in**-0.5


def vector(size: int, seed: int = 2, mean: float = 0.0, std: float = 0.5) -> Tensor:
    """float64 (size,): a bias, or with mean=1 a norm weight."""
    return torch.randn(size, generator=generator(seed), dtype=torch.float64) * std + mean


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values in another memory layout: "contiguous", "sliced" (gaps between rows) or "transposed"."""
    if kind == "contiguous":
        return t.contiguous()
    if kind == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    if kind == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(kind)
