"""create_model, list_models and FastViT itself."""

from __future__ import annotations

import pytest
import torch

import fastvit
from fastvit.models import configs
from fastvit.reference import VisionTransformer
from tests import nasty
from tests.tolerances import assert_close, relative_l2

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7, "img_size": 32}


@pytest.mark.parametrize("name", fastvit.list_models())
def test_parameters_as_timm_has_them(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = fastvit.create_model(name).state_dict()
        theirs = timm.create_model(name, num_classes=configs.arguments(name).get("num_classes", 1000)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "token", "fc_norm": True},
        {"global_pool": "map", "class_token": False},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
        {"reg_tokens": 4, "global_pool": "avg"},
        {"pre_norm": True},
        {"qk_norm": True},
        {"num_classes": 0},
        {"global_pool": "", "num_classes": 0},
        {"img_size": (32, 48), "in_chans": 12},
        {"img_size": 36},
    ],
    ids=str,
)
def test_equals_timm(options):
    timm = pytest.importorskip("timm")
    options = {**TINY, "patch_size": 8, **options}
    theirs = nasty.randomize(timm.models.VisionTransformer(**options)).eval()
    ours = fastvit.FastViT(**options).eval()
    ours.load_state_dict(theirs.state_dict())
    size = options["img_size"] if isinstance(options["img_size"], tuple) else (options["img_size"],) * 2
    x = torch.randn(2, options.get("in_chans", 3), *size)
    with torch.no_grad():
        eager = theirs(x)
        assert_close(ours(x), theirs.double()(x.double()), eager=eager)


HEADS = (
    {},
    {"global_pool": "avg"},
    {"global_pool": "avg", "fc_norm": False},
    {"global_pool": "map", "class_token": False},
    {"num_classes": 0},
)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_hook_on_any_module_fires(options, optimized):
    model = nasty.randomize(fastvit.FastViT(**{**TINY, "patch_size": 8, "pre_norm": True, **options})).eval()
    model = fastvit.optimize(model) if optimized else model
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for name, module in list(model.named_modules())[1:]:
            calls = []
            handle = module.register_forward_hook(lambda *a, calls=calls: calls.append(1))
            assert_close(model(x), expected.double())
            handle.remove()
            assert calls == [1], name
        assert torch.equal(model(x), expected)


def _listen(model):
    model.blocks[-1].register_forward_hook(lambda module, args, out: None)


def _listen_to_the_blocks(model):
    model.blocks.register_forward_hook(lambda module, args, out: None)


def _subclass(model):
    model.blocks[-1].__class__ = type("Own", (fastvit.nn.Block,), {})


ALL, READ = [17, 17], [17, 1]


@pytest.mark.parametrize(
    ("tokens", "options", "change", "grad"),
    [
        (READ, {}, lambda model: None, False),
        (READ, {"reg_tokens": 4, "no_embed_class": True, "qk_norm": True}, lambda model: None, False),
        (ALL, {}, lambda model: None, True),
        (ALL, {}, lambda model: model.train(), False),
        (ALL, {}, _listen, False),
        (ALL, {}, _listen_to_the_blocks, False),
        (ALL, {}, _subclass, False),
        (ALL, {"global_pool": "avg"}, lambda model: None, False),
        ([], {"depth": 0}, lambda model: None, False),
    ],
)
def test_the_last_block_computes_what_the_head_reads(monkeypatch, tokens, options, change, grad):
    model = nasty.randomize(fastvit.FastViT(**{**TINY, "patch_size": 8, **options})).eval()
    change(model)
    x, computed, forward = torch.randn(2, 3, 32, 32), [], fastvit.nn.Block.forward

    def counted(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        computed.append(out.shape[1] - options.get("reg_tokens", 0) * (out.shape[1] > 1))
        return out

    expected = model.forward_head(model.forward_features(x))
    monkeypatch.setattr(fastvit.nn.Block, "forward", counted)
    with torch.set_grad_enabled(grad):
        assert_close(model(x), expected.double())
    assert computed == tokens


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_new_head_and_a_new_norm_are_called(options):
    model = nasty.randomize(fastvit.FastViT(**{**TINY, "patch_size": 8, **options})).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        model.head = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(64, 3))
        assert_close(model(x), model.head(features).double())
        model.norm = model.fc_norm = torch.nn.Softmax(-1)
        assert_close(model(x), model.forward_head(model.forward_features(x)).double())


def test_equals_the_reference_at_another_resolution():
    options = {**TINY, "patch_size": 8}
    reference = nasty.randomize(VisionTransformer(**options)).eval()
    ours = fastvit.FastViT(**options).eval()
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 48, 24)
    with torch.no_grad():
        assert_close(ours(x), reference.double()(x.double()))


def test_uint8_images_are_normalised_on_the_way_in():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    model = nasty.randomize(fastvit.FastViT(**TINY, patch_size=8, mean=mean, std=std)).eval()
    plain = fastvit.FastViT(**TINY, patch_size=8).eval()
    plain.load_state_dict(model.state_dict())
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = (image.double() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    with torch.no_grad():
        assert relative_l2(model(image), plain.double()(normalised)) < 1e-5


def test_images_as_decoders_write_them():
    model = nasty.randomize(fastvit.FastViT(**TINY, patch_size=8, mean=[0.5] * 3, std=[0.2] * 3)).eval()
    decoded = fastvit.FastViT(**TINY, patch_size=8, mean=[0.5] * 3, std=[0.2] * 3, layout="NHWC").eval()
    decoded.load_state_dict(model.state_dict())
    image = torch.randint(0, 256, (2, 3, 40, 24), dtype=torch.uint8)
    with torch.no_grad():
        assert relative_l2(decoded(image.permute(0, 2, 3, 1).contiguous()), model(image)) < 1e-6


def test_trains():
    torch.manual_seed(0)
    model = fastvit.FastViT(**TINY, patch_size=8, drop_path_rate=0.1)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 7
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("NCHW", (1, 32, 32, 3), "accepted: 3, or layout='NHWC'"),
        ("NHWC", (1, 3, 32, 32), "accepted: 3, or layout='NCHW'"),
        ("NCHW", (1, 3, 8, 32), "image: 8 x 32 is no multiple of the patch"),
        ("NHWC", (1, 32, 8, 3), "image: 32 x 8 is no multiple of the patch"),
        ("NCHW", (3, 32, 32), r"accepted: \(B, C, H, W\)"),
    ],
)
def test_images_that_do_not_fit(layout, shape, message):
    model = fastvit.FastViT(**TINY, layout=layout)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


def test_any_patch_and_size_can_be_named():
    assert configs.arguments("vit_base_patch16_192")["img_size"] == 192
    assert configs.arguments("vit_small_patch7_70")["patch_size"] == 7
    assert fastvit.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).head.out_features == 3


def test_list_models_filters():
    names = fastvit.list_models("*dinov2*")
    assert names == sorted(names)
    assert len(names) == 8
    assert set(names) <= set(fastvit.list_models())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fastvit.create_model("vit_bse_patch16_224"), ValueError, "close: vit_base_patch16_224"),
        (lambda: fastvit.create_model("resnet50"), ValueError, "resnet50"),
        (lambda: fastvit.create_model("vit_base_patch300_224"), ValueError, "patch of 300"),
        (lambda: fastvit.create_model("vit_tiny_patch16_224", heads=3), TypeError, "heads"),
        (lambda: fastvit.FastViT(**TINY, global_pool="max"), ValueError, "global_pool: 'max'"),
        (lambda: fastvit.FastViT(**TINY, class_token=False), ValueError, "class_token"),
        (lambda: fastvit.FastViT(**TINY, mlp_layer="glu"), ValueError, "mlp_layer: 'glu'"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
