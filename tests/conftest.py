"""Shared set-up of the tests."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest

# Before torch starts its pool.  The tensors of tests are so small that threads would mostly spin for each other, above
# all beside another process of tests.  Two go every way there is, and round alike on any machine, whatever it has set:
# eager's error in low precision, by which ours is judged, depends on their number.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# torch 2.13's product of sliced bfloat16 rows by AMX (oneDNN) may read what lies behind a row, where tests put NaN.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch

if not torch.cuda.is_available():
    # Before anything imports triton, which torch.compile does: tests/kernels runs in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastvit._compat import import_torchvision

with contextlib.suppress(ImportError):
    # timm imports torchvision, whose wheels lack operators for a CPU-only torch.
    import_torchvision()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too (CI=true does)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or os.environ.get("CI") == "true":
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    # Dynamo counts recompilations by code object, so that the tests of one process would share the limit of eight.
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
