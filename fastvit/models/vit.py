"""FastViT: the Vision Transformer over fastvit's operators, with timm's argument names and state-dict keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.nn import MLP, AttentionPool, Block, PatchEmbed, SwiGLU
from fastvit.nn._listeners import listener_obstacle
from fastvit.reference import interpolate_pos_embed

POOLS = ("token", "avg", "map", "")
_MLP_LAYERS: dict[str, type[MLP]] = {"mlp": MLP, "swiglu": SwiGLU}


class FastViT(nn.Module):
    """A plain pre-norm Vision Transformer (Dosovitskiy et al. 2020) and its common descendants.

    Args:
        img_size: (height, width) in pixels that the positions are learned for, or one number.  `forward` takes any
            multiple of the patch; positions are then interpolated (bicubic, antialiased) at every call.
        patch_size: (height, width) of a patch, or one number.
        in_chans: image channels.
        num_classes: logits; 0 leaves the head out.
        global_pool: "token" (class token), "avg" (mean of patch tokens), "map" (attention pooling) or "" (all tokens).
        embed_dim, depth, num_heads, mlp_ratio: D, blocks, heads, hidden width of the MLPs over D.
        qkv_bias, qk_norm, init_values, drop_path_rate, proj_drop_rate, attn_drop_rate, act_layer: as in `nn.Block`;
            drop_path_rate rises linearly with depth to its value.
        mlp_layer: "mlp" or "swiglu".
        class_token: prepend a class token.
        reg_tokens: register tokens behind it (Darcet et al. 2023).
        no_embed_class: the class token has no position.
        pre_norm: a norm before the blocks, as CLIP has; the patch projection then has no bias.
        fc_norm: norm after pooling instead of before; by default for "avg", as in timm.
        norm_eps: epsilon of every norm.
        mean, std: `in_chans` numbers each; images are normalised on the way in, and uint8 images divided by 255 first.
        layout: "NCHW" for images (B, C, H, W), or "NHWC" for (B, H, W, C), as decoders write them.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        act_layer: str = "gelu",
        mlp_layer: str = "mlp",
        norm_eps: float = 1e-6,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layout: str = "NCHW",
    ) -> None:
        super().__init__()
        if global_pool not in POOLS:
            raise ValueError(f"global_pool: {global_pool!r} is not known; accepted: {', '.join(map(repr, POOLS))}")
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool: 'token' needs class_token=True; accepted without it: 'avg', 'map', ''")
        if mlp_layer not in _MLP_LAYERS:
            raise ValueError(f"mlp_layer: {mlp_layer!r} is not known; accepted: {', '.join(_MLP_LAYERS)}")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.embed_dim = self.num_features = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        fc_norm = global_pool == "avg" if fc_norm is None else fc_norm

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, not pre_norm, mean, std, layout)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        positions = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.randn(1, positions, embed_dim) * 0.02)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    init_values=init_values,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    act_layer=act_layer,
                    mlp_layer=_MLP_LAYERS[mlp_layer],
                    norm_eps=norm_eps,
                )
                for i in range(depth)
            )
        )
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn_pool = (
            AttentionPool(embed_dim, num_heads, mlp_ratio, act_layer=act_layer, norm_eps=norm_eps)
            if global_pool == "map"
            else None
        )
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if fc_norm else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def embed(self, x: Tensor) -> Tensor:
        """Images -> (B, R + N, D): patches, class and register tokens, positions, norm_pre."""
        tokens: list[Tensor] = [t for t in (self.cls_token, self.reg_token) if t is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else None
        positions: Tensor = self.pos_embed
        if prefix is not None and not self.no_embed_class:
            # Prefix tokens get their positions here, patches theirs in the operator.
            prefix = prefix + positions[:, : self.num_prefix_tokens]
            positions = positions[:, self.num_prefix_tokens :]
        p1, p2 = self.patch_embed.patch_size
        height, width = self.patch_embed.image_size(x) if x.ndim == 4 else (0, 0)
        if height >= p1 and width >= p2:  # else patch_embed says what is wrong
            positions = interpolate_pos_embed(positions, self.patch_embed.grid_size, (height // p1, width // p2))
        return self.norm_pre(self.patch_embed(x, positions, prefix))

    def _encode(self, x: Tensor, tokens: int | None) -> Tensor:
        """What comes out of the blocks, of which the first `tokens` tokens will be read."""
        if tokens is None or self.training or torch.is_grad_enabled() or [*map(type, self.blocks)][-1:] != [Block]:
            return self.blocks(x)
        *before, last = self.blocks
        if type(self.blocks) is not nn.Sequential or listener_obstacle((self.blocks, last)) is not None:
            return self.blocks(x)  # somebody else may look at the other tokens
        for block in before:
            x = block(x)
        return last(x, tokens=tokens)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images in `layout`, float or uint8 -> (B, R + N, D), after the final norm (before it if fc_norm)."""
        return self.norm(self.blocks(self.embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What forward_features returns -> (B, num_classes), or the pooled (B, D) with pre_logits."""
        if self.attn_pool is not None:
            x = self.attn_pool(x[:, self.num_prefix_tokens :])
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "token":
            x = x[:, 0]
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images in `layout`, float or uint8 -> (B, num_classes)."""
        tail = (self.norm, self.fc_norm, self.head)
        after = type(self.norm) is nn.Identity
        norms = (nn.Identity, nn.LayerNorm) if after else (nn.LayerNorm, nn.Identity)
        known = tuple(map(type, tail)) in ((*norms, nn.Linear), (*norms, nn.Identity))
        if self.global_pool not in ("token", "avg") or not known or listener_obstacle(tail) is not None:
            return self.forward_head(self.forward_features(x))
        x = self._encode(self.embed(x), 1 if self.global_pool == "token" else None)
        norm: Any = self.fc_norm if after else self.norm
        head: Any = None if type(self.head) is nn.Identity else self.head
        mode = "token" if self.global_pool == "token" else "avg" if after else "norm_avg"
        return ops.pool(
            x,
            mode=mode,
            num_prefix_tokens=self.num_prefix_tokens,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            weight=None if head is None else head.weight,
            bias=None if head is None else head.bias,
        )
