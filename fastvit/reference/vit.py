"""The Vision Transformer (Dosovitskiy et al. 2020, "An image is worth 16x16 words"), plainly.

State-dict keys are timm's, so the same weights load into timm's VisionTransformer and into `fastvit.FastViT`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patchify(image: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, N, C * P1 * P2), patches in raster order."""
    b, c, h, w = image.shape
    p1, p2 = patch_size
    x = image.reshape(b, c, h // p1, p1, w // p2, p2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p1) * (w // p2), c * p1 * p2)


def interpolate_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """(1, N, D) positions of one grid resampled to another: bicubic with antialiasing, in float32 as timm does."""
    if old_grid == new_grid:
        return pos_embed
    wide = pos_embed.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    wide = F.interpolate(wide, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    return wide.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], -1).to(pos_embed.dtype)


class PatchEmbed(nn.Module):
    """Patches, flattened and projected; `proj` is a convolution for its keys only."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return F.linear(patchify(image, self.patch_size), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    """linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Image to logits.

    Args:
        img_size: (height, width) in pixels that the positions are learned for, or one number.  Other sizes are accepted
            by `forward`, with interpolated positions.
        patch_size: (height, width) of a patch, or one number.
        in_chans: image channels, for instance 12 for multispectral images.
        num_classes: logits; 0 returns the class token after the final norm.
        embed_dim: D, a multiple of num_heads.
        depth: blocks.
        num_heads: heads.
        mlp_ratio: hidden width of the MLPs over D.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        p1, p2 = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if height % p1 or width % p2:
            raise ValueError(f"img_size: {(height, width)} is no multiple of patch_size {(p1, p2)}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: {num_heads}; accepted: a divisor of embed_dim={embed_dim}")
        self.grid_size = (height // p1, width // p2)
        self.patch_embed = PatchEmbed((p1, p2), in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.grid_size[0] * self.grid_size[1], embed_dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D), after the final norm."""
        p1, p2 = self.patch_embed.patch_size
        if image.ndim != 4 or image.shape[2] % p1 or image.shape[3] % p2:
            raise ValueError(f"image: shape {tuple(image.shape)}; accepted: (B, C, {p1}i, {p2}j)")
        grid = (image.shape[2] // p1, image.shape[3] // p2)
        patch_positions = interpolate_pos_embed(self.pos_embed[:, 1:], self.grid_size, grid)
        x = torch.cat([self.cls_token.expand(image.shape[0], -1, -1), self.patch_embed(image)], dim=1)
        x = x + torch.cat([self.pos_embed[:, :1], patch_positions], dim=1)
        return self.norm(self.blocks(x))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        return self.head(self.forward_features(image)[:, 0])
