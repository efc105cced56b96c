"""pool: final norm, token or mean pooling, classifier head.

Shapes: x (B, N, D), head weight (C, D), out (B, C), or (B, D) without a head.

Cost in 16 bits: "token" reads one row a sample, the means all of x once: 2 B N D bytes, about 4 B N D flops, bound by
memory (ViT-B/16, batch 256: 77 MB); the head is 2 B D C flops (0.4 GFLOP) and the 1.5 MB of its weight.

Two launches: `_pool` makes the pooled and normalised vector, one program for each sample, and norm_linear's product
the logits.  The vector stays float32 between them.  "norm_avg" applies the norm's weight and bias once, after the
mean: they are the same for every token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastvit.kernels.launch import compute_dtype, launch
from fastvit.kernels.norm import row_moments
from fastvit.kernels.norm_linear import norm_linear
from torch import Tensor

# Elements of x that a program holds at a time, whatever the architecture: reading x is all that it does.
_BLOCK = 8192
_NUM_WARPS = 8


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
    """Launch: same signature and meaning as `fastvit.ops.pool`.

    The result has the dtype of `x`, or with a head the narrower of `x` and `weight`.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, tokens, dim = x.shape
    norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
    out = torch.empty(batch, dim, dtype=x.dtype if weight is None else torch.float32, device=x.device)
    first, last = (0, 1) if mode == "token" else (num_prefix_tokens, tokens)
    block_d = triton.next_power_of_2(dim)
    launch(
        _pool,
        batch,
        x,
        x.stride(0),
        x.stride(1),
        norm_weight,
        norm_bias,
        out,
        first,
        last,
        dim,
        eps,
        NORM=norm,
        NORM_FIRST=mode == "norm_avg",
        BLOCK_N=1 if mode == "token" else max(1, _BLOCK // block_d),
        BLOCK_D=block_d,
        num_warps=_NUM_WARPS,
        num_stages=1,
    )
    if weight is None:
        return out
    return norm_linear(out, weight.to(compute_dtype(x, weight)), bias, norm="none")


@triton.jit
def _pool(
    x, x_batch, x_row, norm_weight, norm_bias, out, first, last, D, eps,
    NORM: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)
    inside = d[None, :] < D
    x += sample * x_batch
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_N):
        mask = (start + n < last) & inside
        at = x + tl.cast(start, tl.int64) * x_row + (n * x_row + d[None, :])
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if NORM_FIRST and NORM != "none":
            mean, rstd = row_moments(values, D, eps, inside, NORM == "layer")
            values = tl.where(mask, (values - mean[:, None]) * rstd[:, None], 0.0)
        total += tl.sum(values, 0)
    pooled = total / (last - first)
    if NORM != "none":
        if not NORM_FIRST:
            mean, rstd = row_moments(pooled[None, :], D, eps, inside, NORM == "layer")
            pooled = tl.sum((pooled[None, :] - mean[:, None]) * rstd[:, None], 0)
        if norm_weight is not None:
            pooled *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
        if norm_bias is not None:
            pooled += tl.load(norm_bias + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + sample * D + d, pooled.to(out.dtype.element_ty), mask=d < D)
