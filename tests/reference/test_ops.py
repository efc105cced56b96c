"""The plain operators against torch's and timm's own modules in float64: nothing else checks the ground truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit import reference
from tests import nasty
from tests.tolerances import assert_close

D = 40
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def norm_module(norm, dim=D, eps=1e-3):
    return nasty.randomize(NORMS[norm](dim, eps=eps)).double()


def norm_arguments(module):
    return {"norm_weight": module.weight, "norm_bias": getattr(module, "bias", None), "eps": module.eps}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", *NORMS])
def test_norm_linear(norm, activation):
    x, linear = nasty.tokens(2, 5, D), nn.Linear(D, 24).double()
    module = norm_module(norm) if norm in NORMS else None
    y = reference.norm_linear(
        x, linear.weight, linear.bias, norm=norm, activation=activation, **(norm_arguments(module) if module else {})
    )
    assert_close(y, ACTIVATIONS[activation](linear(module(x) if module else x)))


def test_swiglu_packs_gate_before_value():
    x, linear = nasty.tokens(2, 5, D), nn.Linear(D, 24).double()
    gate, value = linear.weight.split(12), linear.bias.split(12)
    expected = F.silu(F.linear(x, gate[0], value[0])) * F.linear(x, gate[1], value[1])
    assert_close(reference.norm_linear(x, linear.weight, linear.bias, norm="none", activation="swiglu"), expected)


@pytest.mark.parametrize(("nq", "nk"), [(5, 5), (1, 50), (7, 3)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention(nq, nk, scale, with_bias):
    q, k, v = (nasty.tokens(2, n, 3, D, seed=i, massive=0) for i, n in enumerate((nq, nk, nk)))
    bias = torch.randn(2, 1, nq, nk, dtype=torch.float64) if with_bias else None
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias, scale=scale)
    actual = reference.attention(q, k, v, scale=scale, bias=bias)
    assert_close(actual, expected.transpose(1, 2).flatten(2))


def test_attention_of_a_fully_masked_row_is_zero_with_finite_gradients():
    q, k, v = (nasty.tokens(1, 4, 2, 8, seed=i).requires_grad_() for i in range(3))
    bias = torch.zeros(4, 4, dtype=torch.float64)
    bias[1] = float("-inf")
    out = reference.attention(q, k, v, bias=bias)
    out.sum().backward()
    assert (out[:, 1] == 0).all()
    assert out[:, 0].abs().min() > 0
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_attention_survives_products_beyond_float16():
    # 40 * 40 * 64 is more than float16 holds; an eighth of it is not.
    q, v = torch.full((1, 3, 1, 64), 40.0, dtype=torch.float16), torch.randn(1, 3, 1, 64).half()
    mean = v.double().mean(1, keepdim=True).expand(1, 3, 1, 64).flatten(2)
    heads_first, values = (t.transpose(1, 2) for t in (q, v))
    eager = ((heads_first * 0.125) @ heads_first.mT).softmax(-1) @ values
    assert_close(reference.attention(q, q, v), mean, eager=eager.transpose(1, 2).flatten(2))


def test_attention_qkvpacked():
    qkv = nasty.tokens(2, 5, 3 * D, massive=0)
    q, k, v = qkv.reshape(2, 5, 3, 4, D // 4).unbind(2)
    assert torch.equal(reference.attention_qkvpacked(qkv, 4, scale=0.5), reference.attention(q, k, v, scale=0.5))


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("drop_path", [False, True])
def test_linear_residual(layer_scale, drop_path):
    x, residual, linear = nasty.tokens(3, 5, 24), nasty.tokens(3, 5, D, seed=1), nn.Linear(24, D).double()
    gamma, factors = nasty.vector(D), torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64)
    expected = linear(x)
    if layer_scale:
        expected = expected * gamma
    if drop_path:
        expected = expected * factors[:, None, None]
    actual = reference.linear_residual(
        x,
        linear.weight,
        linear.bias,
        residual=residual,
        layer_scale=gamma if layer_scale else None,
        drop_path=factors if drop_path else None,
    )
    assert_close(actual, residual + expected)


@pytest.mark.parametrize("patch", [(4, 4), (3, 5), (1, 2)])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_patch_embed(patch, channels):
    conv = nn.Conv2d(channels, D, patch, stride=patch).double()
    image = torch.randn(2, channels, 3 * patch[0], 2 * patch[1], dtype=torch.float64)
    mean, std = nasty.vector(channels), nasty.vector(channels).abs() + 0.1
    positions, prefix = nasty.tokens(1, 6, D), nasty.tokens(1, 2, D, seed=3)
    normalised = (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    expected = conv(normalised).flatten(2).transpose(1, 2) + positions
    expected = torch.cat([prefix.expand(2, -1, -1), expected], dim=1)
    actual = reference.patch_embed(
        image, conv.weight, conv.bias, pos_embed=positions, prefix=prefix, mean=mean, std=std.tolist()
    )
    assert_close(actual, expected)


def test_patch_embed_of_bytes():
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    weight = nasty.weight(D, 3, 4, 4)
    assert_close(reference.patch_embed(image, weight), reference.patch_embed(image.double() / 255, weight))
    low = reference.patch_embed(image, weight.bfloat16(), mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["token", "avg", "norm_avg"])
def test_pool(mode, norm):
    x, module, head = nasty.tokens(2, 7, D, offset=1.0), norm_module(norm), nn.Linear(D, 5).double()
    expected = {
        "token": lambda: module(x[:, 0]),
        "avg": lambda: module(x[:, 2:].mean(1)),
        "norm_avg": lambda: module(x)[:, 2:].mean(1),
    }[mode]()
    arguments = {"mode": mode, "num_prefix_tokens": 2, "norm": norm, **norm_arguments(module)}
    assert_close(reference.pool(x, **arguments), expected)
    assert_close(reference.pool(x, weight=head.weight, bias=head.bias, **arguments), head(expected))


@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_compute_in_the_wider_one(x_dtype, dtype):
    x, weight, image = nasty.tokens(2, 5, D).to(x_dtype), nasty.weight(24, D).to(dtype), torch.randn(2, 3, 8, 8)
    assert_close(reference.norm_linear(x, weight), reference.norm_linear(x.double(), weight.double()))
    assert_close(reference.pool(x, weight=weight), reference.pool(x.double(), weight=weight.double()))
    patch = nasty.weight(D, 3, 4, 4).to(dtype)
    truth = reference.patch_embed(image.to(x_dtype).double(), patch.double())
    assert_close(reference.patch_embed(image.to(x_dtype), patch), truth)
    residual = torch.zeros(2, 5, 24, dtype=torch.bfloat16)
    assert reference.linear_residual(x, weight, residual=residual).dtype == torch.bfloat16
    assert reference.linear_residual(x, weight, residual=residual.float()).dtype == torch.float32


def test_vmap_over_samples():
    x, weight = nasty.tokens(3, 5, D), nasty.weight(3 * D, D)

    def sample(x):
        qkv = reference.norm_linear(x, weight)
        y = reference.attention_qkvpacked(qkv[None], 4)[0]
        return reference.linear_residual(y, weight[:D], residual=x)

    assert_close(torch.vmap(sample)(x), torch.stack([sample(t) for t in x]))
