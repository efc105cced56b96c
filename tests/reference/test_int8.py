"""The plain int8 product: that its rotation is one, and that its rounding is as fine as it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit import reference
from fastvit.reference import int8
from tests import nasty
from tests.tolerances import INT8, assert_close, relative_l2

WIDTHS = (1, 15, 16, 17, 40, 64, 72, 88, 192, 768, 1152, 1408, 2730, 4304)


@settings(deadline=None)
@given(k=st.integers(1, 10_000))
def test_a_rotation_pads_little(k):
    block, padded = int8.rotation(k)
    assert padded % block == 0
    assert 0 <= padded - k < block
    assert padded - k <= k // 32 or block == 16


def test_blocks_of_common_widths():
    widths = {192: 64, 384: 128, 768: 256, 1024: 256, 1152: 128, 1280: 256, 1408: 128, 1536: 256, 3072: 256, 4304: 256}
    assert {k: int8.rotation(k)[0] for k in widths} == widths


@pytest.mark.parametrize("k", WIDTHS)
def test_a_rotation_changes_no_product(k):
    x, w = nasty.tokens(5, k), nasty.weight(7, k)
    assert_close(int8.rotate(x) @ int8.rotate(w).T, x @ w.T)
    assert_close(int8.rotate(x).norm(dim=-1), x.norm(dim=-1))


def test_the_signs_are_the_documented_hash():
    # Of a constant the transform sees the signs alone; undoing it gives them back.
    rotated = int8.rotate(torch.ones(1, 16, dtype=torch.float64)).view(16)
    h = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(16)] for i in range(16)], dtype=torch.float64)
    expected = []
    for i in range(16):
        n = i ^ i >> 16
        n = n * 0x7FEB352D % 2**32
        n ^= n >> 15
        n = n * 0x846CA68B % 2**32
        expected.append(1.0 - 2.0 * ((n ^ n >> 16) & 1))
    assert torch.equal((h @ rotated / 4).round(), torch.tensor(expected, dtype=torch.float64))
    assert len(set(expected)) == 2


def test_rows_are_rounded_to_the_nearest_of_their_steps():
    y = nasty.tokens(9, 64)
    q, scale = int8.quantize(y)
    assert q.dtype == torch.int8
    assert (q.abs().amax(-1) == 127).all()
    assert ((q * scale[:, None] - y).abs() <= 0.5000001 * scale[:, None]).all()
    assert torch.equal(int8.quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5]]))[0], torch.tensor([[127, 0, 2, -2]]))


def test_zeros_nan_and_infinity():
    y = torch.ones(4, 32)
    y[0] = 0.0
    y[1, 5], y[2, 7] = float("nan"), float("-inf")
    q, scale = int8.quantize(y)
    assert scale[0] == 0
    assert (q[0] == 0).all()
    assert scale[1:3].isnan().all()
    out = int8.linear(y, nasty.weight(3, 32), torch.ones(3))
    assert torch.equal(out[0], torch.ones(3))
    assert out[1:3].isnan().all()
    assert out[3].isfinite().all()
    assert int8.linear(torch.empty(2, 0), torch.empty(3, 0), torch.ones(3)).eq(1).all()


@pytest.mark.parametrize("k", [64, 192, 768, 1152])
def test_massive_channels_cost_what_gaussian_ones_do(k):
    """What the rotation is for: after a norm, three massive channels would leave the others a bit or two."""
    w = nasty.weight(96, k)
    x = torch.nn.functional.layer_norm(nasty.tokens(50, k), (k,))
    truth = x @ w.T
    (qx, sx), (qw, sw) = int8.quantize(x), int8.quantize(w)
    plain = (qx.double() @ qw.double().T) * sx[:, None] * sw
    rotated = relative_l2(int8.linear(x, w), truth)
    assert rotated < 0.013
    # The massive channels are most of the product; what they would do to the rest shows in a product without them.
    w = w.masked_fill(x.abs().amax(0) > 5.0, 0.0)
    truth = x @ w.T
    plain = (qx.double() @ int8.quantize(w)[0].double().T) * sx[:, None] * int8.quantize(w)[1]
    assert relative_l2(plain, truth) > 1.5 * relative_l2(int8.linear(x, w), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators(dtype):
    x, w1, w2 = nasty.tokens(2, 9, 64), nasty.weight(160, 64), nasty.weight(64, 80)
    norm = {"norm_weight": nasty.vector(64, 3, 1.0), "norm_bias": nasty.vector(64, 4)}
    hidden = reference.norm_linear(x, w1, None, **norm, activation="swiglu")
    cast = lambda t: t.to(dtype)  # noqa: E731
    low = {k: cast(v) for k, v in norm.items()}
    mine = reference.norm_linear(cast(x), cast(w1), None, **low, activation="swiglu", quantize="int8")
    assert mine.dtype == dtype
    assert 1e-4 < relative_l2(mine, hidden) < INT8
    residual = torch.zeros_like(x)
    out = reference.linear_residual(cast(hidden), cast(w2), residual=cast(residual), quantize="int8")
    assert out.dtype == dtype
    assert 1e-4 < relative_l2(out, hidden @ w2.T) < INT8


@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (3, 5), (1, 1)])
def test_a_patch_weight_passes_its_rounding_errors_on(patch):
    weight, mean, std = nasty.weight(9, 3, *patch), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    weight[4] = 0.0
    values, scale, _ = int8.patch_weight(weight, mean, std)
    assert values.dtype == torch.int8
    assert values.shape == weight.shape
    assert values.flatten(1).abs().amax() <= 127
    assert (values.flatten(1).abs().amax(1)[scale > 0] >= 125).all()
    exact = weight / (255 * torch.tensor(std, dtype=torch.float64)).view(3, 1, 1)
    errors = (values * scale.double().view(-1, 1, 1, 1) - exact) / scale.double().clamp(min=1e-30).view(-1, 1, 1, 1)
    assert errors.abs().amax() <= 1.001
    # However many pixels are summed from the first on, in the order of the passing on: half a step.
    ordered = errors.flatten(1, 2).clone()
    ordered[:, 1::2] = ordered[:, 1::2].flip(2)
    assert ordered.flatten(1).cumsum(1).abs().amax() <= 0.501
    # A patch of the mean is a normalised patch of zeros.
    means = 255 * torch.tensor(mean, dtype=torch.float64).repeat_interleave(patch[0] * patch[1])
    assert int8.patches(means, weight, mean, std).abs().amax() <= 1e-4 * weight.norm()


def test_a_patch_weight_that_is_not_finite_is_never_a_number():
    weight = nasty.weight(4, 3, 4, 4)
    weight[1, 0, 2, 3], weight[2, 2, 0, 0] = torch.nan, torch.inf
    products = int8.patches(torch.full((5, 48), 7, dtype=torch.uint8), weight, None, None)
    assert products.isnan().any(0).tolist() == [False, True, True, False]
    assert products.isnan().all(0).tolist() == [False, True, True, False]
