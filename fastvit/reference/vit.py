"""The Vision Transformer (Dosovitskiy et al. 2020, "An image is worth 16x16 words"), plainly.

State-dict keys are timm's, so the same weights load into timm's VisionTransformer and into `fastvit.FastViT`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the original CLIP's GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


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

    def __init__(self, patch_size: tuple[int, int], in_chans: int, embed_dim: int, bias: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return F.linear(patchify(image, self.patch_size), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    """linear, activation, linear."""

    def __init__(self, dim: int, hidden: int, act: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """x * gamma per channel (Touvron et al. 2021)."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """In training, drops a sample's branch with probability `drop_prob`, else scales it up (Huang et al. 2016)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        init_values: float | None,
        drop_path: float,
        act: Activation,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class AttentionPool(nn.Module):
    """A learned query attends to all tokens, then a residual MLP (Zhai et al. 2023, SigLIP)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, act: Activation, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        head_dim = d // self.num_heads
        q = self.q(self.latent).reshape(1, 1, self.num_heads, head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(b, n, 2, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * head_dim**-0.5).softmax(dim=-1)
        x = self.proj((weights @ v).transpose(1, 2).reshape(b, d))
        return x + self.mlp(self.norm(x))


class VisionTransformer(nn.Module):
    """Image to logits.  The arguments up to mlp_ratio are the paper's; the others are what its descendants changed.

    Args:
        img_size: (height, width) in pixels that the positions are learned for, or one number.  Other sizes are accepted
            by `forward`, with interpolated positions.
        patch_size: (height, width) of a patch, or one number.
        in_chans: image channels, for instance 12 for multispectral images.
        num_classes: logits; 0 leaves the head out.
        embed_dim: D, a multiple of num_heads.
        depth: blocks.
        num_heads: heads.
        mlp_ratio: hidden width of the MLPs over D.
        global_pool: "token" (class token), "avg" (mean of patch tokens, then the norm), "map" (attention pooling) or ""
            (all tokens).
        class_token: prepend a class token.
        reg_tokens: register tokens behind it (Darcet et al. 2023).
        no_embed_class: class and register tokens have no position.
        pre_norm: a norm before the blocks, and no bias in the patch projection, as CLIP has it.
        qkv_bias: give the qkv projections a bias.
        init_values: LayerScale's start value; None leaves LayerScale out.
        drop_path_rate: stochastic depth's probability in the last block, rising linearly from 0 in the first.
        act_layer: "gelu", "gelu_tanh" or "quick_gelu".
        norm_eps: epsilon of every norm.

    Raises:
        ValueError: an argument that is not accepted; from forward, an image that is not whole patches.
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
        *,
        global_pool: str = "token",
        class_token: bool = True,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
        act_layer: str = "gelu",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        p1, p2 = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if height % p1 or width % p2:
            raise ValueError(f"img_size: {(height, width)} is no multiple of patch_size {(p1, p2)}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: {num_heads}; accepted: a divisor of embed_dim={embed_dim}")
        if global_pool not in ("token", "avg", "map", ""):
            raise ValueError(f"global_pool: {global_pool!r}; accepted: 'token', 'avg', 'map', ''")
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool: 'token'; accepted without a class token: 'avg', 'map', ''")
        if act_layer not in ACTIVATIONS:
            raise ValueError(f"act_layer: {act_layer!r}; accepted: {', '.join(ACTIVATIONS)}")
        act = ACTIVATIONS[act_layer]
        self.grid_size = (height // p1, width // p2)
        self.global_pool = global_pool
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self.patch_embed = PatchEmbed((p1, p2), in_chans, embed_dim, bias=not pre_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        positions = self.grid_size[0] * self.grid_size[1] + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.randn(1, positions, embed_dim) * 0.02)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, init_values, rate, act, norm_eps) for rate in rates)
        )
        after = global_pool == "avg"
        self.norm = nn.Identity() if after else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn_pool = (
            AttentionPool(embed_dim, num_heads, mlp_ratio, act, norm_eps) if global_pool == "map" else nn.Identity()
        )
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if after else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def embed(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, R + N, D): class and register tokens, then patches, each with its position."""
        p1, p2 = self.patch_embed.patch_size
        if image.ndim != 4 or 0 in image.shape[2:] or image.shape[2] % p1 or image.shape[3] % p2:
            raise ValueError(f"image: shape {tuple(image.shape)}; accepted: (B, C, {p1}i, {p2}j)")
        grid = (image.shape[2] // p1, image.shape[3] // p2)
        prefix = [t.expand(image.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = self.patch_embed(image)
        if self.no_embed_class:
            return torch.cat([*prefix, x + interpolate_pos_embed(self.pos_embed, self.grid_size, grid)], dim=1)
        r = self.num_prefix_tokens
        patch_positions = interpolate_pos_embed(self.pos_embed[:, r:], self.grid_size, grid)
        return torch.cat([*prefix, x], dim=1) + torch.cat([self.pos_embed[:, :r], patch_positions], dim=1)

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, R + N, D), after the final norm (before it for "avg")."""
        return self.norm(self.blocks(self.norm_pre(self.embed(image))))

    def forward_head(self, x: Tensor) -> Tensor:
        """What forward_features returns -> (B, num_classes); (B, R + N, num_classes) for global_pool ""."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "map":
            x = self.attn_pool(x[:, self.num_prefix_tokens :])
        return self.head(self.fc_norm(x))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(image))
