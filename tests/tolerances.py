"""The one place for "how wrong may it be": relative L2 against float64, as docs/design.md defines it."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32 = 1e-5
# bf16 and fp16 are held to eager PyTorch's own error in the same dtype on the same data.
LOW_PRECISION_RATIO = 1.2
# A rotated int8 product of nearly Gaussian rows is off by about 1 %; two in a row, with an activation between, by more.
INT8 = 0.025
# Two ways to the same int8 product differ where a value lies so near to half a step that float32 decides.
INT8_TIES = 2e-3


def relative_l2(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth| in float64; |actual| itself when the truth is zero."""
    actual, truth = actual.detach().double(), truth.detach().double()
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)} against {tuple(truth.shape)}"
    assert torch.isfinite(actual).all(), "not finite"
    scale = truth.norm().item()
    return (actual - truth).norm().item() / (scale or 1.0)


def assert_close(actual: Tensor, truth: Tensor, *, eager: Tensor | None = None) -> None:
    """`actual` is as near to the float64 `truth` as its dtype demands.

    float64 and float32 need 1e-12 and 1e-5.  Lower precisions need `eager`, what PyTorch computes in the same dtype.
    The error of a handful of numbers is chance: they get a wider limit.
    """
    error = relative_l2(actual, truth)
    if actual.dtype == torch.float64:
        limit = 1e-12
    elif actual.dtype == torch.float32 and (eager is None or eager.dtype == torch.float32):
        limit = FLOAT32
    else:
        assert eager is not None, f"{actual.dtype} is judged against eager PyTorch: give `eager`"
        limit = LOW_PRECISION_RATIO * relative_l2(eager, truth)
    limit *= 1 + 2 * max(truth.numel(), 1) ** -0.5
    assert error <= limit, f"relative L2 {error:.3e} against float64, allowed {limit:.3e}"
