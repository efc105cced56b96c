"""Multi-head self-attention, and attention pooling with a learned query."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit.nn._listeners import can_bypass, kinds_inside, own_listener
from fastvit.nn._spelling import make_norm, norm_arguments
from fastvit.nn.mlp import MLP, add_branch

# A linear layer's tensors: weight (N, K), bias (N,) or None.
Projection = tuple[Tensor, Tensor | None]


def project_heads(
    x: Tensor,
    projections: tuple[Projection, ...],
    num_heads: int,
    tokens: int | None = None,
    *,
    quantize: str | None = None,
    **norm: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """q of the first `tokens` tokens (None: of all), k and v of all: each (B, N, num_heads, head_dim).

    projections: one packed [q; k; v], or three.  quantize, norm: as in `ops.norm_linear`.
    """
    inner = sum(weight.shape[0] for weight, _ in projections) // 3
    if tokens is not None and len(projections) == 1 and quantize is None:
        weight, bias = projections[0]
        sizes = (inner, 2 * inner)
        projections = tuple(zip(weight.split(sizes), (None, None) if bias is None else bias.split(sizes), strict=True))
    # Of several projections the first is the queries'.
    sources = (x,) if len(projections) == 1 else (x[:, :tokens], x, x)
    projected = [
        ops.norm_linear(t, *projection, **norm, quantize=quantize)
        for t, projection in zip(sources, projections, strict=False)
    ]
    q, k, v = (t for each in projected for t in each.unflatten(-1, (-1, num_heads, inner // num_heads)).unbind(2))
    return q[:, :tokens], k, v


class Attention(nn.Module):
    """Multi-head self-attention on a packed qkv projection.  Keys as timm's: `qkv`, `q_norm`, `k_norm`, `proj`.

    A hook on `attn_drop` gets the attention's weights, (B, num_heads, N, N), which are made for it alone.

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: heads.
        qkv_bias, proj_bias: give the projections a bias.
        qk_norm: normalise q and k per head (Dehghani et al. 2023) with `norm_layer`.
        attn_drop, proj_drop: dropout probabilities in training.
        norm_layer: "layer", "rms", or a callable that takes the width; of q_norm and k_norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: str | type[nn.Module] = "layer",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: {num_heads}; accepted: a divisor of dim={dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = make_norm(norm_layer, self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = make_norm(norm_layer, self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self._kinds = kinds_inside(self)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        """x (B, N, dim) -> (B, N, dim).

        attn_mask: additive, broadcastable to (B, num_heads, N, N).
        options: of `fastvit.ops.attention`: key_mask, rope, bias_table, grid, window, shift and the like.
        """
        if not can_bypass(self, self._kinds):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
            return self.proj_drop(self.proj(self._heads(q, k, v, attn_mask, **options)))
        x = self.attend(x, nn.Identity(), attn_mask, **options)
        return self.proj_drop(ops.norm_linear(x, self.proj.weight, self.proj.bias, norm="none"))

    def add_to(
        self,
        residual: Tensor,
        norm: nn.Module,
        layer_scale: Tensor | None = None,
        drop_path: Tensor | None = None,
        attn_mask: Tensor | None = None,
        tokens: int | None = None,
    ) -> Tensor:
        """residual + drop_path * layer_scale * self(norm(residual)): one operator where it says all of it.

        tokens: only the first so many, (B, tokens, dim).
        """
        arguments = norm_arguments(norm, residual.dtype)
        dropping = any(drop.training and drop.p > 0.0 for drop in (self.attn_drop, self.proj_drop))
        normed = not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))
        if arguments is not None and not normed and not dropping and tokens is None:
            return ops.self_attention(
                residual,
                self.qkv.weight,
                self.qkv.bias,
                self.proj.weight,
                self.proj.bias,
                num_heads=self.num_heads,
                scale=self.scale,
                bias=attn_mask,
                layer_scale=layer_scale,
                drop_path=drop_path,
                **arguments,
            )
        x = self.attend(residual, norm, attn_mask, tokens)
        return add_branch(x, self.proj, self.proj_drop, residual[:, :tokens], layer_scale, drop_path)

    def attend(
        self, x: Tensor, norm: nn.Module, attn_mask: Tensor | None = None, tokens: int | None = None, **options: Any
    ) -> Tensor:
        """norm(x) -> qkv -> heads, all but the output projection: (B, N, dim), or the first `tokens` of N."""
        arguments = norm_arguments(norm, x.dtype)
        if arguments is None:
            x, arguments = norm(x), {"norm": "none"}
        q, k, v = project_heads(x, ((self.qkv.weight, self.qkv.bias),), self.num_heads, tokens, **arguments)
        return self._heads(q, k, v, None if attn_mask is None else attn_mask[..., :tokens, :], **options)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor:
        q, k = self.q_norm(q), self.k_norm(k)
        if type(self.attn_drop) is not nn.Dropout or own_listener(self.attn_drop) is not None:
            if options:
                raise ValueError(
                    f"attn_drop: with {', '.join(options)} there are no weights for a hook on it, or for "
                    f"{type(self.attn_drop).__name__}; accepted: nn.Dropout without hooks"
                )
            return self._weighted(q, k, v, attn_mask)
        dropout_p = self.attn_drop.p if self.training else 0.0
        if dropout_p > 0.0 and not options and not q.is_cuda:
            # The operator's reproducible bits cost a CPU more than torch's own.
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=self.scale)
            return out.transpose(1, 2).flatten(2)
        return ops.attention(q, k, v, scale=self.scale, bias=attn_mask, dropout_p=dropout_p, **options)

    def _weighted(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        """The attention of (B, N, heads, head_dim), with weights to see."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        logits = (q * self.scale) @ k.transpose(-2, -1)
        logits = logits if attn_mask is None else logits + attn_mask
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
        # As in the operator, a query whose keys are all masked gets zeros.
        weights = weights.masked_fill(logits.isneginf().all(-1, keepdim=True), 0.0)
        return (self.attn_drop(weights) @ v).transpose(1, 2).flatten(2)


class AttentionPool(nn.Module):
    """Attention pooling: a learned query attends to all tokens, then an MLP (Zhai et al. 2023, SigLIP).

    Keys as timm's AttentionPoolLatent: `latent`, `q`, `kv`, `proj`, `norm`, `mlp`.

    Args:
        in_features: channels, a multiple of num_heads.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over in_features.
        qkv_bias: give q and kv a bias.
        act_layer: activation of the MLP.
        norm_eps: epsilon of the LayerNorm before the MLP.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        act_layer: str | type[nn.Module] = "gelu",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads < 1 or in_features % num_heads:
            raise ValueError(f"num_heads: {num_heads}; accepted: a divisor of in_features={in_features}")
        self.num_heads = num_heads
        self.head_dim = in_features // num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, in_features))
        self.q = nn.Linear(in_features, in_features, bias=qkv_bias)
        self.kv = nn.Linear(in_features, 2 * in_features, bias=qkv_bias)
        self.proj = nn.Linear(in_features, in_features)
        self.norm = nn.LayerNorm(in_features, eps=norm_eps)
        self.mlp = MLP(in_features, int(in_features * mlp_ratio), act_layer=act_layer)
        nn.init.trunc_normal_(self.latent, std=in_features**-0.5)
        self._kinds = kinds_inside(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, in_features) -> (B, in_features)."""
        if not can_bypass(self, self._kinds):
            x = self.proj(self._heads(self.q(self.latent), self.kv(x)))
            return (x + self.mlp(self.norm(x)))[:, 0]
        q = ops.norm_linear(self.latent, self.q.weight, self.q.bias, norm="none")
        kv = ops.norm_linear(x, self.kv.weight, self.kv.bias, norm="none")
        x = ops.norm_linear(self._heads(q, kv), self.proj.weight, self.proj.bias, norm="none")
        return self.mlp.add_to(x, self.norm)[:, 0]

    def _heads(self, q: Tensor, kv: Tensor) -> Tensor:
        q = q.expand(kv.shape[0], -1, -1).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = kv.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        return ops.attention(q, k, v)
