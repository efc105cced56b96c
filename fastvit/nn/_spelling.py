"""How torch's own modules are spelled as arguments of the operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU of the original CLIP (Radford et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Any] = {
    "none": nn.Identity,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}
_NORMS: dict[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": nn.Identity}


def make_activation(act_layer: str | type[nn.Module]) -> nn.Module:
    """An activation module from its name ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "none") or class."""
    if not isinstance(act_layer, str):
        return act_layer()
    if act_layer not in _ACTIVATIONS:
        raise ValueError(f"act_layer: {act_layer!r} is not known; accepted: {', '.join(_ACTIVATIONS)}, or a class")
    return _ACTIVATIONS[act_layer]()


def make_norm(norm_layer: str | type[nn.Module], dim: int, eps: float = 1e-6) -> nn.Module:
    """A norm module over `dim` channels from its name ("layer", "rms", "none") or from a callable that takes `dim`."""
    if not isinstance(norm_layer, str):
        return norm_layer(dim)
    if norm_layer not in _NORMS:
        raise ValueError(f"norm_layer: {norm_layer!r} is not known; accepted: {', '.join(_NORMS)}, or a class")
    return nn.Identity() if norm_layer == "none" else _NORMS[norm_layer](dim, eps=eps)


def activation_name(module: nn.Module) -> str | None:
    """The operators' name of an activation module, or None for one they lack."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    names = {nn.Identity: "none", nn.SiLU: "silu", nn.ReLU: "relu", QuickGELU: "quick_gelu"}
    return names.get(kind)


def norm_arguments(module: Any, dtype: torch.dtype, kind: type[nn.Module] | None = None) -> dict[str, Any] | None:
    """Keyword arguments `norm`, `norm_weight`, `norm_bias`, `eps` for a norm module, or None for one they lack.

    kind: torch's class that computes what the module does, if it is none of torch's own.
    """
    kind = kind or type(module)
    if kind is nn.Identity:
        return {"norm": "none"}
    if not issubclass(kind, (nn.LayerNorm, nn.RMSNorm)) or len(module.normalized_shape) != 1:
        return None
    if issubclass(kind, nn.LayerNorm):
        return {"norm": "layer", "norm_weight": module.weight, "norm_bias": module.bias, "eps": module.eps}
    # torch's RMSNorm takes the dtype's own epsilon when none is given.
    eps = torch.finfo(dtype).eps if module.eps is None else module.eps
    return {"norm": "rms", "norm_weight": module.weight, "eps": eps}
