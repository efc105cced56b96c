"""int8 products in plain torch: rotate, quantise per row, multiply as exact integers.  The only ground truth.

A row's scale is its largest magnitude, so a single massive channel leaves the others of its row a bit or two.  Rotating
first, activations and weights alike, changes no product and makes a row nearly Gaussian, whatever it was and without
any data to calibrate on (QuaRot, Ashkboos et al. 2024).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# int8 is used symmetrically: -128 would need a wider product.
MOST = 127
Numbers = Sequence[float] | Tensor | None
_BLOCKS = (256, 128, 64, 32, 16)


def rotation(k: int) -> tuple[int, int]:
    """(block, padded): the largest block that pads rows of `k` elements by at most a thirty-second, or 16."""
    for block in _BLOCKS:
        padded = -(-k // block) * block
        if padded - k <= k // 32:
            break
    return block, padded


@functools.cache
def _signs(count: int) -> tuple[float, ...]:
    """+1 or -1 from a hash of the position (Wellons 2018): random enough, and the same on every machine."""
    signs = []
    for i in range(count):
        h = i
        h ^= h >> 16
        h = h * 0x7FEB352D & 0xFFFFFFFF
        h ^= h >> 15
        h = h * 0x846CA68B & 0xFFFFFFFF
        h ^= h >> 16
        signs.append(-1.0 if h & 1 else 1.0)
    return tuple(signs)


def _hadamard(block: int, like: Tensor) -> Tensor:
    """H[i][j] = (-1)^popcount(i & j), by Sylvester's doubling."""
    h = like.new_ones(1, 1)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def rotate(x: Tensor) -> Tensor:
    """(..., K) -> (..., K padded): an orthogonal map, so rotate(x) @ rotate(w).T is x @ w.T.

    Random signs, then a Walsh-Hadamard transform of every block of neighbours.  The signs keep a constant, such as the
    positive mean of a GELU, from becoming a spike of its own.
    """
    block, padded = rotation(x.shape[-1])
    x = F.pad(x, (0, padded - x.shape[-1])) * x.new_tensor(_signs(padded))
    return (x.unflatten(-1, (-1, block)) @ _hadamard(block, x) / block**0.5).flatten(-2)


def quantize(y: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) -> int8 (..., K) and scale (...): y is about scale * int8.

    A row of zeros has scale 0.  A row with NaN or infinity has scale NaN, so that all its products are NaN.
    """
    # One zero more, for rows without elements.
    scale = F.pad(y.abs(), (0, 1)).amax(-1) / MOST
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    steps = y / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return steps.nan_to_num(0.0, 0.0, 0.0).round().clamp(-MOST, MOST).to(torch.int8), scale


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias with `x` quantised per row, `weight` per output channel; in float32 or wider around that."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    qx, x_scale = quantize(rotate(x))
    qw, w_scale = quantize(rotate(weight.float()))
    # float64 holds every sum of products of two int8 exactly.
    y = (qx.double() @ qw.double().T).to(x.dtype) * x_scale.unsqueeze(-1) * w_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def patch_weight(weight: Tensor, mean: Numbers, std: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """The weight (D, C, P1, P2) of a patch embedding for bytes: int8 of its shape, scale (D,) and shift (D,), float32.

    With patches less 128, integers @ int8.T * scale + shift is about normalised patches @ weight.T.

    Every rounding error is passed on to the next pixel, line by line and back.  So errors are differences of
    neighbours, and cancel where a picture is smooth: a photograph's tokens are about as near as those of a product in
    bfloat16, and those of pure noise are off by 1.1 % (by 0.8 % without this; error diffusion: Floyd, Steinberg 1976).
    """
    wide = weight.double()
    mean = wide.new_zeros(wide.shape[1]) if mean is None else torch.as_tensor(mean).to(wide)
    std = wide.new_ones(wide.shape[1]) if std is None else torch.as_tensor(std).to(wide)
    folded = wide / (255 * std).view(-1, 1, 1)
    # The errors of two neighbours may add a step to a weight.
    scale = folded.abs().flatten(1).amax(1) / (MOST - 1)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    steps = (folded / torch.where(scale > 0, scale, 1.0).view(-1, 1, 1, 1)).nan_to_num(0.0, 0.0, 0.0)
    sums = _back_and_forth(steps).flatten(1).cumsum(1).round()
    values = _back_and_forth(F.pad(sums, (1, 0)).diff(dim=1).unflatten(1, (-1, weight.shape[3])))
    values = values.reshape(weight.shape)
    shift = (values.sum((2, 3)) * (128 - 255 * mean)).sum(1) * scale
    return values.to(torch.int8), scale.float(), shift.float()


def _back_and_forth(lines: Tensor) -> Tensor:
    """(D, ..., P2) -> (D, lines, P2) with every other line reversed."""
    lines = lines.reshape(lines.shape[0], -1, lines.shape[-1]).clone()
    lines[:, 1::2] = lines[:, 1::2].flip(2)
    return lines


def patches(pixels: Tensor, weight: Tensor, mean: Numbers, std: Numbers) -> Tensor:
    """Patches (..., C * P1 * P2) of bytes times the weight (D, C, P1, P2), the weight quantised; float64."""
    values, scale, shift = patch_weight(weight, mean, std)
    return (pixels.double() - 128) @ values.double().flatten(1).T * scale + shift
