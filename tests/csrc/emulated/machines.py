"""The machines that tests/csrc emulates: which level runs on which CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from tests.csrc.emulated.driver import Driver, build, require


@dataclass(frozen=True)
class Machine:
    """qemu's model of a CPU, and the levels that it must offer; tests run at the last of them."""

    cpu: str
    levels: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.levels[-1]} (qemu)"


# A Cortex-A72 has nothing beyond the baseline, and dies of any instruction that is.
ARM64 = (Machine("cortex-a72", ("neon",)), Machine("max", ("neon", "neon_bf16")))
CROSS_COMPILER = "aarch64-linux-gnu-g++"


@functools.cache
def arm64_driver() -> Path:
    """The program for arm64. Raises Missing where the compiler or the emulator is."""
    require(CROSS_COMPILER, "g++-aarch64-linux-gnu")
    require("qemu-aarch64", "qemu-user")
    return build("emulated-arm64", CROSS_COMPILER)


def start(machine: Machine, environment: dict[str, str] | None = None) -> Driver:
    return Driver(["qemu-aarch64", "-cpu", machine.cpu, arm64_driver()], environment)


@functools.cache
def running(machine: Machine) -> Driver:
    """One process for all tests of a machine."""
    return start(machine)
