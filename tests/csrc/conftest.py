"""Every kernel test runs at every instruction set of this machine, and a few at those of emulated ones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastvit import _C
from tests.csrc import call
from tests.csrc.emulated import machines
from tests.csrc.emulated.driver import Missing

EMULATED = {machine.name: machine for machine in machines.ARM64}


@pytest.fixture(params=[*_C.supported_isas(), *EMULATED])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The level in use. Emulated ones are slow."""
    if request.param in EMULATED:
        machine = EMULATED[request.param]
        try:
            driver = machines.running(machine)
        except Missing as missing:
            if os.environ.get("FASTVIT_EMULATION") == "required":
                raise
            pytest.skip(str(missing))
        call.kernels = driver
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
