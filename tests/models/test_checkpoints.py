"""Every layout: a real model of that library with random weights is saved and loaded, and the outputs agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastvit
from tests import nasty
from tests.tolerances import assert_close

SHAPE = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
HF = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 32,
    "patch_size": 8,
}


def ours(name="vit_tiny_patch8_32", **overrides):
    return lambda checkpoint: fastvit.create_model(name, checkpoint=checkpoint, **{**SHAPE, **overrides}).eval()


def agree(theirs, model, output=lambda o: o):
    """Compare on random images, the original in float64."""
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        truth = output(theirs.double()(x.double()))
        assert_close(model(x), truth)


def transformers_cases():
    tf = pytest.importorskip("transformers")
    token, pooler, logits = (lambda o: o.last_hidden_state[:, 0]), (lambda o: o.pooler_output), (lambda o: o.logits)
    everything = lambda o: o.last_hidden_state  # noqa: E731
    eps = {"norm_eps": 1e-12}
    return {
        "ViTModel": (tf.ViTModel(tf.ViTConfig(**HF)), ours(num_classes=0, **eps), token),
        "ViTForImageClassification": (
            tf.ViTForImageClassification(tf.ViTConfig(**HF, num_labels=7)),
            ours(num_classes=7, **eps),
            logits,
        ),
        "DeiTModel": (
            tf.DeiTModel(tf.DeiTConfig(**HF)),
            ours(num_classes=0, global_pool="", reg_tokens=1, **eps),
            everything,
        ),
        "CLIPVisionModel": (
            tf.CLIPVisionModel(tf.CLIPVisionConfig(**HF)),
            ours("vit_base_patch8_clip_quickgelu_32", num_classes=0),
            pooler,
        ),
        "CLIPVisionModelWithProjection": (
            tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**HF, projection_dim=7)),
            ours("vit_base_patch8_clip_quickgelu_32", num_classes=7),
            lambda o: o.image_embeds,
        ),
        "SiglipVisionModel": (
            tf.SiglipVisionModel(tf.SiglipVisionConfig(**HF)),
            ours("vit_base_patch8_siglip_32", act_layer="gelu_tanh"),
            pooler,
        ),
        "Dinov2Model": (tf.Dinov2Model(tf.Dinov2Config(**HF)), ours("vit_small_patch8_dinov2"), pooler),
        "Dinov2Model SwiGLU": (
            tf.Dinov2Model(tf.Dinov2Config(**HF, use_swiglu_ffn=True)),
            ours("vit_small_patch8_dinov2", mlp_layer="swiglu", mlp_ratio=5.5),
            pooler,
        ),
        "Dinov2WithRegistersModel": (
            tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**HF)),
            ours("vit_small_patch8_reg4_dinov2", global_pool=""),
            everything,
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        "ViTModel",
        "ViTForImageClassification",
        "DeiTModel",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "SiglipVisionModel",
        "Dinov2Model",
        "Dinov2Model SwiGLU",
        "Dinov2WithRegistersModel",
    ],
)
def test_transformers(case, tmp_path):
    theirs, make, output = transformers_cases()[case]
    nasty.randomize(theirs).eval().save_pretrained(tmp_path)
    agree(theirs, make(tmp_path / "model.safetensors"), output)


def version_4_names(state):
    """A transformers 5 ViT state dict under the names that version 4 wrote."""
    renamed = {}
    for key, value in state.items():
        new = key.replace("layers.", "encoder.layer.")
        for five, four in (
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            new = new.replace(five, four)
        renamed[new] = value
    return renamed


def test_transformers_4_and_5_names_load_alike():
    tf = pytest.importorskip("transformers")
    state = nasty.randomize(tf.ViTModel(tf.ViTConfig(**HF), add_pooling_layer=False)).state_dict()
    five = ours(num_classes=0)(state).state_dict()
    four = ours(num_classes=0)(version_4_names(state)).state_dict()
    assert all(torch.equal(five[k], four[k]) for k in five)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_timm(wrapper, suffix, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = nasty.randomize(timm.models.VisionTransformer(**SHAPE, num_classes=7)).eval()
    state, path = theirs.state_dict(), tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    agree(theirs, ours(num_classes=7)(path))


def test_data_parallel_prefix():
    timm = pytest.importorskip("timm")
    theirs = nasty.randomize(timm.models.VisionTransformer(**SHAPE, num_classes=7)).eval()
    agree(theirs, ours(num_classes=7)({f"module.{k}": v for k, v in theirs.state_dict().items()}))


def test_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    theirs = nasty.randomize(torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 256, num_classes=7)).eval()
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    agree(theirs, ours(num_classes=7)(tmp_path / "model.pth"))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip(quick_gelu, tmp_path):
    """The whole model's file, as it is published; the original CLIP code has the same names."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"width": 64, "heads": 2, "layers": 1, "vocab_size": 9}
    theirs = nasty.randomize(open_clip.CLIP(7, vision, text, quick_gelu=quick_gelu)).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "model.pt")
    name = "vit_base_patch8_clip_quickgelu_32" if quick_gelu else "vit_base_patch8_clip_32"
    agree(theirs.visual, ours(name, num_classes=7)(tmp_path / "model.pt"))
    features = ours(name, num_classes=0)(theirs.visual.state_dict())
    theirs.visual.proj = None
    agree(theirs.visual, features)


def test_open_clip_layer_scale():
    transformer = pytest.importorskip("open_clip.transformer")
    theirs = transformer.VisionTransformer(32, 8, 64, 2, 2, 4.0, ls_init_value=0.1, output_dim=7)
    nasty.randomize(theirs).eval()
    agree(theirs, ours("vit_base_patch8_clip_32", num_classes=7, init_values=0.1)(theirs.state_dict()))


def jax_arrays(g, *, big_vision=False, classes=7, map_head=False):
    """Random parameters in the layout of the original Flax code: kernels (in, out), attention (D, heads, head_dim)."""
    dim, heads, hidden, grid = 64, 2, 256, 4
    mha, mlp, ln1 = (0, 0, 1) if big_vision else (1, 3, 2)
    arrays = {}

    def add(name, *shape):
        arrays[name] = g.standard_normal(shape, dtype=np.float32) * (0.3 if len(shape) == 1 else 0.1)

    def attention(prefix):
        for part in ("query", "key", "value"):
            add(f"{prefix}/{part}/kernel", dim, heads, dim // heads)
            add(f"{prefix}/{part}/bias", heads, dim // heads)
        add(f"{prefix}/out/kernel", heads, dim // heads, dim)
        add(f"{prefix}/out/bias", dim)

    def dense(prefix, rows, columns):
        add(f"{prefix}/kernel", rows, columns)
        add(f"{prefix}/bias", columns)

    def norm(prefix):
        add(f"{prefix}/scale", dim)
        add(f"{prefix}/bias", dim)

    add("embedding/kernel", 8, 8, 3, dim)
    add("embedding/bias", dim)
    if map_head:
        add("pos_embedding", 1, grid * grid, dim)
    else:
        add("cls", 1, 1, dim)
        position = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
        add(position, 1, 1 + grid * grid, dim)
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        norm(f"{block}/LayerNorm_0")
        attention(f"{block}/MultiHeadDotProductAttention_{mha}")
        norm(f"{block}/LayerNorm_{ln1}")
        dense(f"{block}/MlpBlock_{mlp}/Dense_0", dim, hidden)
        dense(f"{block}/MlpBlock_{mlp}/Dense_1", hidden, dim)
    norm("Transformer/encoder_norm")
    if map_head:
        add("MAPHead_0/probe", 1, 1, dim)
        attention("MAPHead_0/MultiHeadDotProductAttention_0")
        norm("MAPHead_0/LayerNorm_0")
        dense("MAPHead_0/MlpBlock_0/Dense_0", dim, hidden)
        dense("MAPHead_0/MlpBlock_0/Dense_1", hidden, dim)
    else:
        dense("head", dim, classes)
    return arrays


@pytest.mark.parametrize("layout", ["original", "big_vision", "stacked", "map"])
def test_jax_npz_loads_as_timm_loads_it(layout, tmp_path):
    timm = pytest.importorskip("timm")
    arrays = jax_arrays(np.random.default_rng(0), big_vision=layout != "original", map_head=layout == "map")
    if layout == "stacked":
        for key in [k for k in arrays if "encoderblock_0/" in k]:
            pair = [arrays.pop(key), arrays.pop(key.replace("_0/", "_1/", 1))]
            arrays[key.replace("encoderblock_0/", "encoderblock/")] = np.stack(pair)
    prefix = "" if layout == "original" else "params/"
    path = tmp_path / "model.npz"
    np.savez(path, **{prefix + k: v for k, v in arrays.items()})
    options = {"global_pool": "map", "class_token": False, "num_classes": 0} if layout == "map" else {"num_classes": 7}
    theirs = timm.models.VisionTransformer(**SHAPE, **options).eval()
    theirs.load_pretrained(str(path))
    agree(theirs, ours(**options)(path))


def test_positions_of_another_grid_are_interpolated_as_timm_does():
    timm = pytest.importorskip("timm")
    small = nasty.randomize(timm.models.VisionTransformer(**SHAPE, num_classes=7))
    model = ours(num_classes=7, img_size=(48, 64))(small.state_dict())
    theirs = timm.models.VisionTransformer(**{**SHAPE, "img_size": (48, 64)}, num_classes=7).eval()
    state = small.state_dict()
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], (6, 8))
    theirs.load_state_dict(state)
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert_close(model(x), theirs.double()(x.double()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.norm1.weight"), r"missing: blocks\.1\.norm1\.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda s: s.update({"head.weight": torch.zeros(9, 64), "head.bias": torch.zeros(9)}), "num_classes=9"),
        (lambda s: [s.pop(k) for k in ("head.weight", "head.bias")], "num_classes=0"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 13, 64)}), "pos_embed: shape"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, message):
    state = nasty.randomize(fastvit.FastViT(**SHAPE, num_classes=7)).state_dict()
    change(state)
    model = fastvit.FastViT(**SHAPE, num_classes=7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fastvit.models.load_checkpoint(model, state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_unreadable_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        ours()(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list"):
        ours()(tmp_path / "list.pth")
    for name in ("a.pth", "a.safetensors", "a.npz"):
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        with pytest.raises(ValueError, match=f"checkpoint: .*{name} can't be read: "):
            ours()(tmp_path / name)
    with pytest.raises(ValueError, match="unknown layout"):
        ours()({"conv1.weight": torch.zeros(1)})
