"""Building, counting and randomizing the models that are measured."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fastvit.bench import UsageError
from fastvit.bench.models import build, count_flops, randomize


def vit_flops(dim: int, depth: int, patch: int, size: int, classes: int) -> int:
    """2 per multiply-add of a ViT with a class token and an MLP four times as wide."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    block = 12 * tokens * dim * dim + 2 * tokens * tokens * dim
    return 2 * (patches * 3 * patch * patch * dim + depth * block + dim * classes)


def test_count_flops_of_timm():
    pytest.importorskip("timm")
    model, size = build("vit_tiny_patch16_224", image_size=64)
    assert size == (3, 64, 64)
    assert count_flops(model, torch.zeros(1, *size)) == vit_flops(192, 12, 16, 64, 1000)


def test_count_flops_of_torchvision_sees_through_the_fused_attention():
    pytest.importorskip("torchvision")
    model, size = build("vit_b_32", image_size=32)
    with torch.inference_mode(False), torch.no_grad():
        assert count_flops(model, torch.zeros(1, *size)) == vit_flops(768, 12, 32, 32, 1000)


def test_the_image_tower_of_open_clip():
    pytest.importorskip("open_clip")
    model, size = build("ViT-B-32-quickgelu", image_size=64)
    assert size == (3, 64, 64)
    assert type(model).__name__ == "VisionTransformer" and not hasattr(model, "token_embedding")
    assert type(model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    with torch.inference_mode(False), torch.no_grad():
        assert count_flops(model, torch.zeros(1, *size)) == vit_flops(768, 12, 32, 64, 512)


def test_count_flops_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 128, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, size = build(str(tmp_path))
    pooler = 2 * 32 * 32
    assert count_flops(model, torch.zeros(1, *size)) == vit_flops(32, 2, 8, 32, 0) + pooler


def test_randomize_leaves_nothing_nice():
    block = nn.Module()
    block.norm, block.fc = nn.LayerNorm(64), nn.Linear(64, 64)
    block.gamma, block.cls_token = nn.Parameter(torch.full((64,), 1e-5)), nn.Parameter(torch.zeros(1, 1, 64))
    randomize(block)
    for p in block.parameters():
        assert p.std() > 0.05
    assert abs(block.norm.weight.mean() - 1) < 0.2
    assert 0.5 < block.fc(torch.randn(100, 64)).std() < 2.0
    again = nn.Linear(64, 64)
    assert torch.equal(randomize(again, seed=3).weight, randomize(again, seed=3).weight)


@pytest.mark.parametrize(
    ("name", "library", "message"),
    [
        ("vit_smal_patch16_224", "timm", "close: vit_small_patch16_224"),
        ("ViTModl", "auto", "close: ViTModel"),
        ("AutoModel", "auto", "no single model"),
        ("google/vit-base-patch16-224", "auto", "nothing is downloaded"),
        ("vit_b_17", "auto", "close: vit_b_16"),
        ("ViT-B-31", "auto", "open_clip has no model 'ViT-B-31'; close: ViT-B-32"),
    ],
)
def test_a_wrong_name_is_told(name, library, message):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match=message):
        build(name, library)


def test_a_broken_config_is_told(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(UsageError, match="no transformers config"):
        build(str(tmp_path / "config.json"))
