"""Run the Triton kernels on CUDA where there is a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.kernels import interpreter

GPU = torch.cuda.is_available()
if not GPU:
    interpreter.use()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


def run_as(arch: str, module: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module of kernels take the tiles of `arch`: the interpreter runs those of any, a GPU its own."""
    if device.type == "cpu":
        monkeypatch.setattr(module, "arch", lambda device: arch)
    elif module.arch(device) != arch:
        pytest.skip(f"tiles of {arch}")
