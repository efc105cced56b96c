"""Ground truth: the operators and the Vision Transformer in plain PyTorch."""

from fastvit.reference.ops import attention, attention_qkvpacked, linear_residual, norm_linear, patch_embed, pool

__all__ = ["attention", "attention_qkvpacked", "linear_residual", "norm_linear", "patch_embed", "pool"]
