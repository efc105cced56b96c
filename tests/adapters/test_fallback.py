"""Calls and models that the fused path can't serve run the original forward, and the report says why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastvit
from fastvit._compat import import_library
from fastvit.adapters.compare import tensors
from tests import nasty
from tests.adapters import zoo
from tests.adapters.zoo import reasons, run
from tests.tolerances import relative_l2


def agree(model, x, tolerance=1e-5, **kwargs):
    """The optimized model gives what its restored copy gives."""
    actual, expected = run(model, x, **kwargs), run(fastvit.restore(copy.deepcopy(model)), x, **kwargs)
    assert actual.keys() == expected.keys()
    return all(relative_l2(actual[k], expected[k]) <= tolerance for k in expected)


@pytest.fixture
def vit():
    model = zoo.make("timm vit")
    x = zoo.image(model)
    run(fastvit.optimize(model), x)  # what a call leaves behind must not survive a change
    return model, x


# ---- Modules that are changed after optimize -------------------------------------------------------


class Wrapped(nn.Module):
    """Stands for LoRA: a linear inside another module."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) * 2.0


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2.0


class Scale(nn.Module):
    def forward(self, x):
        return x * 0.5


@pytest.mark.parametrize(
    ("path", "make", "word"),
    [
        ("attn.qkv", Wrapped, "Linear was replaced by Wrapped"),
        ("mlp.fc2", Wrapped, "Linear was replaced by Wrapped"),
        ("attn.proj", lambda m: OwnLinear(64, 64), "replaced by OwnLinear"),
        ("ls1", lambda m: Scale(), "Identity was replaced by Scale"),
        ("drop_path2", lambda m: Scale(), "Identity was replaced by Scale"),
        ("attn.norm", lambda m: nn.LayerNorm(64), "Identity was replaced by LayerNorm"),
        ("attn.q_norm", lambda m: nn.LayerNorm(32), "Identity was replaced by LayerNorm"),
        ("mlp.norm", lambda m: nn.LayerNorm(256), "Identity was replaced by LayerNorm"),
        ("mlp.act", lambda m: nn.Softplus(), "GELU was replaced by Softplus"),
        ("norm2", lambda m: nn.Identity(), "LayerNorm was replaced by Identity"),
        ("attn.gate", lambda m: nn.Linear(64, 64), "replaced by Linear"),
    ],
)
def test_modules_of_another_kind(vit, path, make, word):
    model, x = vit
    block = model.blocks[0]
    parent, _, name = path.rpartition(".")
    parent = block.get_submodule(parent)
    new = make(getattr(parent, name))
    for module in new.modules():
        if isinstance(module, (nn.LayerNorm, OwnLinear)) or path == "attn.gate":
            nasty.randomize(module)
    setattr(parent, name, new)
    assert agree(model, x)
    assert word in reasons(model)["blocks.0"]
    assert "blocks.1" not in reasons(model)


def test_a_forward_on_the_instance(vit):
    model, x = vit
    linear = model.blocks[1].mlp.fc1
    linear.forward = lambda x: nn.Linear.forward(linear, x) * 2.0
    before = run(model, x)["output"]
    assert reasons(model) == {"blocks.1": "original forward: forward of Linear was replaced"}
    linear.weight.data.mul_(2.0)
    linear.bias.data.mul_(2.0)
    del linear.forward
    assert relative_l2(run(model, x)["output"], before) < 1e-5


def test_a_class_that_is_patched_afterwards(vit, monkeypatch):
    model, x = vit
    attention = type(model.blocks[0].attn)
    original, maps = attention.forward, []

    def spy(self, x, *args, **kwargs):
        maps.append(x.shape)
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", spy)
    run(model, x)
    assert len(maps) == 2
    assert "Attention.forward was replaced" in reasons(model)["blocks.0"]
    monkeypatch.undo()
    run(model, x)
    assert not reasons(model)


def test_global_hooks(vit):
    model, x = vit
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
    try:
        run(model, x)
    finally:
        handle.remove()
    assert nn.Linear in seen
    assert "global module hooks" in reasons(model)["blocks.0"]


def test_weight_norm_of_the_old_kind_and_of_the_patch_convolution(vit):
    model, x = vit
    torch.nn.utils.parametrizations.weight_norm(model.patch_embed.proj)
    assert agree(model, x)
    parametrized = type(fastvit.restore(model).patch_embed.proj)
    assert not any("fastvit" in repr(vars(c).keys()) for c in parametrized.__mro__)
    torch.nn.utils.parametrize.remove_parametrizations(model.patch_embed.proj, "weight")
    assert type(model.patch_embed.proj) is nn.Conv2d


# ---- Settings and inputs ---------------------------------------------------------------------------


def test_monte_carlo_dropout():
    """Dropout modules alone in training, as uncertainty estimates put them."""
    model = nasty.randomize(zoo.timm(proj_drop_rate=0.5)()).eval()
    x = zoo.image(model)
    fastvit.optimize(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(0)
    first = run(model, x)["output"]
    assert "dropout" in reasons(model)["blocks.0"]
    assert relative_l2(run(model, x)["output"], first) > 1e-2


def test_frozen_dropout_in_training_is_served():
    model = nasty.randomize(zoo.timm(proj_drop_rate=0.5)()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    fastvit.optimize(model)
    run(model, zoo.image(model))
    assert not reasons(model)


def test_an_unknown_drop_path_in_training():
    class DropPath(nn.Module):
        drop_prob = 0.5

        def forward(self, x):
            return x * 0.0 if self.training else x

    model = zoo.make("timm vit")
    model.blocks[0].drop_path1 = DropPath().eval()
    x = zoo.image(model)
    fastvit.optimize(model, strict=True)
    run(model, x)
    assert not reasons(model)
    model.train()
    assert agree(model, x)
    assert "DropPath in training" in reasons(model)["blocks.0"]


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (torch.randn(2, 17, 64).double(), "torch.float64"),
        (torch.randn(17, 64), "shape (17, 64)"),
        (torch.randn(2, 17, 64).bfloat16(), "torch.bfloat16"),
        (torch.randn(2, 17, 32), "x: shape"),
        (torch.randn(2, 17, 64).to_sparse(), "sparse"),
    ],
)
def test_strange_inputs_give_what_the_original_gives(vit, x, word):
    block = vit[0].blocks[0]
    original = fastvit.restore(copy.deepcopy(block))
    try:
        expected = original(x)
    except Exception as error:
        with pytest.raises(type(error)):
            block(x)
    else:
        assert relative_l2(block(x), expected) < 1e-5
    assert word in reasons(block)[""]


@pytest.mark.parametrize("shape", [(0, 17, 64), (1, 1, 64), (2, 0, 64)])
def test_empty_and_tiny_inputs(vit, shape):
    block = vit[0].blocks[0]
    original = fastvit.restore(copy.deepcopy(block))
    x = torch.randn(shape)
    assert relative_l2(block(x), original(x)) < 1e-5


@pytest.mark.parametrize("name", ["hf vit", "hf clip", "hf dinov2"])
def test_own_attention_functions_of_transformers(name):
    transformers = import_library("transformers")
    model = zoo.make(name)
    x = zoo.image(model)

    def average(module, query, key, value, attention_mask, **kwargs):
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("average", average)
    fastvit.optimize(model)
    fused = run(model, x)["last_hidden_state"]
    model.set_attn_implementation("average")
    assert agree(model, x)
    assert all("'average'" in r for r in reasons(model).values())
    assert len(reasons(model)) == 2
    model.set_attn_implementation("eager")
    assert torch.equal(run(model, x)["last_hidden_state"], fused)


@pytest.mark.parametrize("name", ["hf vit", "hf clip", "hf siglip", "hf dinov2", "hf dinov2 registers"])
@pytest.mark.parametrize("how", ["argument", "config"])
def test_recording_of_attentions_before_and_after(name, how):
    """transformers 4 leaves bound methods on the instances, version 5 its hooks: neither may stop fusion or undo."""
    model = zoo.make(name)
    x = zoo.image(model)
    model.set_attn_implementation("eager")
    ask = {"output_attentions": True, "output_hidden_states": True}
    expected, plain = run(model, x, **ask), run(model, x)
    fastvit.optimize(model, strict=True)
    if how == "config":
        model.config.output_attentions = model.config.output_hidden_states = True
        ask = {}
    actual = run(model, x, **ask)
    assert actual.keys() == expected.keys()
    assert "attentions.1" in actual
    assert all(relative_l2(actual[k], expected[k]) < 1e-5 for k in expected)
    model.config.output_attentions = model.config.output_hidden_states = False
    assert agree(model, x)
    assert not reasons(model)
    fastvit.restore(model)
    again = run(model, x)
    assert all(torch.equal(again[k], plain[k]) for k in plain)
    assert not any("fastvit" in str(vars(m).get("forward")) for m in model.modules())


def test_head_mask_of_transformers_4():
    if int(import_library("transformers").__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 has no head_mask")
    model = zoo.make("hf vit")
    x = zoo.image(model)
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model.set_attn_implementation("eager")
    before = run(model, x)["last_hidden_state"]
    fastvit.optimize(model)
    assert agree(model, x, head_mask=mask)
    assert relative_l2(run(model, x, head_mask=mask)["last_hidden_state"], before) > 1e-2
    assert len(reasons(model)) == 2


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_text_towers(family):
    transformers = import_library("transformers")
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 136}
    text |= {"max_position_embeddings": 16, "vocab_size": 120}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=zoo.HF)
    model = nasty.randomize(getattr(transformers, f"{family}Model")(config)).eval()
    ids = torch.randint(3, 99, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": ids}
    for extra in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            expected = tensors(model(**inputs, **extra))
            actual = tensors(fastvit.optimize(model)(**inputs, **extra))
        for key in expected:
            assert relative_l2(actual[key], expected[key]) < 1e-4, key
        rows = [r for r in fastvit.report(model).rows if r.path.startswith("text_model.")]
        assert len(rows) == 2
        if family == "CLIP":
            assert all(r.status == "left" and "calls it with a causal mask" in r.detail for r in rows)
        else:
            assert all(r.status == ("fallback" if extra else "fused") for r in rows)
        assert reasons(model).keys() <= {r.path for r in rows}
        fastvit.restore(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_rope_mixed_224", "Eva calls it with a rotation of its own for each head"),
        ("vit_srelpos_small_patch16_224", "VisionTransformerRelPos calls it with shared_rel_pos"),
    ],
)
def test_blocks_that_are_always_called_with_more_are_left(name, reason):
    model = nasty.randomize(zoo.timm_named(name, img_size=64)()).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = run(model, x)
    with pytest.raises(fastvit.UnsupportedModelError, match=reason):
        fastvit.optimize(model, strict=True)
    assert [r.status for r in fastvit.report(model).rows if r.path.startswith("blocks")] == ["left"] * 2
    actual = run(fastvit.optimize(model), x)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
    assert [r.detail for r in fastvit.report(model).rows if r.path.startswith("blocks")] == [reason] * 2


def test_a_mask_that_the_model_requires():
    """Siglip2 fills images of several shapes up to as many patches: the rest is masked."""
    transformers = import_library("transformers")
    config = transformers.Siglip2VisionConfig(**{**zoo.HF, "image_size": None}, num_patches=16)
    model = nasty.randomize(transformers.Siglip2VisionModel(config)).eval()
    with pytest.raises(fastvit.UnsupportedModelError, match=r"requires .*mask, and what it masks needs the original"):
        fastvit.optimize(model, strict=True)
    x, mask = torch.randn(1, 16, 192), torch.ones(1, 16, dtype=torch.int32)
    mask[:, 12:] = 0
    assert agree(fastvit.optimize(model), x, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[3, 4]]))
    assert all(r == "original forward: called with attention_mask" for r in reasons(model).values())
    assert len(reasons(model)) == 2
    details = [r.detail for r in fastvit.report(fastvit.optimize(fastvit.restore(model))).rows if "layers" in r.path]
    assert all("; Siglip2Vision" in d and "what it masks needs the original forward" in d for d in details)


def test_what_a_larger_model_requires_is_none_of_its_tower():
    class Captioner(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.rope, self.attn_mask = zoo.make("timm vit"), nn.Identity(), nn.Identity()

        def forward(self, x, attn_mask):
            return self.vit(x)

    model = fastvit.optimize(Captioner(), strict=True)
    assert [r.status for r in fastvit.report(model).rows] == ["fused"] * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.mlp.fc1.register_forward_hook(lambda *a: None), "forward hook on Linear"),
        (lambda b: b.mlp.fc1.bfloat16(), "a weight is torch.bfloat16"),
        (lambda b: b.norm2.to("meta"), "on meta, but"),
        (lambda b: setattr(b.norm1, "forward", lambda x: x), "forward of LayerNorm was replaced"),
    ],
)
def test_what_sends_every_call_to_the_original_forward_is_told_before_one(change, reason):
    model = zoo.make("timm vit layer scale")
    change(model.blocks[0])
    with pytest.raises(fastvit.UnsupportedModelError, match="1 transformer blocks can't be replaced") as error:
        fastvit.optimize(model, strict=True)
    assert reason in str(error.value)
    assert reason in fastvit.report(model).rows[0].detail


def test_the_report_foresees_hooks_and_dropout():
    model = nasty.randomize(zoo.timm(proj_drop_rate=0.5)()).eval()
    fastvit.optimize(model, strict=True)
    assert not reasons(model)
    handle = model.blocks[0].mlp.fc1.register_forward_hook(lambda *a: None)
    assert reasons(model) == {"blocks.0": "original forward: forward hook on Linear"}
    handle.remove()
    assert not reasons(model)
    model.train()
    assert set(reasons(model).values()) == {"original forward: dropout in training"}
