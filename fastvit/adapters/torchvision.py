"""torchvision's `vision_transformer.EncoderBlock` (vit_b_16 ...), whose attention is nn.MultiheadAttention."""

from __future__ import annotations

from torch import nn

from fastvit.adapters.parts import BlockParts, NotServed, check_children, linear

LIBRARY = "torchvision"


def matches(block: nn.Module) -> bool:
    return isinstance(getattr(block, "self_attention", None), nn.MultiheadAttention) and hasattr(block, "ln_2")


def read(block: nn.Module) -> BlockParts:
    attn, mlp = block.self_attention, block.mlp
    check_children(block, {"ln_1", "self_attention", "dropout", "ln_2", "mlp"})
    if type(attn) is not nn.MultiheadAttention:
        raise NotServed(f"self_attention is {type(attn).__name__}")
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
        raise NotServed("self_attention has split projections, bias_k, add_zero_attn or batch_first=False")
    layers = list(mlp)
    if [type(m) for m in layers if not isinstance(m, nn.Dropout)] != [nn.Linear, nn.GELU, nn.Linear]:
        raise NotServed("MLP is not Linear, GELU, Linear")
    fc1, act, fc2 = (m for m in layers if not isinstance(m, nn.Dropout))
    drops = [block.dropout, *(m for m in layers if isinstance(m, nn.Dropout))]
    return BlockParts(
        norm1=block.ln_1,
        qkv=((attn.in_proj_weight, attn.in_proj_bias),),
        num_heads=attn.num_heads,
        scale=attn.head_dim**-0.5,
        q_norm=None,
        k_norm=None,
        proj=linear(attn.out_proj, "out_proj"),
        layer_scale1=None,
        drop_path1=None,
        norm2=block.ln_2,
        fc1=(linear(fc1, "mlp.0"),),
        activation=act,
        fc2=linear(fc2, "mlp.3"),
        layer_scale2=None,
        drop_path2=None,
        dropouts=(attn.dropout, *(d.p for d in drops)),
        bypassed=(block.ln_1, attn, attn.out_proj, block.ln_2, mlp, *layers, block.dropout),
    )
