"""Dispatch, threads and processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvit import _C
from tests import nasty
from tests.csrc import call
from tests.tolerances import FLOAT32, relative_l2

PATIENCE = 60.0  # seconds, after which what should have come will not


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
    packed = nasty.tokens(1, 197, 3, 2, 40).to(dtype).unbind(2)
    product = [call.norm_linear(x, w, norm="layer", compute=dtype, threads=t) for t in (1, 2, 3, 8)]
    attention = [call.attention(*packed, compute=dtype, threads=t) for t in (1, 2, 3, 8)]
    assert all(torch.equal(results[0], r) for results in (product, attention) for r in results[1:])


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


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@contextlib.contextmanager
def two_threads_leased(seconds: float = 2.0) -> Iterator[None]:
    """Another Python thread runs a region of two threads meanwhile."""
    holder = threading.Thread(target=_C.peak, args=("f32", 2, seconds))
    holder.start()
    try:
        wait_until(lambda: _C.leased_threads()["now"] == 2, "the region never started")
        yield
        assert _C.leased_threads()["now"] == 2, "the region ended before what should overlap it"
    finally:
        holder.join()


def most_threads(run: Callable[[], Any]) -> int:
    """The most threads of the process in kernels at any one time of `run`."""
    _C.leased_threads()
    run()
    return _C.leased_threads()["most"]


def test_a_call_alone_gets_what_it_asks_for() -> None:
    x, w, _ = small_problem()
    for threads in (3, 1, 2):
        assert most_threads(lambda n=threads: call.norm_linear(x, w, threads=n)) == threads
    assert most_threads(lambda: call.norm_linear(x, w, threads=0)) == 1
    assert _C.leased_threads() == {"now": 0, "most": 0}


def test_calls_at_once_share_the_threads() -> None:
    x, w, truth = small_problem()
    out = []
    with two_threads_leased():
        # Beside two threads there is room for none of one or two, and for two of four; one's own is granted always.
        for wanted, granted in ((1, 1), (2, 1), (3, 1), (4, 2)):
            assert most_threads(lambda n=wanted: out.append(call.norm_linear(x, w, threads=n))) == 2 + granted
    assert _C.leased_threads()["now"] == 0
    assert max(relative_l2(y, truth) for y in out) <= FLOAT32


def test_a_failing_call_gives_its_threads_back() -> None:
    x, w, _ = small_problem(k=4096)
    with pytest.raises(MemoryError):
        call.norm_linear(x, w, threads=(1 << 29) - 1)  # their scratch is larger than any address space
    assert _C.leased_threads()["now"] == 0


def child(connection: multiprocessing.connection.Connection, x: torch.Tensor, w: torch.Tensor) -> None:
    connection.send(_C.leased_threads()["now"])
    for threads in (1, 2):
        connection.send(most_threads(lambda n=threads: connection.send(call.norm_linear(x, w, threads=n).tolist())))
    connection.send(torch.ones(1 << 18).exp().sum().item())


def assert_child_computes(x: torch.Tensor, w: torch.Tensor, truth: torch.Tensor) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, x, w))
    process.start()

    def receive() -> Any:
        assert ours.poll(PATIENCE), "the child hangs"
        return ours.recv()

    try:
        assert receive() == 0  # whatever is in flight in the parent
        for threads in (1, 2):
            assert relative_l2(torch.tensor(receive()), truth) <= FLOAT32
            assert receive() == threads
        assert receive() > 0  # torch shares the pool, and does not wait for the parent's either
    finally:
        process.kill()
        process.join()


def test_after_fork() -> None:
    x, w, truth = small_problem()
    torch.ones(1 << 18).exp()  # torch starts the pool that the child will lack
    assert_child_computes(x, w, truth)
    assert most_threads(lambda: call.norm_linear(x, w, threads=2)) == 2
    assert_child_computes(x, w, truth)
    assert relative_l2(call.norm_linear(x, w, threads=2), truth) <= FLOAT32  # the parent goes on too


def test_fork_while_another_thread_is_in_a_kernel() -> None:
    with two_threads_leased():
        assert_child_computes(*small_problem())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_python_threads_that_end_leave_nothing() -> None:
    x, w = torch.ones(2048, 1024), torch.ones(16, 1024)  # 8 MiB of scratch

    def tasks() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def in_threads(count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=call.norm_linear, args=(x, w))
            thread.start()
            thread.join()

    in_threads(3)
    before, memory = tasks(), resident()
    in_threads(30)
    wait_until(lambda: tasks() <= before, "the teams of threads that ended are still there")
    assert resident() - memory < 100 << 20


def test_arguments_that_no_kernel_takes():
    with pytest.raises(ValueError, match=r"dtype torch.float64 is not accepted; accepted: float32, bfloat16"):
        _C.fingerprint(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most 6 dimensions"):
        _C.fingerprint(torch.zeros(1, 1, 1, 1, 1, 1, 1))
    with pytest.raises(AttributeError):
        _C.fingerprint("x")
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.fingerprint(None)


class _Hidden(torch.Tensor):
    """Read by Python's attributes, not by DLPack."""


def test_kinds_tell_arguments_apart():
    x = torch.zeros(2, 3)
    alike = [
        (x, None, "layer", 1e-6, True, [0.5, 1.0], torch.float32),
        (torch.ones(3, 2).t(), None, "layer", 1e-6, True, [0.5, 1.0], torch.float32),
        (torch.nn.Parameter(x), None, "layer", 1e-6, True, [0.5, 1.0], torch.float32),
    ]
    assert len({_C.kinds_of(each) for each in alike}) == 1
    others = [
        (x.t(),), (x.bfloat16(),), (x, x), (x, None), (x, "rms"), (x, "layer"), (x, 1), (x, 1.0), (x, True), (x, False),
        (x, [1.0, 2.0]), (x, (1.0, 2.0)), (x, [1.0], 2.0), (x, torch.float32), (x, torch.bfloat16), (x, ""), (x[0],),
    ]  # fmt: skip
    assert len({_C.kinds_of(each) for each in others}) == len(others)
    untold = [torch.zeros(0, 3), x.as_subclass(_Hidden), x.to("meta"), x.to_sparse(), x.double(), object(), 1 << 70]
    for each in untold:
        assert _C.kinds_of((x, each)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8])
@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t,
        lambda t: t[1:, ::2],
        lambda t: t.T,
        lambda t: t[:1].expand(3, -1),
        lambda t: t[:, 2:3],
        lambda t: t.as_strided((1, 4, 1), (99, 5, 77)),
        lambda t: t[:0],
        lambda t: t[1, 1],
    ],
)
def test_tensors_are_read_alike_both_ways(dtype: torch.dtype, arrange: Callable[[torch.Tensor], torch.Tensor]) -> None:
    t = arrange(torch.arange(24).reshape(4, 6).to(dtype))
    read = _C.fingerprint(t)
    assert read == _C.fingerprint(t.as_subclass(_Hidden))
    if t.is_floating_point():
        assert read == _C.fingerprint(torch.nn.Parameter(t))
    if t.numel():
        assert read != _C.fingerprint(t.clone())
