"""self_attention and mlp, which are made of the other kernels: the same bits where they round alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import assert_close

MANY = 64  # samples whose intermediate results no cache holds: several blocks, in bfloat16 too


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    "samples, tokens, d, hidden", [(2, 29, 72, 173), (1, 1, 8, 1), (3, 50, 40, 4304), (MANY, 50, 16, 4096)]
)
def test_mlp(isa: str, dtype: torch.dtype, activation: str, samples: int, tokens: int, d: int, hidden: int) -> None:
    if samples == MANY and isa == "scalar":
        pytest.skip("slow in plain C++")
    rows = 2 * hidden if activation == "swiglu" else hidden
    vectors = [nasty.vector(n, seed) for seed, n in enumerate((rows, d, d, d, d), 2)]
    x, w1, w2, b1, b2, gain, shift, gamma = plain.cast(
        dtype, nasty.tokens(samples * tokens, d), nasty.weight(rows, d), nasty.weight(d, hidden), *vectors
    )
    factors = torch.arange(samples) * 0.5
    between = call.norm_linear(
        x, w1, b1, norm="layer", norm_weight=gain, norm_bias=shift, activation=activation, compute=dtype
    )
    scales = (gamma, factors)
    expected = call.linear_residual(between, w2, b2, x, *scales, rows_per_sample=tokens, compute=dtype)
    actual = call.mlp(x, w1, b1, w2, b2, gain, shift, activation, *scales, tokens, compute=dtype)
    if dtype == torch.float32 or isa in call.BF16_PRODUCTS:
        assert torch.equal(actual, expected)
        return
    # Multiplied as f32, the hidden activations are not rounded to bf16 in between.
    x, w1, b1, w2, b2, gain, shift, gamma, factors = plain.cast(torch.float64, x, w1, b1, w2, b2, gain, shift, *scales)
    hidden = plain.activated(F.linear(plain.normed(x, "layer", gain, shift), w1, b1), activation)
    truth = x + factors.repeat_interleave(tokens)[:, None] * gamma * F.linear(hidden, w2, b2)
    assert_close(actual, truth, eager=expected)


HALVES = [
    (rope, *shape)
    for rope in ("none", "half", "interleaved")
    for shape in ((2, 29, 3, 20, 72), (1, 1, 1, 1, 8), (MANY, 50, 8, 128, 16))
    if rope == "none" or (shape[3] % 2 == 0 and (rope, shape[0]) != ("interleaved", MANY))
]


@pytest.mark.parametrize("rope, samples, tokens, heads, head_dim, d", HALVES)
@pytest.mark.parametrize("packed", [True, False])
def test_self_attention(
    isa: str, dtype: torch.dtype, rope: str, packed: bool, samples: int, tokens: int, heads: int, head_dim: int, d: int
) -> None:
    if samples == MANY and isa == "scalar":
        pytest.skip("slow in plain C++")
    inner = heads * head_dim
    vectors = [nasty.vector(n, seed) for seed, n in enumerate((3 * inner, d, d, d, d), 2)]
    x, w, proj, b, proj_b, gain, shift, gamma = plain.cast(
        dtype, nasty.tokens(samples * tokens, d), nasty.weight(3 * inner, d), nasty.weight(d, inner, seed=9), *vectors
    )
    mask = nasty.vector(samples * tokens).view(samples, 1, 1, tokens).expand(-1, heads, tokens, -1).to(dtype)
    factors = torch.arange(samples) * 0.5
    qkv = call.norm_linear(x, w, b, norm="layer", norm_weight=gain, norm_bias=shift, compute=dtype)
    q, k, v = qkv.view(samples, tokens, 3, heads, head_dim).unbind(2)
    turns = (None, None)
    if rope != "none":
        turns = nasty.tokens(2, tokens - 1, head_dim, seed=7, massive=0).to(dtype).unbind()
        call.rotate(q, *turns, rope == "interleaved")
        call.rotate(k, *turns, rope == "interleaved")
    attended = call.attention(q, k, v, mask, compute=dtype).view(samples * tokens, inner)
    scales = (gamma, factors)
    expected = call.linear_residual(attended, proj, proj_b, x, *scales, rows_per_sample=tokens, compute=dtype)
    projections = [(w, b)] if packed else list(zip(w.chunk(3), b.chunk(3), strict=True))
    actual = call.self_attention(
        x,
        projections,
        proj,
        proj_b,
        gain,
        shift,
        mask,
        *scales,
        samples,
        heads,
        turns,
        rope == "interleaved",
        compute=dtype,
    )
    assert torch.equal(actual, expected)
