"""Dispatch, threads and processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from fastvit import _C
from tests import nasty
from tests.csrc import call
from tests.tolerances import FLOAT32, relative_l2


def small_problem(m: int = 50, n: int = 100, k: int = 72) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w = nasty.tokens(m, k).float(), nasty.weight(n, k).float()
    return x, w, F.linear(x.double(), w.double())


def test_an_unknown_level_is_refused() -> None:
    before = _C.isa()
    with pytest.raises(ValueError, match=f"isa='sse9'.*accepted: {_C.supported_isas()[0]}"):
        _C.set_isa("sse9")
    assert _C.isa() == before


def test_the_openmp_runtime_is_torchs() -> None:
    # In a process of its own: other libraries (scikit-learn) bring runtimes of theirs.
    code = """
import os, torch
from fastvit import _C
paths = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = {os.path.realpath(p) for p in paths if any(name in p for name in ("gomp", "libomp", "iomp"))}
assert runtimes == {os.path.realpath(_C.omp_info()["path"])}, runtimes
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_peak_is_a_rate(isa: str, kind: str) -> None:
    assert 0.1 < _C.peak(kind, 1, 0.005) < 1e5


def test_peak_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind='f64'"):
        _C.peak("f64", 1, 0.01)


def test_copy_bandwidth_is_a_rate() -> None:
    assert 0.01 < _C.copy_bandwidth(1, 0.01) < 1e5


def test_results_do_not_depend_on_the_thread_count(isa: str, dtype: torch.dtype) -> None:
    x, w, _ = small_problem(197)
    results = [call.norm_linear(x, w, norm="layer", compute=dtype, threads=t) for t in (1, 2, 3, 8)]
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_several_python_threads_at_once(isa: str) -> None:
    errors = []

    def work(seed: int) -> None:
        x, w = nasty.tokens(20 + seed, 64, seed=seed).float(), nasty.weight(70, 64, seed=seed).float()
        truth = F.linear(x.double(), w.double())
        for i in range(20):
            errors.append(relative_l2(call.norm_linear(x, w, threads=1 + i % 2), truth))
            packed = x.view(1, -1, 1, 64)
            errors.append(0.0 if torch.isfinite(call.attention(packed, packed, packed)).all() else 1.0)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 160
    assert max(errors) <= FLOAT32


def child(connection: multiprocessing.connection.Connection, x: torch.Tensor, w: torch.Tensor) -> None:
    # Two threads: the parent's pool does not exist here, and waiting for it would never end.  torch itself would wait,
    # so the child does nothing but call the extension.
    for threads in (1, 2):
        connection.send(call.norm_linear(x, w, threads=threads).tolist())


def test_after_fork() -> None:
    x, w, truth = small_problem()
    assert relative_l2(call.norm_linear(x, w, threads=2), truth) <= FLOAT32
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, x, w))
    process.start()
    try:
        for _ in range(2):
            assert ours.poll(60), "the child hangs"
            assert relative_l2(torch.tensor(ours.recv()), truth) <= FLOAT32
    finally:
        process.kill()
        process.join()


def test_views_of_what_no_kernel_takes():
    with pytest.raises(ValueError, match=r"dtype torch.float64 is not accepted; accepted: float32, bfloat16"):
        _C.view(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most 6 dimensions"):
        _C.view(torch.zeros(1, 1, 1, 1, 1, 1, 1))
    with pytest.raises(AttributeError):
        _C.view("x")
