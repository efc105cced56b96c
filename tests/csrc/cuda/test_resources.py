"""The CUDA kernels compiled for each architecture: no spills, enough warps resident, 16-byte memory operations."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
SOURCES = sorted(path.name for path in CSRC.glob("cuda/*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
COMMAND = [str(NVCC), "-std=c++17", "-O3", f"-I{CSRC}", "-Werror=all-warnings"]

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("source", SOURCES)
def test_registers(source: str, arch: str) -> None:
    target = ["-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", "-o", "/dev/null"]
    done = subprocess.run([*COMMAND, *target, str(CSRC / "cuda" / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) >= 2
    assert set(spills) == {("0", "0")}, done.stderr
    # 896 threads on a multiprocessor, enough to cover the latency of memory.
    assert max(registers) <= 72, done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_memory_is_reached_sixteen_bytes_at_a_time(source: str) -> None:
    command = [*COMMAND, "-arch=compute_90", "-ptx", "-o", "-", str(CSRC / "cuda" / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ld\.global\.v4\.[bfu]32", done.stdout)
    assert re.search(r"st\.global\.v4\.[bfu]32", done.stdout)
