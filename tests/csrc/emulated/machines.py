"""The machines that tests/csrc emulates: which level runs on which CPU, and which tests it runs.

A level of arm64 runs under qemu. A level of x86-64 whose instructions qemu lacks runs here: a header spells them in
those of another level, which this machine must have.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from tests.csrc.emulated.driver import Driver, build, require, setup_py

HERE = Path(__file__).parent
# What emulation is for: other instructions.
INT8 = ("test_int8_products.py",)
PRODUCTS = (
    "test_few_rows.py",
    "test_halves.py",
    "test_linear_residual.py",
    "test_norm_linear.py",
    "test_patch_embed.py",
    "test_pool.py",
    *INT8,
)
ALL = ("test_attention.py", "test_rotate.py", *PRODUCTS)


@dataclass(frozen=True)
class Machine:
    """qemu's model of a CPU, and the levels that it must offer; tests run at the last of them."""

    cpu: str
    levels: tuple[str, ...]
    files: tuple[str, ...] = ALL

    @property
    def name(self) -> str:
        return f"{self.levels[-1]} (qemu)"

    @property
    def level(self) -> str:
        """The one that tests run at, by the name that the driver gives it."""
        return self.levels[-1]

    def command(self) -> list[str | Path]:
        return ["qemu-aarch64", "-cpu", self.cpu, arm64_driver()]


@dataclass(frozen=True)
class StandIn:
    """A level whose instructions a header spells in those of `level`, under whose name the driver offers it."""

    of: str
    level: str
    flags: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.of} (stand-in)"

    def command(self) -> list[str | Path]:
        return [stand_in_driver()]


# A Cortex-A72 has nothing beyond the baseline, and dies of any instruction that is.
ARM64 = (
    Machine("cortex-a72", ("neon",)),
    Machine("neoverse-n1", ("neon", "neon_dotprod"), INT8),
    Machine("max", ("neon", "neon_dotprod", "neon_bf16")),
)
STAND_INS = (
    StandIn("avx_vnni", "avx2", ("-include", str(HERE / "vnni.h")), INT8),
    StandIn("amx", "avx512_bf16", (f'-DFASTVIT_AMX_STAND_IN="{HERE / "amx.h"}"',), PRODUCTS),
)
CROSS_COMPILER = "aarch64-linux-gnu-g++"


@functools.cache
def arm64_driver() -> Path:
    """The program for arm64. Raises Missing where the compiler or the emulator is."""
    require(CROSS_COMPILER, "g++-aarch64-linux-gnu")
    require("qemu-aarch64", "qemu-user")
    return build("emulated-arm64", CROSS_COMPILER)


@functools.cache
def stand_in_driver() -> Path:
    """The program with all stand-ins. Its speed is of no interest, but the time to compile it is."""
    require("g++", "g++")
    known = setup_py().ISA_FLAGS["x86_64"]
    levels = {each.level: [*known[each.level], *each.flags] for each in STAND_INS}
    return build("stand-ins", "g++", levels=levels, flags=["-O1"])


def start(machine: Machine | StandIn, environment: dict[str, str] | None = None) -> Driver:
    return Driver(machine.command(), environment)


@functools.cache
def running(machine: Machine | StandIn) -> Driver:
    """One process for all tests of a machine."""
    return start(machine)
