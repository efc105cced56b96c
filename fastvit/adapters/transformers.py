"""transformers' encoder layers: ViT, DeiT, CLIP, SigLIP, Dinov2 (with registers), DINOv3, AIMv2, InternVL and BLIP.

As they are in versions 4.57 and 5.

The versions and families differ in names alone, so each name is looked up among the ones that the library has used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from fastvit.adapters.parts import (
    Angles,
    BlockParts,
    Dropout,
    NotServed,
    Readout,
    RopeArgument,
    check_contents,
    check_layer_scale,
    check_linear,
    child,
    dropout,
    layer_scale,
    linear,
)

LIBRARY = "transformers"

CLASSIFIERS = {
    ("transformers.models.vit.modeling_vit", "ViTForImageClassification"),
    ("transformers.models.deit.modeling_deit", "DeiTForImageClassification"),
    ("transformers.models.deit.modeling_deit", "DeiTForImageClassificationWithTeacher"),
}


def _read_angles(position_embeddings: Any) -> Angles:
    if not isinstance(position_embeddings, (tuple, list)) or len(position_embeddings) != 2:
        raise NotServed(f"position_embeddings is {type(position_embeddings).__name__}, not cos and sin")
    cos, sin = position_embeddings
    return cos, sin


ROPE = RopeArgument("position_embeddings", required=True, read=_read_angles, make=lambda angles: angles)

# All of them are softmax(q k^T) v; another name is somebody's own function.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def _setting(module: nn.Module, *names: str) -> Any:
    """The first attribute that is no module and exists, or None."""
    for name in names:
        if (value := module.__dict__.get(name)) is not None:
            return value
    return None


_PROJECTIONS = ("o_proj", "out_proj", "projection_layer", "projection")


class _Layers(NamedTuple):
    """The modules of an encoder layer under whichever names this version gives them."""

    outer: Any  # version 4 nests: attention.attention.query, attention.output.dense
    attn: Any
    qkv: tuple[Any, ...]
    proj: Any
    fc1: tuple[Any, ...]
    activation: Any
    fc2: Any


def _layers(block: nn.Module) -> _Layers:
    outer = child(block, "attention", "self_attn")
    attn = child(outer, "attention") or outer
    if (packed := child(attn, "qkv")) is not None:
        qkv: tuple[Any, ...] = (packed,)
    else:
        qkv = child(attn, "q_proj", "query"), child(attn, "k_proj", "key"), child(attn, "v_proj", "value")
    proj = child(child(outer, "output"), "dense") or child(attn, *_PROJECTIONS)
    fc1: tuple[Any, ...]
    if (mlp := child(block, "mlp", "ffn")) is None:
        # ViT of version 4: intermediate.dense, intermediate.intermediate_act_fn, output.dense.
        inner = child(block, "intermediate")
        fc1, activation, fc2 = (
            (child(inner, "dense"),), child(inner, "intermediate_act_fn"), child(child(block, "output"), "dense")
        )  # fmt: skip
    elif (packed := child(mlp, "weights_in")) is not None:
        fc1, activation, fc2 = (packed,), "swiglu", child(mlp, "weights_out")
    elif (gate := child(mlp, "gate_proj")) is not None:
        fc1, activation, fc2 = (gate, child(mlp, "up_proj")), child(mlp, "act_fn"), child(mlp, "down_proj")
    elif (up := child(mlp, "up_proj")) is not None:
        fc1, activation, fc2 = (up,), child(mlp, "act_fn"), child(mlp, "down_proj")
    else:
        fc1, activation, fc2 = (child(mlp, "fc1"),), child(mlp, "activation_fn", "activation"), child(mlp, "fc2")
    return _Layers(outer, attn, qkv, proj, fc1, activation, fc2)


def _norms(block: nn.Module) -> tuple[Any, Any]:
    return (
        child(block, "layernorm_before", "layer_norm1", "norm1", "rms_norm1"),
        child(block, "layernorm_after", "layer_norm2", "norm2", "rms_norm2"),
    )


def _layer_scale(block: nn.Module, half: int) -> Any:
    name = f"lambda_{half}"  # of the block itself; DataParallel's replicas have it as an attribute
    own = block._parameters.get(name, block.__dict__.get(name))
    return layer_scale(child(block, f"layer_scale{half}"), "lambda1") if own is None else own


def matches(block: nn.Module) -> bool:
    outer = child(block, "attention", "self_attn")
    if outer is None or None in _norms(block):
        return False
    return child(child(outer, "attention") or outer, "q_proj", "query", "qkv") is not None


def check(block: Any) -> None:
    check_contents(
        block,
        {
            "attention", "self_attn", "layernorm_before", "layer_norm1", "norm1", "layernorm_after", "layer_norm2",
            "norm2", "rms_norm1", "rms_norm2", "mlp", "ffn", "intermediate", "output", "dropout", "layer_scale1",
            "layer_scale2", "drop_path",
        },
        "block",
        {"lambda_1", "lambda_2"},
    )  # fmt: skip
    layers = _layers(block)
    if layers.outer is not layers.attn:
        check_contents(layers.outer, {"attention", "output"}, "attention")
        check_contents(layers.outer.output, {"dense", "dropout"}, "attention")
    names = {"q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv", *_PROJECTIONS}
    check_contents(layers.attn, names | {"dropout", "projection_dropout"}, "attention")
    for name, module in zip(("query", "key", "value") if len(layers.qkv) == 3 else ("qkv",), layers.qkv, strict=True):
        check_linear(module, f"{name} projection")
    check_linear(layers.proj, "output projection")
    check_layer_scale(getattr(block, "layer_scale1", None), "lambda1")
    check_layer_scale(getattr(block, "layer_scale2", None), "lambda1")

    if (mlp := child(block, "mlp", "ffn")) is None:
        check_contents(block.intermediate, {"dense", "intermediate_act_fn"}, "MLP")
        check_contents(block.output, {"dense", "dropout"}, "MLP")
    else:
        names = {"weights_in", "weights_out", "gate_proj", "up_proj", "down_proj", "act_fn"}
        check_contents(mlp, names | {"fc1", "activation", "activation_fn", "fc2"}, "MLP")
    for module in (*layers.fc1, layers.fc2):
        check_linear(module, "MLP projection")


def read(block: nn.Module) -> BlockParts:
    outer, attn, qkv, proj, fc1, activation, fc2 = _layers(block)
    if _setting(attn, "is_causal"):
        raise NotServed("attention is causal")
    config = _setting(attn, "config")
    implementation = getattr(config, "_attn_implementation", None)
    if implementation is not None and implementation not in _ATTENTIONS:
        raise NotServed(f"attention implementation is {implementation!r}")
    if getattr(config, "output_attentions", False):
        raise NotServed("config.output_attentions is set")
    norm1, norm2 = _norms(block)
    drop_path = child(block, "drop_path")
    drops: list[Dropout] = [(_setting(attn, "dropout_prob", "attention_dropout", "dropout") or 0.0, attn)]
    for parent in (block, child(outer, "output"), child(block, "output"), attn):
        if (module := child(parent, "dropout", "projection_dropout")) is not None:
            drops.append(dropout(module))
    return BlockParts(
        norm1=norm1,
        qkv=tuple(map(linear, qkv)),
        num_heads=_setting(attn, "num_attention_heads", "num_heads"),
        scale=_setting(attn, "scaling", "scale"),
        q_norm=None,
        k_norm=None,
        proj=linear(proj),
        layer_scale1=_layer_scale(block, 1),
        drop_path1=drop_path,
        norm2=norm2,
        fc1=tuple(map(linear, fc1)),
        activation=activation,
        fc2=linear(fc2),
        layer_scale2=_layer_scale(block, 2),
        drop_path2=drop_path,
        dropouts=tuple(drops),
        config=config,
    )


def readout(model: Any) -> Readout | None:
    base = child(model, "vit", "deit")
    if base.pooler is not None or model.config.output_hidden_states:
        return None
    encoder = child(base, "encoder")  # version 4
    layers = base.layers if encoder is None else encoder.layer
    route = (model, base) if encoder is None else (model, base, encoder)
    return Readout(layers, 2 if hasattr(model, "distillation_classifier") else 1, route, (base.layernorm,))
