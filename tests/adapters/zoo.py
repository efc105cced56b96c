"""Small models of every supported library and family, with weights that hide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastvit
from fastvit._compat import import_library
from fastvit.adapters.compare import tensors
from tests import nasty

HF = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 136,
    "image_size": 32,
    "patch_size": 8,
}
EVA = {"img_size": 32, "embed_dim": 64, "num_heads": 2}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 64}


def timm(**options: Any) -> Callable[[], nn.Module]:
    return lambda: import_library("timm").models.VisionTransformer(**{**TIMM, **options})


def timm_named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: import_library("timm").create_model(name, depth=2, **options)


def hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers: Any = import_library("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**{**HF, **options}))

    return make


def torchvision() -> nn.Module:
    return import_library("torchvision").models.VisionTransformer(32, 8, 2, 2, 64, 136, num_classes=64)


def open_clip(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformer = import_library("open_clip.transformer")
        return transformer.VisionTransformer(32, 8, 64, 2, 2, 2.125, output_dim=64, **options)

    return make


def open_clip_norms() -> nn.Module:
    inside = {"qk_norm": True, "scale_attn_inner": True, "scale_fc": True}
    return open_clip(**inside, act_layer=import_library("open_clip.transformer").QuickGELU)()


def swiglu() -> dict[str, Any]:
    layers = import_library("timm.layers")
    return {"mlp_layer": layers.SwiGLUPacked, "mlp_ratio": 5.3125, "act_layer": nn.SiLU, "init_values": 0.1}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm vit": timm(),
    "timm vit layer scale": timm(init_values=0.1, no_embed_class=True),
    "timm vit registers": timm(init_values=0.1, reg_tokens=4),
    "timm vit qk norm": timm(qk_norm=True, qkv_bias=False),
    "timm vit swiglu": lambda: timm(**swiglu())(),
    "timm vit unpacked swiglu": lambda: timm(**{**swiglu(), "mlp_layer": import_library("timm.layers").SwiGLU})(),
    "timm inner norms": timm(scale_attn_norm=True, scale_mlp_norm=True),
    "timm rms norm": lambda: timm(norm_layer=import_library("timm.layers").RmsNorm)(),
    "timm rms norm fp32": lambda: timm(norm_layer=import_library("timm.layers").RmsNormFp32, qk_norm=True)(),
    "timm clip": timm(pre_norm=True, act_layer="quick_gelu"),
    "timm siglip": timm(class_token=False, global_pool="map", act_layer="gelu_tanh"),
    "timm head dim 72": timm(embed_dim=144, mlp_ratio=3.7362),
    "timm dynamic size": timm(dynamic_img_size=True),
    "timm 12 channels": timm(in_chans=12),
    "timm deit distilled": timm_named("deit_tiny_distilled_patch16_224", img_size=32),
    "timm deit3": timm_named("deit3_small_patch16_224", img_size=32, embed_dim=96, num_heads=3),
    "timm dinov2": timm_named("vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=96, num_heads=3),
    "timm dinov3": timm_named("vit_small_patch16_dinov3", patch_size=8, **EVA),
    "timm dinov3 biases": timm_named("vit_small_patch16_dinov3_qkvb", patch_size=8, **EVA),
    "timm dinov3 swiglu": timm_named("vit_small_plus_patch16_dinov3", patch_size=8, **EVA),
    "timm eva02": timm_named("eva02_tiny_patch14_224", patch_size=8, **EVA),
    "timm eva02 inner norms": timm_named("eva02_base_patch14_224", patch_size=8, scale_attn_inner=True, **EVA),
    "timm beit": timm_named("beit_base_patch16_224", patch_size=8, **EVA),
    "timm beit inner norm": timm_named("beitv2_base_patch16_224", patch_size=8, swiglu_mlp=True, scale_mlp=True, **EVA),
    "timm sapiens2": timm_named("vit_base_patch16_sapiens2", patch_size=8, num_kv_heads=2, **EVA),
    "timm qwen3": timm_named("qwen3_vit_88m", patch_size=8, num_classes=64, **EVA),
    "timm deepseek": timm_named("deepseek_vit_412m", patch_size=8, num_classes=64, **EVA),
    "timm rope": timm_named("vit_small_patch16_rope_224", patch_size=8, **EVA),
    "timm rope qk norm": timm_named("vit_small_patch16_rope_224", patch_size=8, qk_norm=True, **EVA),
    "hf vit": hf("ViTModel", "ViTConfig"),
    "hf vit classifier": hf("ViTForImageClassification", "ViTConfig", num_labels=64),
    "hf vit no qkv bias": hf("ViTModel", "ViTConfig", qkv_bias=False),
    "hf vit tanh gelu eager": hf("ViTModel", "ViTConfig", hidden_act="gelu_new", attn_implementation="eager"),
    "hf vit fast gelu": hf("ViTModel", "ViTConfig", hidden_act="gelu_fast"),
    "hf deit": hf("DeiTModel", "DeiTConfig"),
    "hf deit teacher": hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=64),
    "hf clip": hf("CLIPVisionModel", "CLIPVisionConfig"),
    "hf clip gelu": hf("CLIPVisionModel", "CLIPVisionConfig", hidden_act="gelu"),
    "hf siglip": hf("SiglipVisionModel", "SiglipVisionConfig"),
    "hf siglip head dim 72": hf("SiglipVisionModel", "SiglipVisionConfig", hidden_size=144, intermediate_size=538),
    "hf dinov2": hf("Dinov2Model", "Dinov2Config"),
    "hf dinov2 swiglu": hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
    "hf dinov2 registers": hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "hf dinov2 registers classifier": hf(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", use_swiglu_ffn=True, num_labels=64
    ),
    "hf dinov3": hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, pos_embed_rescale=None),
    "hf dinov3 gated": hf("DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, hidden_act="silu", key_bias=True),
    "hf blip": hf("BlipVisionModel", "BlipVisionConfig"),
    "hf blip 2": hf("Blip2VisionModel", "Blip2VisionConfig"),
    "hf aimv2": hf("Aimv2VisionModel", "Aimv2VisionConfig"),
    "hf internvl": hf("InternVLVisionModel", "InternVLVisionConfig", image_size=(32, 32), patch_size=(8, 8)),
    "hf internvl rms norm": hf(
        "InternVLVisionModel", "InternVLVisionConfig", image_size=(32, 32), patch_size=(8, 8), norm_type="rms_norm"
    ),
    "torchvision vit": torchvision,
    "open_clip clip": open_clip(),
    "open_clip layer scale": open_clip(ls_init_value=0.1, pool_type="avg", no_ln_pre=True, final_ln_after_pool=True),
    "open_clip coca": open_clip(attentional_pool=True, attn_pooler_queries=7, attn_pooler_heads=2, output_tokens=True),
    "open_clip inner norms": open_clip_norms,
}

ONE_OF_EACH = [
    "timm vit", "timm dinov3 biases", "hf vit", "hf clip", "hf dinov2", "hf dinov3", "torchvision vit",
    "open_clip clip", "timm beit",
]  # fmt: skip


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nasty.randomize(MODELS[name]()).eval()


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    """A random image of the size that the model's patch convolution and positions were made for."""
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    side = 28 if conv.kernel_size[0] == 14 else 32
    return torch.randn(batch, conv.in_channels, side, side, generator=nasty.generator())


def run(model: Any, x: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the output, by name."""
    with torch.no_grad():
        return tensors(model(x, **kwargs))


def reasons(model: nn.Module) -> dict[str, str]:
    """Why blocks run their original forward, by path."""
    return {r.path: r.detail for r in fastvit.report(model).rows if r.status == "fallback"}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Are two outputs the same, bit by bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
