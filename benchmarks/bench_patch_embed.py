"""patch_embed against convolution, flatten, class token and position embedding."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import patch_embed

# A normalised image; or a decoder's bytes, in the order that decoders give them.
NAMES = ("image", "uint8 HWC")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, image: Tensor) -> Tensor:
    patches = F.conv2d(image, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([prefix.expand(image.shape[0], -1, -1), patches + pos_embed], dim=1)


def eager_bytes(weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, image: Tensor) -> Tensor:
    """torchvision's to-tensor and normalise, then as above."""
    mean, std = (torch.tensor(v, dtype=torch.float64, device=image.device).view(3, 1, 1) for v in (MEAN, STD))
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    pixels = image.contiguous().to(wide).div(255).sub_(mean.to(wide)).div_(std.to(wide))
    return eager(weight, bias, pos_embed, prefix, pixels.to(weight.dtype))


def fused(weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, image: Tensor) -> Tensor:
    return patch_embed(image, weight, bias, pos_embed=pos_embed, prefix=prefix)


def fused_bytes(weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, image: Tensor) -> Tensor:
    return patch_embed(image, weight, bias, pos_embed=pos_embed, prefix=prefix, mean=MEAN, std=STD)


def case(name: str, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    size, patch = width.image_size, width.patch_size
    inner, patches = 3 * patch * patch, (size // patch) ** 2
    make = functools.partial(tensor, dtype=dtype, device=device)
    if name == "image":
        image = make(batch, 3, size, size, seed=0)
    else:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
        image = pixels.to(device).permute(0, 3, 1, 2)
    tensors = (
        make(width.dim, 3, patch, patch, seed=1, scale=inner**-0.5),
        make(width.dim, seed=2, scale=0.3),
        make(1, patches, width.dim, seed=3, scale=0.3),
        make(1, 1, width.dim, seed=4, scale=0.3),
        image,
    )
    return Case(
        "patch_embed",
        f"{width.name} {name}, batch {batch}",
        eager if name == "image" else eager_bytes,
        fused if name == "image" else fused_bytes,
        tensors,
        flops=2 * batch * patches * inner * width.dim,
        bytes=nbytes(*tensors) + batch * (patches + 1) * width.dim * dtype.itemsize,
    )


@pytest.mark.parametrize("name", NAMES)
def test_patch_embed(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
