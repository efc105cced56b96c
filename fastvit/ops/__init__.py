"""The operators that every supported Vision Transformer is spelled in.

Each is a torch operator (`torch.ops.fastvit.*`) with a fake version and a backward, runs the C++ kernels on CPU, Triton
on CUDA and plain torch elsewhere, and means exactly what `fastvit.reference` says.
"""

from fastvit.ops._backend import use_backend
from fastvit.ops.attention import attention, attention_qkvpacked
from fastvit.ops.linear_residual import linear_residual
from fastvit.ops.mlp import mlp
from fastvit.ops.norm_linear import norm_linear
from fastvit.ops.patch_embed import patch_embed
from fastvit.ops.pool import pool
from fastvit.ops.self_attention import self_attention

__all__ = [
    "attention",
    "attention_qkvpacked",
    "linear_residual",
    "mlp",
    "norm_linear",
    "patch_embed",
    "pool",
    "self_attention",
    "use_backend",
]
