"""int8 products in plain torch: rotate, quantise per row, multiply as exact integers.  The only ground truth.

A row's scale is its largest magnitude, so a single massive channel leaves the others of its row a bit or two.  Rotating
first, activations and weights alike, changes no product and makes a row nearly Gaussian, whatever it was and without
any data to calibrate on (QuaRot, Ashkboos et al. 2024).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# int8 is used symmetrically: -128 would need a wider product.
MOST = 127
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
