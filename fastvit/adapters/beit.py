"""timm's `beit.Block` (BEiT, BEiT v2), whose scores have a bias for each pair of positions (Bao et al. 2021)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.adapters.eva import read_qkv
from fastvit.adapters.parts import BlockParts, check_contents, check_linear, child
from fastvit.adapters.timm import check_mlp
from fastvit.adapters.timm import read as read_plain

LIBRARY = "beit"

ROPE = None

CLASSIFIERS: set[tuple[str, str]] = set()

_TABLES = {"relative_position_bias_table", "relative_position_index"}


def matches(block: nn.Module) -> bool:
    attn = child(block, "attn")
    return hasattr(attn, "_get_rel_pos_bias") and child(attn, "qkv") is not None and child(block, "mlp") is not None


def check(block: Any) -> None:
    attn = block.attn
    check_contents(
        block, {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}, "block", {"gamma_1", "gamma_2"}
    )
    inside = {"qkv", "attn_drop", "proj", "proj_drop"}
    check_contents(attn, inside, "attention", {"q_bias", "k_bias", "v_bias", *_TABLES})
    check_linear(attn.qkv, "attn.qkv")
    check_linear(attn.proj, "attn.proj")
    check_mlp(block.mlp)


def read(block: nn.Module) -> BlockParts:
    attn: Any = child(block, "attn")
    qkv, biases = read_qkv(attn)
    return read_plain(block)._replace(
        qkv=qkv,
        layer_scale1=getattr(block, "gamma_1", None),
        layer_scale2=getattr(block, "gamma_2", None),
        copied=biases,
        bias=None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias(),
    )
