"""patch_embed against convolution, flatten, class token and position embedding.

From bytes, eager PyTorch first makes a tensor of each image and normalises it, as torchvision's ToTensor and Normalize
do.  Two parts are measured by themselves: "to tensor, normalise" is what eager spends before its convolution, "product
alone" is fastvit's product of patches that lie ready in memory: what is left when reading images costs nothing.

int8 stands beside eager PyTorch in float32, as images are after ToTensor, and in bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import FLOATS, VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import norm_linear, patch_embed
from fastvit.reference.vit import patchify

# A normalised image; or bytes, as image decoders (HWC) or torchvision.io (CHW) give them.
NAMES = ("image", "uint8 HWC", "uint8 CHW", "uint8 HWC, patch 14", "uint8 CHW, patch 14")
INT8_NAMES = NAMES[1:]
DTYPES = (*FLOATS, torch.int8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, image: Tensor) -> Tensor:
    patches = F.conv2d(image, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([prefix.expand(image.shape[0], -1, -1), patches + pos_embed], dim=1)


def to_tensor_and_normalize(images: Tensor, layout: str) -> Tensor:
    """Image by image, not in place, then one batch, in float32 (float64 for the truth)."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    mean, std = (torch.tensor(v, dtype=dtype, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    batch = []
    for image in images:
        planes = image.permute(2, 0, 1).contiguous() if layout == "NHWC" else image
        tensor = planes.to(dtype).div(255)
        batch.append(tensor.clone().sub_(mean).div_(std))
    return torch.stack(batch)


def eager_bytes(
    weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, image: Tensor, *, layout: str
) -> Tensor:
    return eager(weight, bias, pos_embed, prefix, to_tensor_and_normalize(image, layout).to(weight.dtype))


def fused(weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor, image: Tensor) -> Tensor:
    return patch_embed(image, weight, bias, pos_embed=pos_embed, prefix=prefix)


def fused_bytes(
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    prefix: Tensor,
    image: Tensor,
    *,
    layout: str,
    quantize: str | None = None,
) -> Tensor:
    tokens = {"pos_embed": pos_embed, "prefix": prefix}
    return patch_embed(image, weight, bias, **tokens, mean=MEAN, std=STD, layout=layout, quantize=quantize)


def case(name: str, dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B) -> Case:
    if name.endswith("patch 14"):
        width = replace(width, name=width.name.split("/")[0] + "/14", patch_size=14)
        name = name.removesuffix(", patch 14")
    patch = width.patch_size
    size = width.image_size // patch * patch
    inner, patches = 3 * patch * patch, (size // patch) ** 2
    precision = dtype
    dtype = torch.float32 if precision == torch.int8 else precision
    make = functools.partial(tensor, dtype=dtype, device=device)
    weights = (
        make(width.dim, 3, patch, patch, seed=1, scale=inner**-0.5),
        make(width.dim, seed=2, scale=0.3),
        make(1, patches, width.dim, seed=3, scale=0.3),
        make(1, 1, width.dim, seed=4, scale=0.3),
    )
    described = functools.partial(
        Case,
        "patch_embed",
        f"{width.name} {name}, batch {batch}",
        flops=2 * batch * patches * inner * width.dim,
    )
    out_bytes = batch * (patches + 1) * width.dim * dtype.itemsize
    if name == "image":
        tensors = (*weights, make(batch, 3, size, size, seed=0))
        return described(eager, fused, tensors, bytes=nbytes(*tensors) + out_bytes)
    layout = "NHWC" if name == "uint8 HWC" else "NCHW"
    shape = (batch, size, size, 3) if layout == "NHWC" else (batch, 3, size, size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    quantize = "int8" if precision == torch.int8 else None
    ready = patchify(to_tensor_and_normalize(pixels, layout), (patch, patch)).to(dtype)

    def prepare(weight: Tensor, *others: Tensor) -> Tensor:
        return to_tensor_and_normalize(others[-1], layout).to(weight.dtype)

    def product(weight: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
        return norm_linear(ready, weight.flatten(1), bias, norm="none", quantize=quantize)

    peers: dict[str, Callable[..., Tensor]] = {"to tensor, normalise": prepare, "product alone": product}
    if quantize is not None:
        low = [t.bfloat16() for t in weights]
        peers["eager bf16"] = lambda *tensors: eager_bytes(*low, tensors[-1], layout=layout)
    return described(
        functools.partial(eager_bytes, layout=layout),
        functools.partial(fused_bytes, layout=layout, quantize=quantize),
        (*weights, pixels),
        bytes=nbytes(*weights, pixels) + out_bytes,
        peers=peers,
        precision=precision,
    )


@pytest.mark.parametrize("name", NAMES)
def test_patch_embed(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
