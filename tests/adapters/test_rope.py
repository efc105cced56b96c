"""Blocks that are told the rotary positions of their tokens at every call: timm's EvaBlock, transformers' DINOv3."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastvit
from fastvit._compat import import_library
from fastvit.adapters import prepared, swap
from fastvit.adapters.compare import tensors
from tests import nasty
from tests.adapters import zoo
from tests.tolerances import relative_l2

WORDS = ("dinov3", "eva02", "rope", "sapiens2", "qwen3", "deepseek")
ROTATED = [name for name in zoo.MODELS if any(word in name for word in WORDS)]


def run(model, *args, **kwargs):
    with torch.no_grad():
        return next(iter(tensors(model(*args, **kwargs)).values()))


def reasons(model):
    return [r.detail for r in fastvit.report(model).rows if r.status == "fallback"]


@pytest.mark.parametrize("name", ROTATED)
def test_every_block_is_served(name):
    model = zoo.make(name)
    x = zoo.image(model)
    expected = run(copy.deepcopy(model), x)
    fastvit.optimize(model, strict=True)
    for _ in range(2):  # from the modules, and prepared
        assert relative_l2(run(model, x), expected) < 1e-5
        assert not reasons(model)


def test_heads_that_share_keys_and_values_are_left():
    """Sapiens2's middle blocks: their neighbours of the same class are served all the same."""
    make = zoo.timm_named("vit_base_patch16_sapiens2", patch_size=8, num_kv_heads=(1, 2), **zoo.EVA)
    model = nasty.randomize(make()).eval()
    x = zoo.image(model)
    expected = run(copy.deepcopy(model), x)
    with pytest.raises(fastvit.UnsupportedModelError, match="2 heads share 1 of keys and values"):
        fastvit.optimize(model, strict=True)
    assert relative_l2(run(fastvit.optimize(model), x), expected) < 1e-5
    assert [r.status for r in fastvit.report(model).rows if "blocks" in r.path] == ["left", "fused"]


def test_positions_matter():
    """What the other tests compare would differ if nothing were rotated."""
    model = zoo.make("timm dinov3")
    x = zoo.image(model)
    expected = run(model, x)
    block = model.blocks[0]
    tokens, angles = torch.randn(1, 21, 64), model.rope.get_embed(shape=(4, 4))
    assert relative_l2(run(block, tokens, rope=angles), run(block, tokens)) > 1e-2
    model.rope = None
    assert relative_l2(run(model, x), expected) > 1e-3


@pytest.mark.parametrize("name", ["timm dinov3 biases", "hf dinov3"])
def test_other_resolutions_bring_other_angles(name):
    model = zoo.make(name)
    original = copy.deepcopy(model)
    fastvit.optimize(model)
    for shape in ((2, 3, 32, 32), (1, 3, 48, 40), (3, 3, 16, 64), (2, 3, 32, 32)):
        x = torch.randn(shape, generator=nasty.generator())
        assert relative_l2(run(model, x), run(original, x)) < 1e-5
        assert not reasons(model)
    assert all(prepared._KEY in m.__dict__ for m in model.modules() if isinstance(m, swap.FusedBlock))


@pytest.fixture
def eva():
    """A block with its inputs, after a prepared call."""
    model = zoo.make("timm dinov3 biases")
    x, rope = torch.randn(2, 21, 64), model.rope.get_embed(shape=(4, 4))
    block = model.blocks[0]
    original = copy.deepcopy(block)
    fastvit.optimize(block)
    for _ in range(2):
        run(block, x, rope)
    assert prepared._KEY in block.__dict__
    return block, original, x, rope


@pytest.mark.parametrize(
    "how",
    [
        lambda x, rope: ((x, rope), {}),
        lambda x, rope: ((x,), {"rope": rope}),
        lambda x, rope: ((), {"x": x, "rope": rope, "attn_mask": None}),
        lambda x, rope: ((x,), {}),
        lambda x, rope: ((x, None, None, False), {}),
        lambda x, rope: ((x, rope.double()), {}),
        lambda x, rope: ((x, rope.bfloat16()), {}),
        lambda x, rope: ((x, rope.repeat_interleave(2, 1)[:, ::2]), {}),
    ],
)
def test_ways_to_call(eva, how):
    block, original, x, rope = eva
    args, kwargs = how(x, rope)
    assert relative_l2(run(block, *args, **kwargs), run(original, *args, **kwargs)) < 1e-5
    assert not reasons(block)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x, rope: {"rope": rope[None, None]}, "rope has shape (1, 1, 16, 32), not angles by token and channel"),
        (lambda x, rope: {"rope": rope.expand(2, 1, -1, -1)}, "rope has shape (2, 1, 16, 32), not angles by token"),
        (lambda x, rope: {"rope": rope[:1]}, "rotary positions for 1 of 21 tokens, 5 not rotated"),
        (lambda x, rope: {"rope": rope, "attn_mask": torch.zeros(21, 21)}, "called with attn_mask"),
        (lambda x, rope: {"rope": rope, "is_causal": True}, "called with is_causal"),
    ],
)
def test_what_runs_the_original(eva, how, reason):
    block, original, x, rope = eva
    kwargs = how(x, rope)
    assert torch.equal(run(block, x, **kwargs), run(original, x, **kwargs))
    assert reason in reasons(block)[0]
    assert relative_l2(run(block, x, rope), run(original, x, rope)) < 1e-5
    assert not reasons(block)


@pytest.mark.parametrize("rope", [torch.zeros(15, 64), torch.zeros(16, 30), "angles"])
def test_errors_are_the_originals(eva, rope):
    block, original, x, _ = eva
    with pytest.raises(Exception) as expected:
        run(original, x, rope)
    with pytest.raises(type(expected.value)) as actual:
        run(block, x, rope)
    assert str(actual.value) == str(expected.value)


def _in_place(attn):
    attn.q_bias.data.mul_(3.0)


def _one_element_behind_the_version_counter(attn):
    attn.v_bias.data[37] += 10.0


def _through_no_grad(attn):
    with torch.no_grad():
        attn.v_bias.add_(1.0)


def _new_storage(attn):
    attn.q_bias.data = attn.q_bias.data + 1.0


def _new_parameter(attn):
    attn.v_bias = nn.Parameter(attn.v_bias.detach() + 1.0)


def _buffer(attn):
    attn.k_bias += torch.linspace(-2, 2, 64)


def _none(attn):
    attn.q_bias = attn.k_bias = attn.v_bias = None


BIAS_CHANGES = [
    _in_place, _one_element_behind_the_version_counter, _through_no_grad, _new_storage, _new_parameter, _buffer, _none,
]  # fmt: skip


@pytest.mark.parametrize("change", BIAS_CHANGES)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_biases_that_change_take_effect(eva, change, quantize):
    """A packed qkv has its bias in three parts, which are put together."""
    block, original, x, rope = eva
    fastvit.optimize(block, quantize=quantize)
    for _ in range(2):
        before = run(block, x, rope)
    change(block.attn)
    change(original.attn)
    actual, expected = run(block, x, rope), run(original, x, rope)
    assert relative_l2(actual, expected) < (1e-5 if quantize is None else 2e-2)
    assert relative_l2(before, expected) > (1e-4 if quantize is None else 5e-3)


def test_bias_gradients(eva):
    block, original, x, rope = eva
    for b in (block, original):
        b(x, rope).square().sum().backward()
    grads = {name: p.grad for name, p in original.named_parameters()}
    assert {"attn.q_bias", "attn.v_bias"} < grads.keys()
    for name, p in block.named_parameters():
        assert relative_l2(p.grad, grads[name]) < 1e-4


def test_angles_that_are_learned(eva):
    block, original, x, rope = eva
    mine, theirs = (rope.clone().requires_grad_() for _ in range(2))
    block(x, mine).square().sum().backward()
    original(x, theirs).square().sum().backward()
    assert not reasons(block)
    assert relative_l2(mine.grad, theirs.grad) < 1e-4


def test_dinov3_without_positions_fails_as_before():
    model = zoo.make("hf dinov3")
    layer = next(m for m in model.modules() if type(m).__name__ == "DINOv3ViTLayer")
    original = copy.deepcopy(layer)
    fastvit.optimize(layer)
    x = torch.randn(2, 21, 64)
    for positions in (None, torch.zeros(16, 32)):
        with pytest.raises(Exception) as expected:
            original(x, position_embeddings=positions)
        with pytest.raises(type(expected.value), match=str(expected.value)[:20]):
            layer(x, position_embeddings=positions)
        assert "position_embeddings" in reasons(layer)[0]


def test_rotations_of_ones_own_are_tried():
    base = type(zoo.make("timm dinov3").blocks[0])

    class Unrotated(base):
        def forward(self, x, rope=None, attn_mask=None):
            return super().forward(x, None, attn_mask)

    class Negative(base):
        def forward(self, x, rope=None, attn_mask=None):
            return super().forward(x, None if rope is None else -rope, attn_mask)

    class AlwaysRotated(base):
        def forward(self, x, rope=None, attn_mask=None):
            positions = torch.ones(x.shape[1] - 5, 64, dtype=x.dtype) if rope is None else rope
            return super().forward(x, positions, attn_mask)

    for cls, where in ((Unrotated, ""), (Negative, ""), (AlwaysRotated, " without rope")):
        model = zoo.make("timm dinov3")
        for block in model.blocks:
            block.__class__ = cls
        details = [r.detail for r in fastvit.report(fastvit.optimize(model)).rows]
        assert details == ["its forward computes something else" + where] * 2


def test_int8():
    model = zoo.make("timm dinov3 biases")
    x = zoo.image(model)
    expected = run(model, x)
    fastvit.optimize(model, quantize="int8", strict=True)
    assert 1e-4 < relative_l2(run(model, x), expected) < 3e-2
    assert any("int8 qkv" in r.detail for r in fastvit.report(model).rows)


@pytest.mark.parametrize("name", ["vit_pe_core_tiny_patch16_384", "vit_pe_spatial_tiny_patch16_512"])
@pytest.mark.parametrize("rotated", [True, False])
def test_perception_encoders(name, rotated):
    timm = import_library("timm")
    model = nasty.randomize(timm.create_model(name, depth=2, img_size=64, use_rot_pos_emb=rotated)).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = run(copy.deepcopy(model), x)
    assert relative_l2(run(fastvit.optimize(model, strict=True), x), expected) < 1e-5
    assert not reasons(model)
