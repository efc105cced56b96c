"""`pytest benchmarks/bench_*.py` measures one operator per file, on the GPU if there is one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import BATCHES


@pytest.fixture(params=("f32", "bf16"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return {"f32": torch.float32, "bf16": torch.bfloat16}[request.param]


@pytest.fixture(params=BATCHES, ids="batch{}".format)
def batch(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
