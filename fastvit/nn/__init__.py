"""Drop-in modules over `fastvit.ops`, with timm's constructor arguments and state-dict keys."""

from fastvit.nn._spelling import QuickGELU
from fastvit.nn.attention import Attention, AttentionPool
from fastvit.nn.block import Block
from fastvit.nn.layers import DropPath, LayerScale
from fastvit.nn.mlp import MLP, SwiGLU
from fastvit.nn.patch_embed import PatchEmbed

__all__ = ["MLP", "Attention", "AttentionPool", "Block", "DropPath", "LayerScale", "PatchEmbed", "QuickGELU", "SwiGLU"]
