"""Every kernel test runs at every instruction set of this machine, and a few at those of emulated ones."""

from __future__ import annotations

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

EMULATED = {machine.name: machine for machine in machines.ARM64}
# What emulation is for: other instructions. Large sizes and thread counts run the same C++ at every level.
EMULATED_FILES = (
    "test_attention.py",
    "test_halves.py",
    "test_linear_residual.py",
    "test_norm_linear.py",
    "test_patch_embed.py",
    "test_pool.py",
)
LARGEST, LARGEST_PRODUCT = 300, 1_000_000  # of a test's integer parameters
NOT_EMULATED = ("test_thread_counts", "test_rows_beyond_one_block")


def is_emulated_for_nothing(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    if item.callspec.params.get("isa") not in EMULATED:
        return False
    sizes = [value for value in item.callspec.params.values() if type(value) is int]
    small = max(sizes, default=0) <= LARGEST and math.prod(sizes) <= LARGEST_PRODUCT
    return item.path.name not in EMULATED_FILES or item.originalname in NOT_EMULATED or not small


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_emulated_for_nothing(item)]
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def arm64_driver() -> Path:
    """The program that runs the kernels of arm64 under qemu."""
    try:
        return machines.arm64_driver()
    except Missing as missing:
        if os.environ.get("FASTVIT_EMULATION") == "required":
            raise
        pytest.skip(str(missing))


@pytest.fixture(params=[*_C.supported_isas(), *EMULATED])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The level in use."""
    if request.param in EMULATED:
        request.getfixturevalue("arm64_driver")
        machine = EMULATED[request.param]
        call.kernels = machines.running(machine)
        call.kernels.set_isa(machine.levels[-1])
        yield machine.levels[-1]
        call.kernels = _C
        return
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
