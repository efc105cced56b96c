"""The pre-norm transformer block, two operators long."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit.nn._listeners import can_bypass, kinds_inside
from fastvit.nn._spelling import make_norm
from fastvit.nn.attention import Attention
from fastvit.nn.layers import DropPath, LayerScale, branch_arguments
from fastvit.nn.mlp import MLP, SwiGLU


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)), each half with LayerScale and DropPath.

    Dosovitskiy et al. 2020.  Runs as self_attention, mlp; with qk_norm or dropout, as the operators that these are made
    of; module by module as long as one inside has a hook, or is not what the constructor made.  Keys as timm's Block:
    `norm1`, `attn.qkv`, `attn.proj`, `ls1.gamma`, `norm2`, `mlp.fc1`, `mlp.fc2`, `ls2.gamma`.

    Args:
        dim: channels.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over dim (for SwiGLU, of gate and value together).
        qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop: as in `Attention`.
        init_values: LayerScale's start value; None leaves LayerScale out.
        drop_path: stochastic depth's probability.
        act_layer: activation of the MLP.
        norm_layer: "layer", "rms", or a callable that takes the width.
        mlp_layer: `MLP` or `SwiGLU`.
        norm_eps: epsilon of norms given by name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: str | type[nn.Module] = "gelu",
        norm_layer: str | type[nn.Module] = "layer",
        mlp_layer: type[MLP] = MLP,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm_layer, dim, norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = make_norm(norm_layer, dim, norm_eps)
        activation: dict[str, Any] = {} if issubclass(mlp_layer, SwiGLU) else {"act_layer": act_layer}
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), bias=proj_bias, drop=proj_drop, **activation)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self._kinds = kinds_inside(self)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, tokens: int | None = None) -> Tensor:
        """x (B, N, dim) -> (B, N, dim).

        attn_mask: additive, broadcastable to (B, num_heads, N, N).
        tokens: compute only the first so many, (B, tokens, dim); all remain keys and values.
        """
        if not can_bypass(self, self._kinds):
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask)))
            return (x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))[:, :tokens]
        branch = branch_arguments(x, self.ls1, self.drop_path1)
        x = self.attn.add_to(x, self.norm1, **branch, attn_mask=attn_mask, tokens=tokens)
        branch = branch_arguments(x, self.ls2, self.drop_path2)
        return self.mlp.add_to(x, self.norm2, **branch)
