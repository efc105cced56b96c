"""patch_embed against convolution, flatten, class token and position embedding."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import patch_embed

NAMES = ("image",)


def eager(image: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor) -> Tensor:
    patches = F.conv2d(image, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([prefix.expand(image.shape[0], -1, -1), patches + pos_embed], dim=1)


def fused(image: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor) -> Tensor:
    return patch_embed(image, weight, bias, pos_embed=pos_embed, prefix=prefix)


def case(name: str, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    size, patch = width.image_size, width.patch_size
    inner, patches = 3 * patch * patch, (size // patch) ** 2
    make = functools.partial(tensor, dtype=dtype, device=device)
    tensors = (
        make(batch, 3, size, size, seed=0),
        make(width.dim, 3, patch, patch, seed=1, scale=inner**-0.5),
        make(width.dim, seed=2, scale=0.3),
        make(1, patches, width.dim, seed=3, scale=0.3),
        make(1, 1, width.dim, seed=4, scale=0.3),
    )
    return Case(
        "patch_embed",
        f"{width.name} {name}, batch {batch}",
        eager,
        fused,
        tensors,
        flops=2 * batch * patches * inner * width.dim,
        bytes=nbytes(*tensors) + batch * (patches + 1) * width.dim * dtype.itemsize,
    )


@pytest.mark.parametrize("name", NAMES)
def test_patch_embed(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
