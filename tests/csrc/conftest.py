"""Every kernel test runs at every instruction set of this machine, and a few at those of emulated ones."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvit import _C
from tests.csrc import call
from tests.csrc.emulated import machines
from tests.csrc.emulated.driver import Missing

EMULATED = {machine.name: machine for machine in (*machines.ARM64, *machines.STAND_INS)}
# Large sizes and thread counts run the same C++ at every level.
LARGEST, LARGEST_PRODUCT = 300, 1_000_000  # of a test's integer parameters
NOT_EMULATED = ("test_thread_counts", "test_rows_beyond_one_block")


def is_emulated_for_nothing(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    machine = EMULATED.get(item.callspec.params.get("isa"))
    if machine is None:
        return False
    # A stand-in is of other products, which float32 has no part in.
    if isinstance(machine, machines.StandIn) and item.callspec.params.get("dtype") == torch.float32:
        return True
    sizes = [value for value in item.callspec.params.values() if type(value) is int]
    small = max(sizes, default=0) <= LARGEST and math.prod(sizes) <= LARGEST_PRODUCT
    return item.path.name not in machine.files or item.originalname in NOT_EMULATED or not small


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_emulated_for_nothing(item)]
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


@contextlib.contextmanager
def skipped_where_missing() -> Iterator[None]:
    try:
        yield
    except Missing as missing:
        if os.environ.get("FASTVIT_EMULATION") == "required":
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def arm64_driver() -> Path:
    """The program that runs the kernels of arm64 under qemu."""
    with skipped_where_missing():
        return machines.arm64_driver()


@pytest.fixture(params=[*_C.supported_isas(), *EMULATED])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The level in use."""
    if machine := EMULATED.get(request.param):
        if isinstance(machine, machines.StandIn) and machine.level not in _C.supported_isas():
            pytest.skip(f"the stand-in for {machine.of} needs {machine.level}")
        with skipped_where_missing():
            call.kernels = machines.running(machine)
        call.kernels.set_isa(machine.level)
        yield machine.level
        call.kernels = _C
        return
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
