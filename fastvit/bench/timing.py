"""Paired, interleaved measurement: A B A B ..., medians, and the ratio pair by pair.

A machine's speed drifts by tens of percent within a minute; the two halves of a pair see the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
    """`interleaved` of two."""
    times, rate = interleaved(
        {"baseline": baseline, "candidate": candidate},
        dtype=dtype,
        device=device,
        seconds=seconds,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        on_round=on_round,
    )
    return Paired(times["baseline"], times["candidate"], rate)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 10.0,
    min_rounds: int = 2,
    max_rounds: int = 50,
    on_round: Callable[[float], None] | None = None,
) -> tuple[dict[str, list[float]], float | None]:
    """Seconds per call, measured in turn until `seconds` are spent, and the peak rate in FLOP/s meanwhile.

    Args:
        calls: what to time, by name; each is run once or twice before to warm up.
        dtype: whose peak rate is measured between the rounds.
        device: "cpu" or "cuda" (waits for the GPU around each call).
        seconds: budget, warming up included; at least `min_rounds` and at most `max_rounds` rounds are run.
        on_round: told the fraction done after each round.
    """
    start = time.perf_counter()
    repeats = {name: _repeat(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: list[float] = []
    names, done = list(calls), 0
    while done < min_rounds or (done < max_rounds and time.perf_counter() - start < seconds):
        # Who goes first changes, so that nobody always follows the same other's cache contents.
        first = done % len(names)
        for name in names[first:] + names[:first]:
            sample = partial(_run, calls[name], repeats[name])
            times[name].append(peak.seconds_of(sample, device) / repeats[name])
        done += 1
        if (rate := peak.flops(dtype, device)) is not None:
            peaks.append(rate)
        if on_round is not None:
            on_round(min(1.0, max((time.perf_counter() - start) / seconds, done / max_rounds)))
    return times, median(peaks) if peaks else None


def _run(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def _repeat(call: Callable[[], Any], device: str) -> int:
    """Warm `call` up; returns how many calls in a row are long enough to time."""
    if peak.seconds_of(call, device) > _LONG_SECONDS:
        return 1
    return math.ceil(_SAMPLE_SECONDS / max(peak.seconds_of(call, device), 1e-6))
