"""Ground truth: the operators and the Vision Transformer in plain PyTorch."""

from fastvit.reference.ops import (
    attention,
    attention_qkvpacked,
    linear_residual,
    mlp,
    norm_linear,
    normalize_image,
    patch_embed,
    pool,
    relative_index,
    self_attention,
)
from fastvit.reference.vit import VisionTransformer, interpolate_pos_embed

__all__ = [
    "VisionTransformer",
    "attention",
    "attention_qkvpacked",
    "interpolate_pos_embed",
    "linear_residual",
    "mlp",
    "norm_linear",
    "normalize_image",
    "patch_embed",
    "pool",
    "relative_index",
    "self_attention",
]
