"""A small ViT trained by fastvit itself on scikit-learn's digits, and what int8 costs it in accuracy."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit

EPOCHS, BATCH = 30, 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, labels) to train on, the same to test on: 1,797 images of 8 x 8, two thirds and one."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1198], order[1198:]
    labels = torch.tensor(labels)
    return images[train], labels[train], images[test], labels[test]


def train(model: fastvit.FastViT, images: Tensor, labels: Tensor) -> fastvit.FastViT:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # So narrow a model learns slowly from the usual 0.02.
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.pos_embed, std=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([model(part.to(dtype)).argmax(-1) for part in images.split(256)])


@pytest.fixture
def one_thread():
    """Steps this small spend more time on waking threads than on arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_int8_keeps_the_accuracy(one_thread):
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(0)
    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 3, "num_heads": 3}
    size |= {"global_pool": "avg", "num_classes": 10}
    model = fastvit.create_model("vit_tiny_patch16_224", **size)
    fastvit.optimize(model, strict=True)
    train(model, images, labels)
    assert all(row.status == "fused" for row in fastvit.report(model).rows)

    expected = predict(model, test_images)
    accuracy = (expected == test_labels).float().mean().item()
    assert accuracy > 0.95
    for dtype in (torch.float32, torch.bfloat16):
        low = fastvit.optimize(copy.deepcopy(model), dtype=dtype, quantize="int8")
        assert "self_attention (int8 qkv, proj), mlp (int8 fc1, fc2)" in str(fastvit.report(low))
        actual = predict(low, test_images, dtype)
        lost = accuracy - (actual == test_labels).float().mean().item()
        agreeing = (actual == expected).float().mean().item()
        print(f"float32 {accuracy:.2%}; int8 in {dtype}: {lost * 100:+.2f} points lost, {agreeing:.2%} agree")
        assert lost <= 0.003
        assert agreeing >= 0.995
