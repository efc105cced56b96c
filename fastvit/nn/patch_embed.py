"""PatchEmbed: image to tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastvit import ops


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
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        if any(size < patch for size, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size: {self.img_size} is smaller than patch_size {self.patch_size}")
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias)
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)

    def forward(self, x: Tensor, pos_embed: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), float or uint8 -> (B, R + N, D); pos_embed and prefix as in `ops.patch_embed`.

        Pixels beyond the last whole patch are ignored, as a strided convolution does.
        """
        p1, p2 = self.patch_size
        if x.ndim == 4 and (x.shape[2] % p1 or x.shape[3] % p2):
            x = x[:, :, : x.shape[2] // p1 * p1, : x.shape[3] // p2 * p2]
        return ops.patch_embed(
            x, self.proj.weight, self.proj.bias, pos_embed=pos_embed, prefix=prefix, mean=self.mean, std=self.std
        )
