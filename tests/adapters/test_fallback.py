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
from tests.tolerances import relative_l2


def run(model, x, **kwargs):
    with torch.no_grad():
        return tensors(model(x, **kwargs))


def agree(model, x, tolerance=1e-5, **kwargs):
    """The optimized model gives what its restored copy gives."""
    actual, expected = run(model, x, **kwargs), run(fastvit.restore(copy.deepcopy(model)), x, **kwargs)
    assert actual.keys() == expected.keys()
    return all(relative_l2(actual[k], expected[k]) <= tolerance for k in expected)


def reasons(model):
    return {r.path: r.detail for r in fastvit.report(model).rows if r.status == "fallback"}


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


def timm_model(name, **options):
    return import_library("timm").create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_rope_mixed_224", "Eva calls it with a rotation of its own for each head"),
        ("vit_srelpos_small_patch16_224", "VisionTransformerRelPos calls it with shared_rel_pos"),
    ],
)
def test_blocks_that_are_always_called_with_more_are_left(name, reason):
    model = nasty.randomize(timm_model(name, depth=2, img_size=64)).eval()
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


# ---- Blocks that look alike ------------------------------------------------------------------------


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
        lambda: timm_model("beit_base_patch16_224", depth=1, embed_dim=96, num_heads=3, img_size=32),
        lambda: timm_model("vit_relpos_small_patch16_224", depth=1, embed_dim=96, num_heads=3, img_size=32),
        lambda: timm_model("cait_xxs24_224", depth=1, img_size=32),
        lambda: timm_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24),
        lambda: timm_model("samvit_base_patch16", depth=1, embed_dim=96, num_heads=3, img_size=64),
        zoo.hf("BeitModel", "BeitConfig", use_relative_position_bias=True, use_mean_pooling=False),
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
