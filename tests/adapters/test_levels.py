"""Optimized models at the levels that a lesser CPU would use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit import _C

PROGRAM = """
import copy, sys
import torch, fastvit
from fastvit import _C
from tests.adapters import zoo
from tests.tolerances import assert_close

assert _C.isa() == fastvit.env()["cpu"]["isa"] == sys.argv[1]
for dtype in (torch.float32, torch.bfloat16):
    model = zoo.make("timm vit layer scale").to(dtype)
    x = zoo.image(model).to(dtype)
    original = copy.deepcopy(model)
    assert fastvit.report(fastvit.optimize(model)).replaced
    with torch.inference_mode():
        assert_close(model(x), copy.deepcopy(original).double()(x.double()), eager=original(x))
"""


@pytest.mark.parametrize("level", _C.supported_isas()[:-1])
def test_a_model_at_a_lower_level(level: str) -> None:
    environment = {**os.environ, "FASTVIT_CPU_ISA": level}
    command = [sys.executable, "-c", PROGRAM, level]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
