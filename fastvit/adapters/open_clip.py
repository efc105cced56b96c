"""open_clip's `transformer.ResidualAttentionBlock` and `CustomResidualAttentionBlock`.

The attention of the first is nn.MultiheadAttention, as in the original CLIP code; that of the second may have norms
inside.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.adapters.parts import (
    BlockParts,
    Dropout,
    Readout,
    check_contents,
    check_layer_scale,
    check_linear,
    check_multihead_attention,
    child,
    dropout,
    inner_norm,
    layer_scale,
    linear,
    tensor,
)

LIBRARY = "open_clip"

ROPE = None

CLASSIFIERS = {("open_clip.transformer", "VisionTransformer")}


def matches(block: nn.Module) -> bool:
    return hasattr(child(block, "attn"), "in_proj_weight") and child(child(block, "mlp"), "c_proj") is not None


def check(block: Any) -> None:
    attn, mlp = block.attn, block.mlp
    check_contents(block, {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}, "block")
    if isinstance(attn, nn.MultiheadAttention):
        check_multihead_attention(attn, "attn")
    else:
        inside = {"ln_q", "ln_k", "attn_drop", "ln_inner", "out_proj", "out_drop"}
        check_contents(attn, inside, "attention", {"in_proj_weight", "in_proj_bias"})
        check_linear(attn.out_proj, "attn.out_proj")
    check_layer_scale(getattr(block, "ls_1", None), "gamma")
    check_layer_scale(getattr(block, "ls_2", None), "gamma")
    check_contents(mlp, {"c_fc", "gelu", "ln", "c_proj"}, "MLP")
    check_linear(mlp.c_fc, "mlp.c_fc")
    check_linear(mlp.c_proj, "mlp.c_proj")


def read(block: nn.Module) -> BlockParts:
    attn, mlp = child(block, "attn"), child(block, "mlp")
    drops: tuple[Dropout, ...]
    if isinstance(attn, nn.MultiheadAttention):
        drops = ((attn.dropout, attn),)
    else:
        drops = (dropout(child(attn, "attn_drop")), dropout(child(attn, "out_drop")))
    return BlockParts(
        norm1=child(block, "ln_1"),
        qkv=((tensor(attn, "in_proj_weight"), tensor(attn, "in_proj_bias")),),
        num_heads=attn.num_heads,
        scale=attn.head_dim**-0.5,
        q_norm=inner_norm(attn, "ln_q"),
        k_norm=inner_norm(attn, "ln_k"),
        proj=linear(child(attn, "out_proj")),
        layer_scale1=layer_scale(child(block, "ls_1"), "gamma"),
        drop_path1=None,
        norm2=child(block, "ln_2"),
        fc1=(linear(child(mlp, "c_fc")),),
        activation=child(mlp, "gelu"),
        fc2=linear(child(mlp, "c_proj")),
        layer_scale2=layer_scale(child(block, "ls_2"), "gamma"),
        drop_path2=None,
        dropouts=drops,
        proj_norm=inner_norm(attn, "ln_inner"),
        fc2_norm=inner_norm(mlp, "ln"),
    )


def readout(model: Any) -> Readout | None:
    transformer = model.transformer
    if model.pool_type != "tok" or model.attn_pool is not None or model.output_tokens or not transformer.batch_first:
        return None
    return Readout(transformer.resblocks, 1, (model, transformer, transformer.resblocks), (model.ln_post,))
