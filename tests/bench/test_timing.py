"""The measurement itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastvit.bench import passes, peak, timing
from fastvit.bench.timing import Paired, paired


def test_the_ratio_is_taken_pair_by_pair():
    # The machine slows down fourfold in the second pair, and the third one is disturbed.
    result = Paired(baseline=[2.0, 8.0, 2.0], candidate=[1.0, 4.0, 9.0], peak=None)
    assert result.speedup == 2.0
    assert result.rounds == 3
    assert result.baseline_seconds == 2.0
    assert result.candidate_seconds == 4.0


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in calls: each costs what it is worth."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(peak, "flops", lambda dtype, device: 3e9)

    def call(name, seconds, log):
        def run():
            log.append(name)
            now[0] += seconds

        return run

    return call


def test_calls_alternate_and_who_is_first_too(clock):
    log: list[str] = []
    result = paired(clock("a", 2.0, log), clock("b", 1.0, log), dtype=torch.float32, seconds=9.0)
    assert log[:2] == ["a", "b"]  # warming up
    assert log[2:] == ["a", "b", "b", "a"]
    assert result.baseline == pytest.approx([2.0, 2.0])
    assert result.speedup == pytest.approx(2.0)
    assert result.peak == 3e9


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (33.0, 10), (1e6, 50)])
def test_rounds_follow_the_budget(clock, seconds, rounds):
    done: list[float] = []
    result = paired(
        clock("a", 2.0, []), clock("b", 1.0, []), dtype=torch.float32, seconds=max(seconds, 1e-9), on_round=done.append
    )
    assert result.rounds == rounds
    assert all(x <= y for x, y in itertools.pairwise(done))
    assert done[-1] == 1.0


def test_short_calls_are_repeated_and_counted_out(clock):
    log: list[str] = []
    result = paired(clock("a", 1e-4, log), clock("b", 5e-5, log), dtype=torch.float32, max_rounds=3, seconds=1.0)
    assert len(log) / 6 > timing._SAMPLE_SECONDS / 1e-4
    assert result.baseline_seconds == pytest.approx(1e-4)
    assert result.speedup == pytest.approx(2.0)


def test_peak_is_a_rate_or_unknown():
    assert peak.flops(torch.float32) > 1e8
    assert peak.flops(torch.float16) is None
    assert peak.bandwidth() > 1e7


def test_without_the_extension_there_is_no_yardstick(monkeypatch):
    monkeypatch.setattr(peak, "extension", lambda: None)
    assert peak.flops(torch.float32) is None
    assert peak.bandwidth() is None


@pytest.mark.parametrize(
    ("dtype", "error", "eager_error", "verdict"),
    [
        ("f32", 9e-6, 1e-7, True),
        ("f32", 1.1e-5, 1e-7, False),
        ("f32", 1.1e-4, 1e-4, True),
        ("bf16", 1.1e-2, 1e-2, True),
        ("bf16", 1.3e-2, 1e-2, False),
        ("bf16", 9e-6, 1e-7, False),
        ("bf16", float("nan"), 1e-2, False),
    ],
)
def test_passes(dtype, error, eager_error, verdict):
    assert passes(dtype, error, eager_error) is verdict


def test_tolerances_are_the_tests_own():
    from fastvit import bench
    from tests import tolerances

    assert (bench.FLOAT32_TOLERANCE, bench.LOW_PRECISION_RATIO) == (tolerances.FLOAT32, tolerances.LOW_PRECISION_RATIO)
