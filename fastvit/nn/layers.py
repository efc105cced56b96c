"""Small layers of a ViT block: LayerScale and DropPath."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x * gamma per channel (Touvron et al. 2021, "Going deeper with image transformers").

    Args:
        dim: channels.
        init_values: start value of every gamma.
    """

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al. 2016): in training a branch is dropped with probability `drop_prob`.

    Kept branches are divided by the probability of keeping them.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob: {drop_prob}; accepted: 0 <= drop_prob < 1")
        self.drop_prob = drop_prob

    def factors(self, x: Tensor) -> Tensor | None:
        """(B,) factors, 0 or 1 / keep, for a batch like `x`; None where nothing is dropped."""
        if not self.training or self.drop_prob == 0.0:
            return None
        keep = 1.0 - self.drop_prob
        return x.new_empty(x.shape[0]).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        return x if factors is None else x * factors.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


def branch_arguments(residual: Tensor, layer_scale: nn.Module, drop_path: nn.Module) -> dict[str, Tensor | None]:
    """`layer_scale` and `drop_path` arguments of a residual branch from its modules."""
    return {
        "layer_scale": layer_scale.gamma if isinstance(layer_scale, LayerScale) else None,
        "drop_path": drop_path.factors(residual) if isinstance(drop_path, DropPath) else None,
    }
