"""A small call of every operator, its tensors in float64 and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests import nasty

B, N, D, H, HEADS = 3, 5, 32, 48, 2

Sample = tuple[dict[str, Tensor], dict[str, Any]]


def _norm() -> dict[str, Tensor]:
    return {"norm_weight": nasty.vector(D, 3, mean=1.0), "norm_bias": nasty.vector(D, 4)}


def _norm_linear() -> Sample:
    tensors = {"x": nasty.tokens(B, N, D), "weight": nasty.weight(H, D), "bias": nasty.vector(H), **_norm()}
    return tensors, {"activation": "gelu"}


def _attention() -> Sample:
    q, k, v = (nasty.tokens(B, N, HEADS, D // HEADS, seed=seed, massive=0) for seed in range(3))
    return {"q": q, "k": k, "v": v, "bias": nasty.tokens(HEADS, N, N, seed=3)}, {"scale": 0.3}


def _attention_qkvpacked() -> Sample:
    return {"qkv": nasty.tokens(B, N, 3 * D, massive=0)}, {"num_heads": HEADS}


def _linear_residual() -> Sample:
    tensors = {
        "x": nasty.tokens(B, N, H),
        "weight": nasty.weight(D, H),
        "bias": nasty.vector(D),
        "residual": nasty.tokens(B, N, D, seed=5),
        "layer_scale": nasty.vector(D, 6),
    }
    return tensors, {"drop_path": torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64)}


def _self_attention() -> Sample:
    tensors = {
        "x": nasty.tokens(B, N, D),
        "qkv_weight": nasty.weight(3 * D, D),
        "qkv_bias": nasty.vector(3 * D),
        "proj_weight": nasty.weight(D, D, seed=8),
        "proj_bias": nasty.vector(D),
        "layer_scale": nasty.vector(D, 6),
        **_norm(),
    }
    return tensors, {"num_heads": HEADS}


def _mlp() -> Sample:
    tensors = {
        "x": nasty.tokens(B, N, D),
        "fc1_weight": nasty.weight(2 * H, D),
        "fc1_bias": nasty.vector(2 * H),
        "fc2_weight": nasty.weight(D, H),
        "fc2_bias": nasty.vector(D),
        "layer_scale": nasty.vector(D, 6),
        **_norm(),
    }
    return tensors, {"activation": "swiglu"}


def _patch_embed() -> Sample:
    tensors = {
        "image": nasty.tokens(B, 3, 8, 12, massive=0),
        "weight": nasty.weight(D, 3, 4, 4),
        "bias": nasty.vector(D),
        "pos_embed": nasty.tokens(6, D, seed=3),
        "prefix": nasty.tokens(2, D, seed=4),
    }
    return tensors, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 2.0]}


def _pool() -> Sample:
    tensors = {
        "x": nasty.tokens(B, N, D, offset=2.0),
        "weight": nasty.weight(10, D),
        "bias": nasty.vector(10),
        **_norm(),
    }
    return tensors, {"mode": "avg"}


SAMPLES: dict[str, Callable[[], Sample]] = {
    "norm_linear": _norm_linear,
    "attention": _attention,
    "attention_qkvpacked": _attention_qkvpacked,
    "linear_residual": _linear_residual,
    "self_attention": _self_attention,
    "mlp": _mlp,
    "patch_embed": _patch_embed,
    "pool": _pool,
}


def sample(name: str, dtype: torch.dtype) -> Sample:
    """The tensors and the other arguments in `dtype`.

    Everything starts from float32 values, so that a truth in float64 is of the same numbers.
    """
    tensors, options = SAMPLES[name]()

    def convert(value: Any) -> Any:
        return value.float().to(dtype) if isinstance(value, Tensor) else value

    return {key: convert(t) for key, t in tensors.items()}, {key: convert(o) for key, o in options.items()}
