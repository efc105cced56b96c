"""Paired measurement of fastvit against eager PyTorch, with the machine's own limits beside it.

Nothing here imports torch at once, so that `fastvit --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable

# The command's names of precisions, and torch's.
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}

# Whose models can be built by name.
LIBRARIES = ("timm", "transformers", "torchvision", "open_clip")

# As docs/design.md defines them: relative L2 against float64, and its ratio to eager's in the same dtype.
FLOAT32_TOLERANCE = 1e-5
LOW_PRECISION_RATIO = 1.2

# Told what is being done, and the fraction done.
Progress = Callable[[str, float], None]


class UsageError(Exception):
    """The user asked for something that does not exist or can't run; the message says what is accepted."""


def passes(dtype: str, error: float, eager_error: float) -> bool:
    """Is `error` as small as `dtype` demands beside what eager PyTorch makes of the same data?"""
    if dtype == "f32" and error <= FLOAT32_TOLERANCE:
        return True
    return error <= LOW_PRECISION_RATIO * eager_error
