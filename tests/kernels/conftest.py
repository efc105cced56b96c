"""Run the Triton kernels on CUDA where there is a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import interpreter

GPU = torch.cuda.is_available()
if not GPU:
    interpreter.use()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")
