"""patch_embed: normalise, cut into patches, project, add positions, write after the prefix tokens; and backward.

Shapes: image (B, C, H, W) of any strides, weight (D, K) with K = C P1 P2 in the order (channel, y, x), out
(B, R + N, D) with N = H / P1 * W / P2 patches and R prefix tokens.

Cost in 16 bits: 2 B N D K flops, 2 B (C H W + (R + N) D) + 2 D K bytes (half the image's for uint8).  ViT-B/16 at 224,
batch 256: 59 GFLOP and 155 MB, 380 flops a byte, just above the ridge of an H100 (270).  What is saved is eager's four
passes: normalisation, transposition, concatenation, position.

An implicit product: one program makes a tile of patches x features, reading pixels where they lie.  Programs beyond the
last tile copy the prefix tokens, one for each sample.

The backward needs the inputs alone.  The weight's gradient is a sum over B N patches, a pure product and cuBLAS's, for
which `_unfold` writes the normalised patches (the image's size, once); an image's gradient, which hardly anybody asks
for, is a product and a permutation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastvit.kernels.launch import arch, compute_dtype, launch, precision
from fastvit.kernels.product import GROUP_M, Tile, tile_index, weight_gradient
from torch import Tensor

# (dtype of the product, patches up to) -> tile.
_TILES = {
    "sm80": {
        ("16", 4096): Tile(64, 64, 32, 4, 3),
        ("16", None): Tile(128, 128, 32, 8, 3),
        ("tf32", None): Tile(64, 64, 32, 4, 2),
        ("ieee", None): Tile(64, 32, 16, 4, 2),
    },
    "sm90": {
        ("16", 4096): Tile(64, 64, 64, 4, 3),
        ("16", None): Tile(128, 128, 32, 8, 4),
        ("tf32", None): Tile(64, 64, 32, 4, 3),
        ("ieee", None): Tile(64, 32, 16, 4, 2),
    },
    "sm100": {
        ("16", 4096): Tile(64, 64, 64, 4, 3),
        ("16", None): Tile(128, 128, 32, 8, 4),
        ("tf32", None): Tile(64, 64, 32, 4, 3),
        ("ieee", None): Tile(64, 32, 16, 4, 2),
    },
    "gfx942": {
        ("16", 4096): Tile(64, 64, 32, 4, 2),
        ("16", None): Tile(128, 128, 32, 8, 2),
        ("tf32", None): Tile(64, 64, 32, 4, 2),
        ("ieee", None): Tile(64, 64, 16, 4, 2),
    },
}

_PREFIX_BLOCK = 1024
_UNFOLD_BLOCK = 1024


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Launch: same signature and meaning as `fastvit.ops.patch_embed`."""
    dtype = compute_dtype(image, weight) if image.is_floating_point() else weight.dtype
    batch, channels, height, width = image.shape
    dim, _, patch_h, patch_w = weight.shape
    weight = weight.to(dtype).reshape(dim, channels * patch_h * patch_w).contiguous()
    bias, pos_embed, prefix = (None if t is None else t.contiguous() for t in (bias, pos_embed, prefix))
    columns = width // patch_w
    patches = height // patch_h * columns
    # The last dimension but one, whether or not there is a leading one.
    prefix_rows = 0 if prefix is None else prefix.shape[-2]
    out = torch.empty(batch, prefix_rows + patches, dim, dtype=dtype, device=image.device)
    scale = shift = None
    if mean is not None or std is not None or not image.is_floating_point():
        unit = 1.0 if image.is_floating_point() else 255.0
        scale, shift = _channel_affine(_numbers(mean, 0.0, channels), _numbers(std, 1.0, channels), unit, image.device)
    kind = precision(dtype) if dtype == torch.float32 else "16"
    m, k = batch * patches, weight.shape[1]
    tile = next(
        tile for (of, most), tile in _TILES[arch(image.device)].items() if of == kind and (most is None or m <= most)
    )
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(dim, tile.block_n)
    launch(
        _product,
        tiles + (batch if prefix_rows else 0),
        image,
        *image.stride(),
        scale,
        shift,
        weight,
        bias,
        pos_embed,
        prefix,
        out,
        tiles,
        m,
        dim,
        k,
        patches,
        columns,
        prefix_rows,
        PATCH_H=patch_h,
        PATCH_W=patch_w,
        EVEN_K=k % tile.block_k == 0,
        PRECISION=precision(dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GROUP_M,
        PREFIX_BLOCK=_PREFIX_BLOCK,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _numbers(values: Sequence[float] | Tensor | None, default: float, count: int) -> tuple[float, ...]:
    return (default,) * count if values is None else tuple(float(v) for v in values)


def patch_embed_backward(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    *,
    prefix_rows: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of image, weight, bias, pos_embed and prefix, those that `needs` asks for, given that of the result.

    Args:
        grad: (B, R + N, D) with R = `prefix_rows`.
        weight: (D, C, P1, P2) in the dtype that products run in.

    Returns:
        The sums over the batch in float32, the others in the dtype of `weight`.
    """
    need_image, need_weight, need_bias, need_pos, need_prefix = needs
    dtype = weight.dtype
    dim, channels, patch_h, patch_w = weight.shape
    batch, _, height, width = image.shape
    grid_h, grid_w = height // patch_h, width // patch_w
    image_grad = weight_grad = bias_grad = pos_grad = prefix_grad = None
    if need_prefix:
        prefix_grad = grad[:, :prefix_rows].sum(0, dtype=torch.float32)
    grad = grad[:, prefix_rows:]
    if need_bias or need_pos:
        pos_grad = grad.sum(0, dtype=torch.float32)
        bias_grad = pos_grad.sum(0)
    if need_image or need_weight:
        grad = grad.reshape(-1, dim).to(dtype)
    if need_weight:
        weight_grad = weight_gradient(grad, unfold(image, patch_h, patch_w, mean, std, dtype), dtype).view(weight.shape)
    if need_image:
        patches = torch.mm(grad, weight.reshape(dim, -1))
        if std is not None:
            inverse = torch.tensor([1.0 / s for s in std], dtype=torch.float32, device=grad.device)
            patches = (patches.view(-1, channels, patch_h * patch_w) * inverse[:, None]).to(dtype)
        patches = patches.view(batch, grid_h, grid_w, channels, patch_h, patch_w)
        image_grad = patches.permute(0, 3, 1, 4, 2, 5).reshape(image.shape)
    return [image_grad, weight_grad, bias_grad, pos_grad, prefix_grad]


def unfold(
    image: Tensor,
    patch_h: int,
    patch_w: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The normalised patches (B N, C P1 P2) in `dtype`."""
    batch, channels, height, width = image.shape
    columns = width // patch_w
    patches = height // patch_h * columns
    k = channels * patch_h * patch_w
    out = torch.empty(batch * patches, k, dtype=dtype, device=image.device)
    scale = shift = None
    if mean is not None or std is not None or not image.is_floating_point():
        unit = 1.0 if image.is_floating_point() else 255.0
        scale, shift = _channel_affine(_numbers(mean, 0.0, channels), _numbers(std, 1.0, channels), unit, image.device)
    blocks = triton.cdiv(k, _UNFOLD_BLOCK)
    launch(
        _unfold,
        batch * patches * blocks,
        image,
        *image.stride(),
        scale,
        shift,
        out,
        k,
        patches,
        columns,
        blocks,
        PATCH_H=patch_h,
        PATCH_W=patch_w,
        BLOCK=_UNFOLD_BLOCK,
        num_warps=4,
        num_stages=1,
    )
    return out


@functools.cache
def _channel_affine(
    mean: tuple[float, ...], std: tuple[float, ...], unit: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(x / unit - mean) / std as x * scale + shift: kept on the device, since a copy in each call would stall it.

    Kept for good, since a CUDA graph reads the address of its capture for as long as it lives.
    """
    scale = [1.0 / (unit * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale, device=device), torch.tensor(shift, device=device)


@triton.jit
def _product(
    image, image_batch, image_channel, image_y, image_x, scale, shift, weight, bias, pos_embed, prefix, out,
    tiles, M, N, K, patches, columns, prefix_rows,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PREFIX_BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < tiles:
        row, column = tile_index(program, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m = row * BLOCK_M + tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        # Patches and features beyond the last repeat the last and are not stored.
        patch = tl.minimum(m, M - 1)
        sample = (patch // patches).to(tl.int64)
        place = patch % patches
        corner = sample * image_batch + (place // columns).to(tl.int64) * (PATCH_H * image_y)
        corner += place % columns * (PATCH_W * image_x)
        feature = tl.minimum(n, N - 1)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            channel = k // (PATCH_H * PATCH_W)
            y = k % (PATCH_H * PATCH_W) // PATCH_W
            x = k % PATCH_W
            # Within one sample offsets fit 32 bits.
            at = (image + corner)[:, None] + (channel * image_channel + y * image_y + x * image_x)[None, :]
            if EVEN_K:
                a = tl.load(at)
                b = tl.load(weight + feature[:, None] * K + k[None, :])
            else:
                a = tl.load(at, mask=k[None, :] < K, other=0)
                b = tl.load(weight + feature[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
            if scale is not None:
                # Padding beyond K becomes finite and meets weights of 0.
                factor = tl.load(scale + channel, mask=k < K, other=0.0)
                offset = tl.load(shift + channel, mask=k < K, other=0.0)
                a = tl.fma(a.to(tl.float32), factor[None, :], offset[None, :])
            acc = tl.dot(a.to(weight.dtype.element_ty), tl.trans(b), acc, input_precision=PRECISION)
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if pos_embed is not None:
            at = pos_embed + place[:, None] * N + n[None, :]
            acc += tl.load(at, mask=n[None, :] < N, other=0.0).to(tl.float32)
        token = sample * (prefix_rows + patches) + prefix_rows + place
        mask = (m[:, None] < M) & (n[None, :] < N)
        tl.store(out + token[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)
    elif prefix is not None:
        start_of_sample = (program - tiles).to(tl.int64) * (prefix_rows + patches) * N
        for start in tl.range(0, prefix_rows * N, PREFIX_BLOCK):
            i = start + tl.arange(0, PREFIX_BLOCK)
            mask = i < prefix_rows * N
            values = tl.load(prefix + i, mask=mask, other=0.0)
            tl.store(out + start_of_sample + i, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _unfold(
    image, image_batch, image_channel, image_y, image_x, scale, shift, out, K, patches, columns, blocks,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place = patch % patches
    corner = (patch // patches).to(tl.int64) * image_batch + (place // columns).to(tl.int64) * (PATCH_H * image_y)
    corner += place % columns * (PATCH_W * image_x)
    channel = k // (PATCH_H * PATCH_W)
    y = k % (PATCH_H * PATCH_W) // PATCH_W
    # Within one sample offsets fit 32 bits.
    at = image + corner + (channel * image_channel + y * image_y + k % PATCH_W * image_x)
    values = tl.load(at, mask=k < K, other=0).to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + channel, mask=k < K, other=0.0)
        values = tl.fma(values, factor, tl.load(shift + channel, mask=k < K, other=0.0))
    tl.store(out + patch.to(tl.int64) * K + k, values.to(out.dtype.element_ty), mask=k < K)
