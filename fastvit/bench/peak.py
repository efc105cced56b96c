"""The machine's own limits, measured beside what is judged by them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fastvit.ops._backend import extension

# Short, because it is repeated between the pairs of a measurement.
_SECONDS = 0.03
_GPU_PRODUCT = 8192
_GPU_COPY_BYTES = 1 << 30


def flops(dtype: torch.dtype, device: str = "cpu") -> float | None:
    """FLOP/s that this machine reaches in `dtype` now: register-only loops on CPU, a large product on GPU.

    torch.int8 stands for products of 8-bit integers.  None where there is no such yardstick: without the C++ extension,
    for float16 on CPU, and for int8 where the extension has no such kernels.
    """
    if device == "cuda":
        a = torch.randn(_GPU_PRODUCT, _GPU_PRODUCT, device=device, dtype=dtype)
        return 2 * _GPU_PRODUCT**3 / min(seconds_of(lambda: a @ a, device) for _ in range(3))
    ext = extension()
    kind = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "int8"}.get(dtype)
    if ext is None or kind is None:
        return None
    try:
        return ext.peak(kind, torch.get_num_threads(), _SECONDS) * 1e9
    except ValueError:
        return None


def bandwidth(device: str = "cpu") -> float | None:
    """Bytes per second, read plus written, of copying memory that no cache holds; None without the C++ extension."""
    if device == "cuda":
        a = torch.empty(_GPU_COPY_BYTES, dtype=torch.uint8, device=device)
        return 2 * _GPU_COPY_BYTES / min(seconds_of(a.clone, device) for _ in range(3))
    ext = extension()
    return None if ext is None else ext.copy_bandwidth(torch.get_num_threads(), _SECONDS) * 1e9


def seconds_of(call: Callable[[], Any], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, the GPU's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
