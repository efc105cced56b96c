"""Optimized models at the levels that a lesser CPU would use."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import fastvit
from fastvit import _C
from tests.adapters import zoo
from tests.tolerances import assert_close


@pytest.fixture(params=_C.supported_isas()[:-1])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """One that FASTVIT_CPU_ISA would choose at the start."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_at_a_lower_level(level: str, dtype: torch.dtype) -> None:
    assert fastvit.env()["cpu"]["isa"] == level
    model = zoo.make("timm vit layer scale").to(dtype)
    x = zoo.image(model).to(dtype)
    original = copy.deepcopy(model)
    assert fastvit.report(fastvit.optimize(model)).replaced
    with torch.inference_mode():
        assert_close(model(x), copy.deepcopy(original).double()(x.double()), eager=original(x))
