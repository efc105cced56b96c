"""PatchEmbed: image to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvit import ops, reference
from fastvit.nn._listeners import listener_obstacle
from fastvit.ops import _checks


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class PatchEmbed(nn.Module):
    """Patch embedding in one operator (Dosovitskiy et al. 2020).  Keys as timm's: `proj.weight`, `proj.bias`.

    Args:
        img_size: nominal (height, width) in pixels, or one number; `grid_size` and `num_patches` follow from it.
        patch_size: (height, width) of a patch, or one number.
        in_chans: image channels.
        embed_dim: D.
        bias: give the projection a bias.
        mean, std: `in_chans` numbers each: images are normalised on the way in, (image - mean) / std, and uint8 images
            are divided by 255 first.
        layout: "NCHW" for images (B, C, H, W), or "NHWC" for (B, H, W, C), as decoders write them.
        quantize: None, or "int8" to multiply uint8 images as integers, on the CPU; see `ops.patch_embed`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layout: str = "NCHW",
        quantize: str | None = None,
    ) -> None:
        super().__init__()
        _checks.quantize(quantize)
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(f"layout: {layout!r} is not known; accepted: NCHW, NHWC")
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        if any(size < patch for size, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size: {self.img_size} is smaller than patch_size {self.patch_size}")
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias)
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.layout = layout
        self.quantize = quantize

    def image_size(self, x: Tensor) -> tuple[int, int]:
        """(H, W) of a batch of images."""
        return (x.shape[2], x.shape[3]) if self.layout == "NCHW" else (x.shape[1], x.shape[2])

    def forward(self, x: Tensor, pos_embed: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """Images in `layout`, float or uint8 -> (B, R + N, D); pos_embed and prefix as in `ops.patch_embed`.

        Pixels beyond the last whole patch are ignored, as a strided convolution does; there must be a whole one.
        """
        if x.ndim == 4:
            (h, w), (p1, p2) = self.image_size(x), self.patch_size
            # An image without a whole patch, or in another layout, is for the operator to refuse.
            if h >= p1 and w >= p2 and (h % p1 or w % p2):
                h, w = h // p1 * p1, w // p2 * p2
                x = x[:, :, :h, :w] if self.layout == "NCHW" else x[:, :h, :w]
        if not isinstance(self.proj, nn.Conv2d) or listener_obstacle([self.proj]) is not None:
            x = reference.normalize_image(x, self.proj.weight.dtype, self.mean, self.std, self.layout)
            x = self.proj(x).flatten(2).transpose(1, 2)
            x = x if pos_embed is None else x + pos_embed
            return x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        return ops.patch_embed(
            x,
            self.proj.weight,
            self.proj.bias,
            pos_embed=pos_embed,
            prefix=prefix,
            mean=self.mean,
            std=self.std,
            layout=self.layout,
            quantize=self.quantize if x.dtype == torch.uint8 else None,
        )
