"""Modules against the same formula in plain torch, in float64 and in training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit import nn as fnn
from fastvit import ops
from tests import nasty
from tests.tolerances import assert_close


def plain_block(block: fnn.Block, x: torch.Tensor) -> torch.Tensor:
    """The block as the papers write it, module by module."""
    attn = block.attn
    b, n, c = x.shape
    q, k, v = attn.qkv(block.norm1(x)).view(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
    x = x + block.ls1(attn.proj(out.transpose(1, 2).reshape(b, n, c)))
    hidden = block.mlp.fc1(block.norm2(x))
    if isinstance(block.mlp, fnn.SwiGLU):
        gate, value = hidden.chunk(2, -1)
        hidden = F.silu(gate) * value
    else:
        hidden = block.mlp.act(hidden)
    return x + block.ls2(block.mlp.fc2(hidden))


class OwnNorm(torch.nn.Module):
    """A norm that the operators lack: per-token L2 normalisation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1) * self.weight


OPTIONS = {
    "vit": {"qkv_bias": True},
    "layer_scale": {"init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "rms": {"norm_layer": "rms", "qk_norm": True, "proj_bias": False},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "own_activation": {"act_layer": torch.nn.Mish},
    "own_norm": {"norm_layer": OwnNorm},
    "swiglu": {"mlp_layer": fnn.SwiGLU, "mlp_ratio": 2.0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_block(options, dtype):
    block = nasty.randomize(fnn.Block(64, 2, **options)).to(dtype).eval()
    x = nasty.tokens(2, 50, 64).to(dtype)
    with torch.no_grad():
        actual, eager = block(x), plain_block(block, x)
        truth = plain_block(block.double(), x.double())
    assert_close(actual, truth, eager=eager)


def test_block_gradients():
    block = nasty.randomize(fnn.Block(64, 2, qkv_bias=True, init_values=0.1, qk_norm=True)).double()
    x = nasty.tokens(2, 5, 64)
    plain_block(block, x).square().sum().backward()
    expected = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    block.float()(x.float()).square().sum().backward()
    for (name, p), e in zip(block.named_parameters(), expected, strict=True):
        if name == "attn.k_norm.bias":
            # It moves every logit of a row alike, and softmax doesn't see that: exactly zero but for rounding.
            assert p.grad.norm() < 1e-5 * block.attn.q_norm.bias.grad.norm()
        else:
            assert_close(p.grad, e)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_first_tokens_alone(options, hooked):
    block = nasty.randomize(fnn.Block(64, 2, **options)).eval()
    x = nasty.tokens(2, 50, 64).float()
    mask = torch.zeros(2, 1, 50, 50)
    mask[0, :, :, 30:] = mask[:, :, 1, :20] = float("-inf")
    if hooked:
        block.attn.register_forward_hook(lambda module, args, out: None)
    for given in (None, mask, mask[:, :, :1]):
        assert_close(block(x, given, tokens=3), block(x, given)[:, :3].double())


REGISTER = {
    "forward": "register_forward_hook",
    "pre": "register_forward_pre_hook",
    "backward": "register_full_backward_hook",
}


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_hook_on_any_module_inside_fires(options, kind):
    block = nasty.randomize(fnn.Block(64, 2, **options))
    x = nasty.tokens(2, 5, 64).float().requires_grad_()
    expected = block(x)
    for name, module in list(block.named_modules())[1:]:
        calls = []
        handle = getattr(module, REGISTER[kind])(lambda *a, calls=calls: calls.append(1))
        out = block(x)
        out.sum().backward()
        handle.remove()
        assert calls == [1], name
        assert_close(out, expected.double())
    assert torch.equal(block(x), expected)


def test_a_hook_changes_what_the_block_computes():
    block = nasty.randomize(fnn.Block(64, 2, init_values=0.3))
    x = nasty.tokens(2, 5, 64).float()
    block.attn.register_forward_hook(lambda module, args, out: out * 0.0)
    block.mlp.fc2.register_forward_pre_hook(lambda module, args: (args[0] * 0.0,))
    assert_close(block(x), (x + block.ls2(block.mlp.fc2.bias)).double())


def test_a_global_hook_sees_every_module_that_computes():
    block = nasty.randomize(fnn.Block(64, 2, init_values=0.3, qk_norm=True, drop_path=0.1))
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        block(torch.randn(2, 5, 64))
    finally:
        handle.remove()
    assert sorted(map(id, seen)) == sorted(id(m) for m in block.modules() if m is not block.attn.attn_drop)


def test_a_hook_on_the_dropout_of_weights_sees_the_weights():
    attn, seen = nasty.randomize(fnn.Attention(64, 2)).eval(), []
    x = nasty.tokens(2, 5, 64, massive=0).float()
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, :, :, 3:] = mask[1, :, 2] = float("-inf")
    expected = attn(x, mask)
    attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    assert_close(attn(x, mask), expected.double())
    q, k, _ = attn.double().qkv(x.double()).view(2, 5, 3, 2, 32).permute(2, 0, 3, 1, 4)
    assert_close(seen[0], (q @ k.mT * 32**-0.5 + mask).softmax(-1).nan_to_num())
    with pytest.raises(ValueError, match="attn_drop: with key_mask there are no weights"):
        attn.float()(x, key_mask=torch.ones(2, 5, dtype=torch.bool))


class LoRA(torch.nn.Module):
    """A linear with more to it, which shows its weight as if it had not."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_layer_that_was_replaced_is_called(name):
    block = nasty.randomize(fnn.Block(64, 2)).eval()
    block.set_submodule(name, LoRA(block.get_submodule(name)))
    block.attn.attn_drop = torch.nn.Identity()
    x = nasty.tokens(2, 5, 64).float()
    assert_close(block(x), plain_block(block.double(), x.double()))


def test_a_hook_on_any_module_of_an_attention_pool_fires():
    pool = nasty.randomize(fnn.AttentionPool(64, 2))
    x = nasty.tokens(3, 50, 64, massive=0).float()
    expected = pool(x)
    for name, module in list(pool.named_modules())[1:]:
        calls = []
        handle = module.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        assert_close(pool(x), expected.double())
        handle.remove()
        assert calls == [1], name


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_hook_on_the_patch_projection_fires(layout, dtype):
    embed = nasty.randomize(fnn.PatchEmbed(16, 8, embed_dim=24, mean=[0.5] * 3, std=[0.3] * 3, layout=layout))
    shape = (2, 3, 19, 17) if layout == "NCHW" else (2, 19, 17, 3)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=nasty.generator()).to(dtype)
    given, calls = {"pos_embed": torch.randn(1, 4, 24), "prefix": torch.randn(1, 2, 24)}, []
    expected = embed(image, **given)
    embed.proj.register_forward_hook(lambda *a: calls.append(1))
    assert_close(embed(image, **given), expected.double())
    assert calls == [1]


def test_integer_patches_are_for_bytes():
    kwargs = {"embed_dim": 24, "mean": [0.5] * 3, "std": [0.3] * 3}
    embed = nasty.randomize(fnn.PatchEmbed(16, 8, **kwargs, quantize="int8"))
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=nasty.generator())
    numbers = {"mean": embed.mean, "std": embed.std, "quantize": "int8"}
    assert torch.equal(embed(image), ops.patch_embed(image, embed.proj.weight, embed.proj.bias, **numbers))
    plain = fnn.PatchEmbed(16, 8, **kwargs)
    plain.load_state_dict(embed.state_dict())
    assert torch.equal(embed(image / 255), plain(image / 255))
    assert not torch.equal(embed(image), plain(image))


def test_attention_options():
    """What the operator takes, the module passes on."""
    attn = nasty.randomize(fnn.Attention(64, 2, qkv_bias=True)).eval()
    x = torch.randn(2, 12, 64)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    alone = torch.cat([attn(x[:1]), attn(x[1:, :7])], 1)
    masked = attn(x, key_mask=mask)
    assert_close(torch.cat([masked[:1], masked[1:, :7]], 1), alone.double())
    windows = attn(x, grid=(4, 3), window=(2, 3))
    assert_close(windows[:, :6], attn(x[:, :6]).double())


def test_attention_mask():
    attn = nasty.randomize(fnn.Attention(64, 2))
    x = nasty.tokens(2, 5, 64, massive=0).float()
    mask = torch.zeros(2, 1, 1, 5)
    mask[..., 3:] = float("-inf")
    changed = x.clone()
    changed[:, 3:] += 1.0
    assert torch.equal(attn(x, mask)[:, :3], attn(changed, mask)[:, :3])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = nasty.randomize(fnn.Block(32, 2, drop_path=0.5)).train()
    x = torch.randn(64, 3, 32)
    factors = block.drop_path1.factors(x)
    assert set(factors.tolist()) == {0.0, 2.0}
    out = block(x)
    untouched = (out == x).flatten(1).all(1)
    assert 4 <= untouched.sum() <= 32  # both branches dropped: a quarter of 64
    assert block.eval().drop_path1.factors(x) is None
    assert_close(block(x), plain_block(block.double(), x.double()))


@pytest.mark.parametrize("where", [{"attn_drop": 0.5}, {"proj_drop": 0.5}])
def test_dropout_acts_in_training_only(where):
    block = nasty.randomize(fnn.Block(32, 2, init_values=0.3, **where))
    x = torch.randn(2, 5, 32)
    block.train()
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_attention_pool():
    pool = nasty.randomize(fnn.AttentionPool(64, 2))
    x = nasty.tokens(3, 50, 64, massive=0)
    p = pool.double()
    q = p.q(p.latent.expand(3, -1, -1)).view(3, 1, 2, 32).transpose(1, 2)
    k, v = p.kv(x).view(3, 50, 2, 2, 32).permute(2, 0, 3, 1, 4)
    pooled = p.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 1, 64))
    truth = (pooled + p.mlp.fc2(F.gelu(p.mlp.fc1(p.norm(pooled)))))[:, 0]
    assert_close(pool.float()(x.float()), truth)


def test_patch_embed_accepts_uint8_and_any_size():
    embed = nasty.randomize(fnn.PatchEmbed(32, 8, in_chans=12, embed_dim=24, mean=[0.5] * 12, std=[0.25] * 12))
    image = torch.randint(0, 256, (2, 12, 19, 41), dtype=torch.uint8)
    normalised = (image.double() / 255 - 0.5) / 0.25
    truth = embed.double().proj(normalised).flatten(2).transpose(1, 2)
    assert_close(embed.float()(image), truth)


def test_layers_alone():
    x = torch.randn(2, 5, 8)
    scale = fnn.LayerScale(8, 0.5)
    assert torch.equal(scale(x), x * 0.5)
    assert torch.equal(fnn.DropPath(0.5).eval()(x), x)
    assert torch.equal(fnn.QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    mlp = nasty.randomize(fnn.MLP(8, 12, 6)).double()
    assert_close(mlp.float()(x), mlp.double().fc2(F.gelu(mlp.fc1(x.double()))))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_decoders(channels):
    # (B, H, W, C), with pixels beyond the last whole patch on both sides.
    args = {"in_chans": channels, "mean": [0.4] * channels, "std": [0.3] * channels}
    embed = nasty.randomize(fnn.PatchEmbed(32, (14, 8), embed_dim=24, layout="NHWC", **args))
    image = torch.randint(0, 256, (2, 31, 44, channels), dtype=torch.uint8, generator=nasty.generator())
    normalised = (image.permute(0, 3, 1, 2).double() / 255 - 0.4) / 0.3
    truth = embed.double().proj(normalised).flatten(2).transpose(1, 2)
    assert_close(embed.float()(image), truth)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fnn.Attention(64, 5), "num_heads: 5"),
        (lambda: fnn.AttentionPool(64, 0), "num_heads: 0"),
        (lambda: fnn.Block(64, 2, act_layer="swish"), "act_layer: 'swish'"),
        (lambda: fnn.Block(64, 2, norm_layer="batch"), "norm_layer: 'batch'"),
        (lambda: fnn.SwiGLU(8, 15), "hidden_features: 15"),
        (lambda: fnn.DropPath(1.0), "drop_prob: 1.0"),
        (lambda: fnn.PatchEmbed(8, 16), "img_size"),
        (lambda: fnn.PatchEmbed(16, 8, layout="CHW"), "layout: 'CHW'"),
        (lambda: fnn.PatchEmbed(16, 8, quantize="fp8"), "quantize: 'fp8'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
