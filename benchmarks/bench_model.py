"""Whole timm models, as they are and after fastvit.optimize; random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.case import FLOATS, Case, nbytes, run_in_pytest, tensor
from benchmarks.peers import PEERS, serves
from fastvit import optimize, report
from fastvit.bench.models import build, needed_flops

# The last one takes 1370 tokens, of images of 518 pixels.
NAMES = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch14_dinov2")
DTYPES = (*FLOATS, torch.int8)
# Teraflops a call: minutes with every peer.
LONG = {("vit_base_patch14_dinov2", 8)}


def case(
    name: str,
    dtype: torch.dtype,
    batch: int,
    device: str = "cpu",
    make: Callable[[str], tuple[nn.Module, tuple[int, int, int]]] = build,
    peers: Sequence[str] = (),
) -> Case:
    """int8 stands beside eager PyTorch and fastvit in bfloat16."""
    torch.manual_seed(0)
    model, size = make(name)
    quantized = dtype == torch.int8
    float_dtype = torch.bfloat16 if quantized else dtype
    image = tensor(batch, *size, dtype=float_dtype, device=device, seed=0)
    flops = batch * needed_flops(model, image[:1].float().cpu())
    eager = model.to(device, float_dtype)
    fused = optimize(copy.deepcopy(eager), **({"quantize": "int8"} if quantized else {}))
    if not report(fused).replaced:
        raise ValueError(f"name: {name!r} has no block that fastvit replaces: there is nothing to measure")
    others: dict[str, Callable[..., Tensor]] = {
        peer: PEERS[peer](eager, image) for peer in peers if serves(peer, dtype)
    }
    if quantized:
        others["fastvit bf16"] = optimize(copy.deepcopy(eager))
    return Case(
        "model",
        f"{name}, batch {batch}",
        eager,
        fused,
        (image,),
        flops=flops,
        bytes=nbytes(image, *eager.parameters()),
        # Two samples tell whether they are mixed up.
        truth=lambda: copy.deepcopy(eager).double()(image[:2].double()),
        peers=others,
        precision=dtype,
    )


@pytest.mark.parametrize("name", NAMES)
def test_model(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
