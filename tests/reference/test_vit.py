"""The reference ViT against timm's and torchvision's with the same weights, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastvit.models.checkpoints import _to_timm
from fastvit.reference import VisionTransformer, interpolate_pos_embed
from tests import nasty
from tests.tolerances import relative_l2

timm = pytest.importorskip("timm")
TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}


def images(*size, channels=3):
    return torch.randn(2, channels, *size, generator=nasty.generator(), dtype=torch.float64)


@pytest.mark.parametrize(
    ("img_size", "patch_size", "in_chans"), [(32, 8, 3), ((32, 48), 8, 3), (30, 5, 3), (28, 14, 12), (64, 32, 1)]
)
def test_equals_timm(img_size, patch_size, in_chans):
    options = {**TINY, "img_size": img_size, "patch_size": patch_size, "in_chans": in_chans}
    theirs = nasty.randomize(timm.models.VisionTransformer(**options)).double().eval()
    ours = VisionTransformer(**options).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(*((img_size, img_size) if isinstance(img_size, int) else img_size), channels=in_chans)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) < 1e-6
        assert relative_l2(ours.forward_features(x), theirs.forward_features(x)) < 1e-6


VARIATIONS = [
    {"global_pool": "avg"},
    {"global_pool": "map", "class_token": False},
    {"global_pool": "", "num_classes": 0},
    {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
    {"reg_tokens": 3, "img_size": (32, 48)},
    {"pre_norm": True, "qkv_bias": False},
    {"drop_path_rate": 0.3},
]


@pytest.mark.parametrize("options", VARIATIONS, ids=str)
def test_variations_equal_timm(options):
    options = {**TINY, "img_size": 32, "patch_size": 8, **options}
    theirs = nasty.randomize(timm.models.VisionTransformer(**options)).double().eval()
    ours = VisionTransformer(**options).double().eval()
    ours.load_state_dict(theirs.state_dict())
    size = options["img_size"]
    x = images(*((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize(
    ("act_layer", "module"),
    [("gelu_tanh", partial(torch.nn.GELU, approximate="tanh")), ("quick_gelu", timm.layers.QuickGELU)],
)
def test_activations_and_epsilon_equal_timm(act_layer, module):
    options = {**TINY, "img_size": 32, "patch_size": 8, "global_pool": "map", "class_token": False}
    norm = partial(torch.nn.LayerNorm, eps=1e-2)
    theirs = timm.models.VisionTransformer(**options, act_layer=module, norm_layer=norm)
    theirs = nasty.randomize(theirs).double().eval()
    ours = VisionTransformer(**options, act_layer=act_layer, norm_eps=1e-2).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(32, 32)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) < 1e-6


def test_drop_path_drops_whole_branches_in_training_only():
    block = VisionTransformer(32, 8, **TINY, drop_path_rate=0.5).blocks[-1]
    kept = []
    x = torch.randn(200, 3, 64)
    branch = block.drop_path1.train()(x)
    for before, after in zip(x, branch, strict=True):
        kept.append(bool(after.any()))
        assert torch.allclose(after, 2 * before if kept[-1] else torch.zeros_like(before))
    assert 50 < sum(kept) < 150
    assert torch.equal(block.drop_path1.eval()(x), x)


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (16, 24)])
def test_interpolates_positions_as_timm_does(size):
    theirs = timm.models.VisionTransformer(**TINY, img_size=32, patch_size=8, dynamic_img_size=True)
    theirs = nasty.randomize(theirs).double().eval()
    ours = VisionTransformer(**TINY, img_size=32, patch_size=8).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(*size)
    with torch.no_grad():
        # timm interpolates in float32.
        assert relative_l2(ours(x), theirs(x)) < 1e-6


def test_equals_torchvision():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 256, num_classes=7)
    theirs = nasty.randomize(theirs).double().eval()
    ours = VisionTransformer(**TINY, img_size=32, patch_size=8).double().eval()
    ours.load_state_dict(_to_timm(dict(theirs.state_dict()), "test")[1])
    x = images(32, 32)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) < 1e-6


def test_no_head_returns_the_class_token():
    model = VisionTransformer(32, 8, **{**TINY, "num_classes": 0}).eval()
    x = images(32, 32).float()
    with torch.no_grad():
        assert torch.equal(model(x), model.forward_features(x)[:, 0])


def test_interpolation_keeps_a_constant():
    positions = torch.ones(1, 12, 5)
    assert torch.allclose(interpolate_pos_embed(positions, (3, 4), (7, 2)), torch.ones(1, 14, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 33, "patch_size": 8}, "img_size"),
        ({"num_heads": 5}, "num_heads: 5"),
        ({"global_pool": "max"}, "global_pool: 'max'"),
        ({"class_token": False}, "class token"),
        ({"act_layer": "tanh"}, "act_layer: 'tanh'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**TINY, **options})


@pytest.mark.parametrize("shape", [(1, 3, 33, 32), (1, 3, 0, 32), (3, 32, 32)])
def test_bad_image(shape):
    with pytest.raises(ValueError, match="image: shape"):
        VisionTransformer(**TINY, img_size=32, patch_size=8)(torch.zeros(shape))
