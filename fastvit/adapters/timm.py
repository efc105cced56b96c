"""timm's `vision_transformer.Block`: ViT, DeiT, DeiT-3, CLIP, SigLIP, DINOv2 and everything built from it."""

from __future__ import annotations

from torch import nn

from fastvit.adapters.parts import BlockParts, NotServed, check_children, linear

LIBRARY = "timm"


def matches(block: nn.Module) -> bool:
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    return hasattr(attn, "qkv") and hasattr(attn, "proj") and hasattr(mlp, "fc1") and hasattr(block, "norm2")


def read(block: nn.Module) -> BlockParts:
    attn, mlp = block.attn, block.mlp
    check_children(block, {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"})
    check_children(attn, {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"}, "attention")
    check_children(mlp, {"fc1", "act", "drop1", "fc2", "drop2"}, "MLP")
    if not isinstance(getattr(attn, "qkv", None), nn.Linear) or not isinstance(getattr(attn, "num_heads", None), int):
        raise NotServed("attention has no packed qkv linear")
    ls1, ls2 = getattr(block, "ls1", None), getattr(block, "ls2", None)
    weight, bias = linear(attn.qkv, "attn.qkv")
    drops = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
    q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    drop_path1, drop_path2 = getattr(block, "drop_path1", None), getattr(block, "drop_path2", None)
    skipped = (
        block.norm1, attn, attn.qkv, attn.attn_drop, attn.proj, attn.proj_drop, ls1, drop_path1,
        block.norm2, mlp, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, ls2, drop_path2,
    )  # fmt: skip
    return BlockParts(
        norm1=block.norm1,
        qkv=((weight, bias),),
        num_heads=attn.num_heads,
        scale=attn.scale,
        q_norm=None if isinstance(q_norm, nn.Identity) else q_norm,
        k_norm=None if isinstance(k_norm, nn.Identity) else k_norm,
        proj=linear(attn.proj, "attn.proj"),
        layer_scale1=getattr(ls1, "gamma", None),
        drop_path1=drop_path1,
        norm2=block.norm2,
        fc1=(linear(mlp.fc1, "mlp.fc1"),),
        # GluMlp chunks fc1's output; its gate comes first in SwiGLUPacked.
        activation="swiglu" if getattr(mlp, "gate_last", None) is False and type(mlp.act) is nn.SiLU else mlp.act,
        fc2=linear(mlp.fc2, "mlp.fc2"),
        layer_scale2=getattr(ls2, "gamma", None),
        drop_path2=drop_path2,
        dropouts=tuple(d.p for d in drops if isinstance(d, nn.Dropout)),
        bypassed=tuple(m for m in skipped if m is not None),
    )
