"""Whole timm models, as they are and after fastvit.optimize; random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from benchmarks.case import Case, nbytes, run_in_pytest, tensor
from benchmarks.peers import PEERS, serves
from fastvit import optimize
from fastvit.bench.models import build, count_flops

NAMES = ("vit_small_patch16_224", "vit_base_patch16_224")


def case(
    name: str,
    dtype: torch.dtype,
    batch: int,
    device: str = "cpu",
    make: Callable[[str], tuple[nn.Module, tuple[int, int, int]]] = build,
    peers: Sequence[str] = (),
) -> Case:
    torch.manual_seed(0)
    model, size = make(name)
    image = tensor(batch, *size, dtype=dtype, device=device, seed=0)
    flops = batch * count_flops(model, image[:1].float().cpu())
    eager = model.to(device, dtype)
    return Case(
        "model",
        f"{name}, batch {batch}",
        eager,
        optimize(copy.deepcopy(eager)),
        (image,),
        flops=flops,
        bytes=nbytes(image, *eager.parameters()),
        truth=lambda: copy.deepcopy(eager).double()(image.double()),
        peers={peer: PEERS[peer](eager, image) for peer in peers if serves(peer, dtype)},
    )


@pytest.mark.parametrize("name", NAMES)
def test_model(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
