"""Blocks that look like a known one: served where they compute the same, left with a reason where they don't."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastvit
from fastvit._compat import import_library
from tests import nasty
from tests.adapters import zoo
from tests.adapters.zoo import reasons, run
from tests.tolerances import relative_l2


def timm_model(name, **options):
    return import_library("timm").create_model(name, **options)


class Attention(nn.Module):
    """timm's structure, somebody's code."""

    keeps = False

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q * self.scale @ k.mT).softmax(-1))
        if self.keeps:
            self.attn_map = attn
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2)))


class Keeping(Attention):
    keeps = True


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(dim, 2 * dim),
            nn.GELU(),
            nn.Linear(2 * dim, dim),
            nn.Dropout(0.0),
        )

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """As in the original code of DINO and DINOv2."""

    def __init__(self, dim=64, num_heads=2, attention=Attention, post_norm=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attention(dim, num_heads), Mlp(dim)
        self.post_norm = post_norm

    def forward(self, x):
        if self.post_norm:
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_somebodys_own_block_is_recognised_by_structure():
    block = nasty.randomize(Block()).eval()
    x = nasty.tokens(2, 17, 64).float()
    truth = copy.deepcopy(block).double()(x.double())
    fastvit.optimize(block, strict=True)
    assert relative_l2(block(x), truth) < 1e-5
    assert fastvit.report(block).rows[0].status == "fused"


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"attention": Keeping}, "keeps attn_map"), ({"post_norm": True}, "computes something else")],
)
def test_the_same_children_with_another_meaning(options, reason):
    block = nasty.randomize(Block(**options)).eval()
    assert type(fastvit.optimize(block)) is Block
    assert reason in fastvit.report(block).skipped[0].detail


class Scaled(Block):
    """A factor that no structure shows."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        factor = self.factor["in training"] * self.training if isinstance(self.factor, dict) else self.factor
        return super().forward(x) * (1.0 + factor)


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (0.5, "computes something else"),
        ([0.5], "more than hidden states"),
        ({"in training": 0.5}, "computes something else, in training"),
        (torch.zeros(()), "Scaled has tensors that are no parameters or buffers: factor"),
    ],
)
def test_each_factor_in_a_class_of_ones_own_is_tried(factor, reason):
    model = nasty.randomize(nn.Sequential(Scaled(0.0), Scaled(factor), Scaled(0.0)))
    fastvit.optimize(model)
    rows = fastvit.report(model).rows
    assert [r.status for r in rows] == ["fused", "left", "fused"]
    assert reason in rows[1].detail


class Conditional(Block):
    """Computes something else where `condition(x)`."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, x):
        return super().forward(x) * (1.5 if self.condition(x) else 1.0)


class Positions(nn.Module):
    """Adds position embeddings to patches, and registers in front."""

    def __init__(self, block, positions, registers=0):
        super().__init__()
        self.block = block
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, 64))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, 64)) if registers else None

    def forward(self, x):
        x = x + self.pos_embed
        return self.block(x if self.reg_token is None else torch.cat([self.reg_token.expand(len(x), -1, -1), x], 1))


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (lambda x: x.shape[1] > 5, " with 8 tokens"),
        (lambda x: x.shape[1] % 2 == 0, " with 8 tokens"),
        (lambda x: x.shape[1] > 100, " with 197 tokens"),
        (lambda x: len(x) == 1, " with 8 tokens"),
        (lambda x: x.amax() > 50.0, " with 8 tokens"),
        (lambda x: x.dtype is torch.float32, ""),
        (lambda x: x.dtype is torch.bfloat16, " in torch.bfloat16"),
        (lambda x: len(x) == 3, " in torch.bfloat16"),
    ],
)
def test_what_depends_on_the_input_beyond_its_values_is_left(condition, reason):
    block = nasty.randomize(Conditional(condition)).eval()
    inputs = [
        torch.randn(b, n, 64).to(dtype)
        for b, n, dtype in [(1, 4, torch.float32), (2, 7, torch.float32), (2, 120, torch.float32)]
    ]
    inputs.append(inputs[1] * 100.0)
    expected = [block(x) for x in inputs]
    fastvit.optimize(block)
    for x, y in zip(inputs, expected, strict=True):
        assert relative_l2(block(x), y) < 1e-5
    (row,) = fastvit.report(block).rows
    assert row.status == "left"
    assert f"its forward computes something else{reason}" in row.detail


@pytest.mark.parametrize(("positions", "registers", "tokens"), [(49, 4, 53), (50, 0, 50), (49, 0, 49)])
def test_what_a_block_computes_of_the_number_of_tokens_that_its_model_feeds(positions, registers, tokens):
    model = Positions(nasty.randomize(Conditional(lambda x: x.shape[1] == tokens)), positions, registers).eval()
    x = torch.randn(2, positions, 64)
    expected = model(x)
    assert relative_l2(fastvit.optimize(model)(x), expected) < 1e-5
    assert f"computes something else with {tokens} tokens" in fastvit.report(model).rows[0].detail


def test_a_block_that_takes_no_bfloat16_is_served():
    class Picky(Block):
        def forward(self, x):
            if x.dtype is torch.bfloat16:
                raise TypeError("no bfloat16")
            return super().forward(x)

    block = nasty.randomize(Picky()).eval()
    x = torch.randn(2, 17, 64)
    expected = block(x)
    fastvit.optimize(block, strict=True)
    assert relative_l2(block(x), expected) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_a_factor_in_a_class_of_ones_own_that_changes_afterwards(compiled):
    model = fastvit.optimize(nasty.randomize(nn.Sequential(Scaled(0.0), Scaled(0.0))).eval(), strict=True)
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    x = nasty.tokens(2, 17, 64).float()
    with torch.no_grad():
        call(x)
        model[1].factor = 0.5
        actual, expected = call(x), fastvit.restore(copy.deepcopy(model))(x)
    assert relative_l2(actual, expected) < 1e-5
    if not compiled:
        assert reasons(model) == {"1": "original forward: a number in Scaled has changed: restore and optimize again"}


def test_a_forward_on_a_block_instance_is_left():
    model = zoo.make("timm vit")
    block = model.blocks[0]
    block.forward = lambda x, **kwargs: type(block).forward(block, x) * 2.0
    x = zoo.image(model)
    before = run(model, x)["output"]
    assert relative_l2(run(fastvit.optimize(model), x)["output"], before) < 1e-5
    assert "replaced on the instance" in fastvit.report(model).skipped[0].detail


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm_model("eva02_enormous_patch14_clip_224", depth=1, embed_dim=112, num_heads=1, img_size=28),
        lambda: import_library("timm.models.eva").EvaBlock(64, 2, gated_attn=True),
        lambda: timm_model("vit_relpos_small_patch16_224", depth=1, embed_dim=96, num_heads=3, img_size=32),
        lambda: timm_model("cait_xxs24_224", depth=1, img_size=32),
        lambda: timm_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24),
        lambda: timm_model("samvit_base_patch16", depth=1, embed_dim=96, num_heads=3, img_size=64),
        zoo.hf("BeitModel", "BeitConfig", use_relative_position_bias=True, use_mean_pooling=False),
        zoo.hf("InternVLVisionModel", "InternVLVisionConfig", use_qk_norm=True),
        zoo.hf("BertModel", "BertConfig"),
        lambda: nn.TransformerEncoderLayer(64, 2, batch_first=True),
    ],
)
def test_other_architectures_are_left_with_a_reason(make):
    model = nasty.randomize(make()).eval()
    classes = [type(m) for m in model.modules()]
    skipped = fastvit.report(fastvit.optimize(model)).skipped
    assert [type(m) for m in model.modules()] == classes
    assert skipped
    assert all(len(r.detail) > 10 for r in skipped)
    with pytest.raises(fastvit.UnsupportedModelError, match="transformer blocks can't be replaced"):
        fastvit.optimize(model, strict=True)


def inner(cls, make):
    return next(m for m in make().modules() if type(m).__name__ == cls)


def without_an_mlp_projection():
    layer = inner("DINOv3ViTLayer", zoo.MODELS["hf dinov3"])
    del layer.mlp.up_proj
    return layer


class NoHeads(Attention):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        del self.num_heads


class Sized(Block):
    def forward(self, x, size, window):
        return super().forward(x).view(-1, *size, 64)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Block(attention=NoHeads), "NoHeads has no num_heads, which its adapter needs"),
        (Sized, "its forward needs more than hidden states (size, window)"),
        (
            lambda: timm_model("hiera_tiny_224", stages=(1, 1, 1, 1)).blocks[0],
            "MaskUnitAttention has no num_heads, which its adapter needs",
        ),
        (without_an_mlp_projection, "MLP projection is missing"),
    ],
)
def test_reasons_are_sentences(make, reason):
    block = make()
    assert type(fastvit.optimize(block)) is type(block)
    assert fastvit.report(block).rows[0].detail == reason


def test_a_scripted_model_is_left():
    model = zoo.make("timm vit")
    x = zoo.image(model)
    scripted = torch.jit.script(model)
    expected = run(scripted, x)["output"]
    assert torch.equal(run(fastvit.optimize(scripted), x)["output"], expected)
    details = {r.path: r.detail for r in fastvit.report(scripted).rows}
    assert details == dict.fromkeys(["blocks.0", "blocks.1"], "torch.jit.script has compiled it: optimize before")
    with pytest.raises(fastvit.UnsupportedModelError, match="optimize before"):
        fastvit.optimize(scripted, strict=True)


@pytest.mark.parametrize("name", ["timm siglip", "hf siglip"])
def test_attention_pooling_is_reported_and_does_not_break_strict(name):
    model = fastvit.optimize(zoo.make(name), strict=True)
    assert [r.detail for r in fastvit.report(model).skipped] == ["attention pooling runs as it was"]


def test_meta_buffers():
    """EVA-02's zero bias of k is a buffer: a trial must not read what happens to lie in memory."""
    with torch.device("meta"):
        model = zoo.MODELS["timm eva02"]()
    assert any(b.is_meta for b in model.blocks.buffers())
    torch.use_deterministic_algorithms(True)  # then new memory is NaN
    try:
        fastvit.optimize(model, strict=True)
    finally:
        torch.use_deterministic_algorithms(False)
