"""One thing to measure, and how: eager PyTorch and fastvit in interleaved pairs, beside the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastvit.bench import DTYPES, passes, peak
from fastvit.bench.timing import interleaved

_SHORT = {**{getattr(torch, long): short for short, long in DTYPES.items()}, torch.int8: "int8"}
_LONG = {short: long for long, short in _SHORT.items()}
FLOATS = (torch.float32, torch.bfloat16)
BATCHES = (1, 8)

# A case of so many operations takes seconds a call: fewer rounds are worth the wait.
_LONG_FLOPS = 5e11
_ROUNDS, _LONG_ROUNDS = 5, 3
# int8 is judged by a trained model's accuracy, in the tests; here only a broken kernel shall be noticed.
_INT8_ERROR = 0.1


@dataclass(frozen=True)
class Width:
    """The shape of a ViT."""

    name: str
    dim: int
    num_heads: int
    tokens: int
    patch_size: int = 16
    image_size: int = 224
    num_classes: int = 1000


VIT_B = Width("ViT-B/16", dim=768, num_heads=12, tokens=197)


@dataclass(frozen=True)
class Case:
    """`eager(*tensors)` and `fused(*tensors)` compute the same; so does `eager` on float64 copies, the truth.

    truth: gives what `eager` would in float64, at least its first samples.
    precision: what the products multiply, where the tensors' dtype does not tell.
    """

    operator: str
    name: str
    eager: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    flops: int
    # What must cross the memory bus at least once: inputs, weights, output.
    bytes: int
    truth: Callable[[], Tensor] | None = field(default=None, repr=False)
    # Other implementations of the same, by name.
    peers: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    precision: torch.dtype | None = None

    @property
    def dtype(self) -> str:
        return short(self.precision or self.tensors[0].dtype)

    @property
    def device(self) -> str:
        return self.tensors[0].device.type

    @property
    def min_rounds(self) -> int:
        return _LONG_ROUNDS if self.flops > _LONG_FLOPS else _ROUNDS

    def expected(self) -> Tensor:
        """The result in float64, at least its first samples."""
        return self.truth() if self.truth else self.eager(*(t.double() for t in self.tensors))

    def estimate(self, seconds: float, rate: float | None) -> float:
        """About how long `measure` takes: `rate` in FLOP/s is what the fastest side reaches at most."""
        # Beside the rounds: errors, warming up, and a truth in float64; the average side reaches half the rate.
        calls = (self.min_rounds + 2) * (2 + len(self.peers)) + 4
        return max(seconds, calls * self.flops / (0.5 * rate)) if rate else seconds


@dataclass(frozen=True)
class Row:
    """A measured case.

    fraction_of_limit: the least time that the arithmetic (at the measured peak) or the traffic (at the measured copy
    bandwidth) needs, whichever is longer, by fastvit's time.  Traffic that a cache holds can beat the bus.
    """

    operator: str
    name: str
    dtype: str
    pairs: int
    eager_milliseconds: float
    fastvit_milliseconds: float
    speedup: float
    limit: str
    fraction_of_limit: float | None
    eager_error: float
    fastvit_error: float
    flops: int
    bytes: int
    peak: float | None  # FLOP/s, measured between the rounds
    bandwidth: float | None  # bytes per second of copying
    peer_milliseconds: dict[str, float] = field(default_factory=dict)
    # Median over the rounds of a peer's time by fastvit's, and how the peer was set up.
    peer_speedups: dict[str, float] = field(default_factory=dict)
    peer_settings: dict[str, str] = field(default_factory=dict)
    # Memory that a call takes beyond its tensors, and what one head's matrix of scores would take.
    extra_bytes: int | None = None
    scores_bytes: int | None = None

    @property
    def passed(self) -> bool:
        if self.dtype == "int8":
            return self.fastvit_error <= _INT8_ERROR
        return passes(self.dtype, self.fastvit_error, self.eager_error)

    @property
    def limit_milliseconds(self) -> float | None:
        return None if self.fraction_of_limit is None else self.fraction_of_limit * self.fastvit_milliseconds

    @property
    def batch(self) -> int:
        return int(self.name.rpartition("batch ")[2])


def short(dtype: torch.dtype) -> str:
    """ "f32", "bf16", "f16" or "int8"."""
    return _SHORT[dtype]


def tensor(*shape: int, dtype: torch.dtype, device: str, seed: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """Normal values that do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale + mean).to(device, dtype)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.inference_mode()
def measure(case: Case, seconds: float = 1.0) -> Row:
    truth = case.expected()
    scale = truth.norm()
    errors = [
        ((call(*case.tensors)[: len(truth)].double() - truth).norm() / scale).item()
        for call in (case.eager, case.fused)
    ]
    calls = {"eager": case.eager, "fastvit": case.fused, **case.peers}
    times, rate = interleaved(
        {name: partial(call, *case.tensors) for name, call in calls.items()},
        dtype=_LONG[case.dtype],
        device=case.device,
        seconds=seconds,
        min_rounds=case.min_rounds,
    )
    milliseconds = {name: 1e3 * median(values) for name, values in times.items()}
    limits: dict[str, float] = {}
    if rate:
        limits["arithmetic"] = case.flops / rate
    # The best of a few: a neighbour's burst must not lower the limit.
    bandwidth = max(peak.bandwidth(case.device) or 0.0 for _ in range(3)) or None
    if bandwidth is not None:
        limits["memory"] = case.bytes / bandwidth
    limit = max(limits, key=lambda name: limits[name], default="unknown")
    return Row(
        operator=case.operator,
        name=case.name,
        dtype=case.dtype,
        pairs=len(times["eager"]),
        eager_milliseconds=milliseconds["eager"],
        fastvit_milliseconds=milliseconds["fastvit"],
        speedup=_ratio(times["eager"], times["fastvit"]),
        limit=limit,
        fraction_of_limit=1e3 * limits[limit] / milliseconds["fastvit"] if limits else None,
        eager_error=errors[0],
        fastvit_error=errors[1],
        flops=case.flops,
        bytes=case.bytes,
        peak=rate,
        bandwidth=bandwidth,
        peer_milliseconds={name: milliseconds[name] for name in case.peers},
        peer_speedups={name: _ratio(times[name], times["fastvit"]) for name in case.peers},
        peer_settings={name: call.settings for name, call in case.peers.items() if hasattr(call, "settings")},
    )


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def run_in_pytest(benchmark: Any, case: Case) -> None:
    """pytest-benchmark shows fastvit's times; the paired figures are in its extra_info."""
    row = measure(case)
    benchmark.extra_info.update(
        speedup=row.speedup,
        limit=row.limit,
        fraction_of_limit=row.fraction_of_limit,
        eager_error=row.eager_error,
        fastvit_error=row.fastvit_error,
    )
    with torch.inference_mode():
        benchmark.pedantic(case.fused, args=case.tensors, rounds=row.pairs)
    assert row.passed, f"error {row.fastvit_error:.2e}, eager's {row.eager_error:.2e}"
