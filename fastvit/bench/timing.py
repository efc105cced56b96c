"""Paired, interleaved measurement: A B A B ..., medians, and the ratio pair by pair.

A machine's speed drifts by tens of percent within a minute; the two halves of a pair see the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fastvit.bench import peak

# Shorter calls are repeated until they take this long together.
_SAMPLE_SECONDS = 0.004
# A first call this long needs no second one to know that; on a slow machine warming up must not eat the budget.
_LONG_SECONDS = 0.2


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
    min_rounds: int = 2,
    max_rounds: int = 50,
    on_round: Callable[[float], None] | None = None,
) -> Paired:
    """Measure both in turn until `seconds` are spent.

    Args:
        baseline, candidate: calls to time; each is run once or twice before to warm up.
        dtype: whose peak rate is measured between the pairs.
        device: "cpu" or "cuda" (waits for the GPU around each call).
        seconds: budget, warming up included; at least `min_rounds` and at most `max_rounds` pairs are run.
        on_round: told the fraction done after each pair.
    """
    start = time.perf_counter()
    repeat = max(_repeat(call, device) for call in (baseline, candidate))

    def sample(call: Callable[[], Any]) -> float:
        return peak.seconds_of(lambda: [call() for _ in range(repeat)], device) / repeat

    a: list[float] = []
    b: list[float] = []
    peaks: list[float] = []
    while len(a) < min_rounds or (len(a) < max_rounds and time.perf_counter() - start < seconds):
        # Who goes first alternates, so that neither always follows the other's cache contents.
        if len(a) % 2 == 0:
            a.append(sample(baseline))
            b.append(sample(candidate))
        else:
            b.append(sample(candidate))
            a.append(sample(baseline))
        if (rate := peak.flops(dtype, device)) is not None:
            peaks.append(rate)
        if on_round is not None:
            on_round(min(1.0, max((time.perf_counter() - start) / seconds, len(a) / max_rounds)))
    return Paired(a, b, median(peaks) if peaks else None)


def _repeat(call: Callable[[], Any], device: str) -> int:
    """Warm `call` up; returns how many calls in a row are long enough to time."""
    if peak.seconds_of(call, device) > _LONG_SECONDS:
        return 1
    return math.ceil(_SAMPLE_SECONDS / max(peak.seconds_of(call, device), 1e-6))
