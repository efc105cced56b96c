"""Paired, interleaved measurement: A B A B ..., medians, and the ratio pair by pair.

A machine's speed drifts by tens of percent within a minute; the two halves of a pair see the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fastvit.ops._backend import extension

_PEAK_SECONDS = 0.03


@dataclass(frozen=True)
class Paired:
    """Seconds per call of a baseline and a candidate, measured in turn; `peak` in FLOP/s from the same minutes."""

    baseline: list[float]
    candidate: list[float]
    peak: float | None

    @property
    def rounds(self) -> int:
        return len(self.baseline)

    @property
    def speedup(self) -> float:
        """Median of baseline / candidate over the pairs."""
        return median(b / c for b, c in zip(self.baseline, self.candidate, strict=True))

    @property
    def baseline_seconds(self) -> float:
        return median(self.baseline)

    @property
    def candidate_seconds(self) -> float:
        return median(self.candidate)


def paired(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 10.0,
    min_rounds: int = 3,
    max_rounds: int = 50,
    on_round: Callable[[float], None] | None = None,
) -> Paired:
    """Measure both in turn until `seconds` are spent.

    Args:
        baseline, candidate: calls to time; each is run once before to warm up.
        dtype: whose peak rate is measured between the pairs.
        device: "cpu" or "cuda" (waits for the GPU around each call).
        seconds: budget; at least `min_rounds` and at most `max_rounds` pairs are run.
        on_round: told the fraction done after each pair.
    """
    for call in (baseline, candidate):
        _time(call, device)
    start = time.perf_counter()
    a, b, peaks = [], [], []
    while len(a) < min_rounds or (len(a) < max_rounds and time.perf_counter() - start < seconds):
        # Who goes first alternates, so that neither always follows the other's cache contents.
        first, second = (baseline, candidate) if len(a) % 2 == 0 else (candidate, baseline)
        times = {first: _time(first, device), second: _time(second, device)}
        a.append(times[baseline])
        b.append(times[candidate])
        if (peak := peak_flops(dtype, device)) is not None:
            peaks.append(peak)
        if on_round is not None:
            on_round(min(1.0, max((time.perf_counter() - start) / seconds, len(a) / max_rounds)))
    return Paired(a, b, median(peaks) if peaks else None)


def _time(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(dtype: torch.dtype, device: str = "cpu") -> float | None:
    """FLOP/s that this machine reaches in `dtype` now: register-only loops on CPU, a large product on GPU."""
    if device == "cuda":
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        seconds = min(_time(lambda: a @ a, device) for _ in range(3))
        return 2 * 8192**3 / seconds
    ext = extension()
    kind = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
    if ext is None or kind is None:
        return None
    return ext.peak(kind, torch.get_num_threads(), _PEAK_SECONDS) * 1e9
