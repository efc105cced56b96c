from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvit import ops, reference
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients
from tests.tolerances import assert_close


def arguments(b, nq, h, d, nk=None):
    nk = nq if nk is None else nk
    return tuple(nasty.tokens(b, n, h, d, seed=i, massive=0) * 2.0 for i, n in enumerate((nq, nk, nk)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", nasty.TOKEN_COUNTS)
def test_token_counts(tokens, backend, dtype):
    check("attention", *arguments(2, tokens, 3, 64), dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", nasty.HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    check("attention", *arguments(1, 50, 2, head_dim), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("nq", "nk"), [(1, 196), (5, 577), (70, 3)])
def test_cross_attention(nq, nk, dtype):
    check("attention", *arguments(2, nq, 2, 72, nk), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequence(dtype):
    check("attention", *arguments(1, 1370, 1, 64), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 50, 50), (1, 3, 50, 50), (2, 1, 1, 50), (50, 50), (1,)])
def test_bias(shape, dtype):
    bias = torch.randn(shape, generator=nasty.generator(7), dtype=torch.float64)
    check("attention", *arguments(2, 50, 3, 32), bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_and_rows(dtype):
    bias = torch.zeros(2, 1, 50, 50, dtype=torch.float64)
    bias[0, :, :, 37:] = float("-inf")
    bias[1, :, 11] = float("-inf")
    out = check("attention", *arguments(2, 50, 3, 32), bias=bias, dtype=dtype)
    assert (out[1, 11] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "least"),
    [
        (torch.float32, -1e30),
        (torch.float32, torch.finfo(torch.bfloat16).min),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.bfloat16, -1e30),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min),
    ],
)
@pytest.mark.parametrize("nk", [50, 3000])  # in one chunk of keys and in several
def test_the_least_float_masks_a_key_but_not_a_row(nk, dtype, least, backend):
    bias = torch.full((50, nk), least, dtype=torch.float64)
    bias[:10, :7], bias[10:20, -7:], bias[20] = 0.0, 0.0, float("-inf")
    out = check("attention", *arguments(2, 50, 2, 32, nk=nk), bias=bias, dtype=dtype, backend=backend)
    assert not out[:, 20].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e2, 1e3, 1e6])
def test_one_key_gives_its_value_however_large_the_logit(size, dtype):
    q, k, v = arguments(2, 5, 2, 64, nk=1)
    check("attention", q * size, k * size, v, dtype=dtype)  # in bfloat16 without any error, as eager


def test_scale():
    check("attention", *arguments(1, 50, 2, 64), scale=0.3, dtype=torch.float32)


def test_logits_beyond_exp():
    # Scores of +-2000 overflow exp in float32 unless the row's maximum is taken off first.
    q, k, v = arguments(1, 50, 1, 64)
    check("attention", q * 40, k * 2, v, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_qkv_is_read_in_place(dtype):
    qkv = nasty.tokens(2, 197, 3 * 4 * 32, massive=0)
    out = check("attention_qkvpacked", qkv, 4, dtype=dtype)
    q, k, v = qkv.to(dtype).view(2, 197, 3, 4, 32).unbind(2)
    assert torch.equal(out, ops.attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_first_layout(dtype):
    # (B, H, N, D) storage, as transformers makes it, seen as (B, N, H, D).
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments(2, 50, 3, 64))
    check("attention", q, k, v, dtype=dtype)


def test_last_dimension_with_a_stride():
    check("attention", *arguments(1, 9, 2, 32), dtype=torch.float32, layout=lambda t: nasty.strided(t, "transposed"))


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (3, 0, 2, 8), (0, 2, 8)])
def test_empty(shape):
    q = torch.empty(shape, requires_grad=True)
    options = {"cu_seqlens": torch.zeros(3, dtype=torch.int32)} if len(shape) == 3 else {}
    out = ops.attention(q, q, q, **options)
    assert out.shape == (*shape[:-2], 16)
    out.sum().backward()
    assert q.grad.shape == shape


@settings(deadline=None, max_examples=30)
@given(nq=st.integers(1, 80), nk=st.integers(1, 300), h=st.integers(1, 3), d=st.integers(1, 130), bf16=st.booleans())
def test_any_shape(nq, nk, h, d, bf16):
    assume(nq * h * d >= 16)  # fewer may cancel to nearly nothing, and relative error with them
    check("attention", *arguments(1, nq, h, d, nk), dtype=torch.bfloat16 if bf16 else torch.float32)


def test_gradients():
    bias = torch.randn(2, 1, 5, 7, generator=nasty.generator(7), dtype=torch.float64)
    check_gradients("attention", *arguments(2, 5, 2, 8, 7), bias=bias)


def normal(*shape, seed=7):
    return torch.randn(*shape, generator=nasty.generator(seed), dtype=torch.float64)


def same_as_bias(q, k, v, bias, **options):
    """An option that adds `bias` to the logits: in every dtype, forward and backward."""
    expected = reference.attention(q, k, v, bias=bias)
    assert_close(ops.attention(q, k, v, **options), expected)
    for dtype in DTYPES:
        check("attention", q, k, v, dtype=dtype, **options)
    check_gradients("attention", q, k, v, **options)


def test_key_mask():
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 20:] = False
    mask[1] = False
    q, k, v = arguments(2, 9, 2, 16, 30)
    same_as_bias(q, k, v, torch.zeros(2, 1, 1, 30).masked_fill(~mask[:, None, None], float("-inf")), key_mask=mask)
    assert not ops.attention(q, k, v, key_mask=mask)[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(dtype):
    lengths = [3, 0, 17, 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (t[0] for t in arguments(1, 21, 2, 16))
    out = check("attention", q, k, v, cu_seqlens=bounds, dtype=dtype)
    low = [t.to(dtype).split([n for n in lengths if n]) for t in (q, k, v)]
    eager, exact = (
        torch.cat([reference.attention(*(t.to(d)[None] for t in qkv))[0] for qkv in zip(*low, strict=True)])
        for d in (dtype, torch.float64)
    )
    assert_close(out, exact, eager=eager)
    packed = torch.stack([q, k, v], 1).flatten(1).to(dtype)
    assert torch.equal(ops.attention_qkvpacked(packed, 2, cu_seqlens=bounds), out)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved):
    """A rotation of complex numbers; prefix tokens stay."""
    q, k, v = arguments(2, 13, 2, 16)
    angle = normal(12, 8)
    pairs = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat([t, t], -1))
    rope = pairs(angle.cos()), pairs(angle.sin())

    def turned(t):
        pair = t[:, 1:].unflatten(-1, (8, 2) if interleaved else (2, 8))
        pair = (pair if interleaved else pair.transpose(-1, -2)).contiguous()
        pair = torch.view_as_real(torch.view_as_complex(pair) * torch.polar(torch.ones_like(angle), angle)[:, None])
        return torch.cat([t[:, :1], (pair if interleaved else pair.transpose(-1, -2)).flatten(-2)], 1)

    options = {"rope": rope, "rope_interleaved": interleaved}
    assert_close(ops.attention(q, k, v, **options), reference.attention(turned(q), turned(k), v))
    low = {"rope": tuple(t.float() for t in rope), "rope_interleaved": interleaved}
    assert_close(ops.attention(q.float(), k.float(), v.float(), **low), reference.attention(turned(q), turned(k), v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [2, 6, *nasty.HEAD_DIMS])
def test_rope_of_any_head_dim(head_dim, interleaved, backend, dtype):
    # Halves of one tensor, as timm has them.
    cos, sin = normal(12, 2 * head_dim).chunk(2, -1)
    q, k, v = arguments(2, 17, 2, head_dim)
    given = [t.to(dtype) for t in (q, k, v)]
    low = {"rope": (cos.to(dtype), sin.to(dtype)), "rope_interleaved": interleaved}
    truth = reference.attention(
        *(t.double() for t in given), rope=tuple(t.double() for t in low["rope"]), rope_interleaved=interleaved
    )
    with ops.use_backend(backend):
        actual = ops.attention(*given, **low)
    assert_close(actual, truth, eager=reference.attention(*given, **low))
    assert all(torch.equal(a, t.to(dtype)) for a, t in zip(given, (q, k, v), strict=True))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_qk_norm(kind):
    q, k, v = arguments(2, 9, 2, 16)
    weights = {f"{t}_norm_weight": nasty.vector(16, seed=i, mean=1.0) for i, t in enumerate("qk")}
    biases = {f"{t}_norm_bias": nasty.vector(16, seed=i) for i, t in enumerate("qk")} if kind == "layer" else {}

    def normed(t, name):
        shift = t.mean(-1, keepdim=True) if kind == "layer" else 0.0
        hat = (t - shift) / ((t - shift).square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return hat * weights[f"{name}_norm_weight"] + biases.get(f"{name}_norm_bias", 0.0)

    options = {"qk_norm": kind, "qk_norm_eps": 1e-5, **weights, **biases}
    assert_close(ops.attention(q, k, v, **options), reference.attention(normed(q, "q"), normed(k, "k"), v))
    for dtype in DTYPES:
        check("attention", q, k, v, dtype=dtype, **options)
    # Without a rotation k_norm_bias has none: it adds the same to all logits of a row.
    check_gradients("attention", q, k, v, rope=(normal(8, 16).cos(), normal(8, 16).sin()), **options)


def test_decomposed_relative_positions():
    rows, columns = normal(2, 2, 12, 3), normal(2, 2, 12, 4, seed=8)
    bias = torch.stack([rows[..., n // 4] + columns[..., n % 4] for n in range(12)], -1)
    q, k, v = arguments(2, 12, 2, 16)
    assert_close(ops.attention(q, k, v, rel_pos=(rows, columns)), reference.attention(q, k, v, bias=bias))
    low = [t.float() for t in (q, k, v, rows, columns)]
    assert_close(ops.attention(*low[:3], rel_pos=(low[3], low[4])), reference.attention(q, k, v, bias=bias))


@pytest.mark.parametrize("prefix", [0, 1])
def test_table(prefix):
    """Entry by entry, as Swin and BEiT number them."""
    table = normal(5 * 7 + 3 * prefix, 2)
    n = 12 + prefix
    bias = torch.empty(2, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            (y, x), (v, u) = divmod(i - prefix, 4), divmod(j - prefix, 4)
            entry = (y - v + 2) * 7 + x - u + 3
            if prefix and 0 in (i, j):
                entry = {(True, False): -3, (False, True): -2, (True, True): -1}[i == 0, j == 0]
            bias[:, i, j] = table[entry]
    same_as_bias(*arguments(2, n, 2, 16), bias, bias_table=table, grid=(3, 4))
    index = reference.relative_index(3, 4, prefix)
    same_as_bias(*arguments(2, n, 2, 16), bias, bias_table=table, bias_index=index)


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
def test_windows(shift):
    """A token sees those of its window, in the shifted image, that were its neighbours before."""
    height, width, (down, across) = 8, 6, (4, 3)
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    shifted_y, shifted_x = (y - shift[0]) % height, (x - shift[1]) % width
    label = torch.stack([shifted_y // down, shifted_x // across, (y < shift[0]).int(), (x < shift[1]).int()])
    sees = (label[:, :, None] == label[:, None]).all(0)
    bias = torch.zeros(48, 48, dtype=torch.float64).masked_fill(~sees, float("-inf"))
    table = normal(7 * 5, 2)
    local_y, local_x = shifted_y % down, shifted_x % across
    entry = (local_y[:, None] - local_y + 3) * 5 + local_x[:, None] - local_x + 2
    options = {"grid": (height, width), "window": (down, across), "shift": shift}
    same_as_bias(*arguments(2, 48, 2, 16), bias, **options)
    bias = bias + torch.where(sees[..., None], table[entry.clamp(0, 34)], 0.0).permute(2, 0, 1)
    same_as_bias(*arguments(2, 48, 2, 16), bias, bias_table=table, **options)


@pytest.mark.parametrize(("word", "first"), [(0, 0x6627E8D5), (0xFFFFFFFF, 0x408F276D)])
def test_philox(word, first):
    """The known answers of its authors."""
    counter = torch.tensor(word)
    seed = torch.tensor([word | word << 32 if word < 2**31 else -1])
    assert reference.ops.philox(seed, *[counter] * 4).item() == first


def test_dropout():
    q, k, _ = arguments(2, 64, 2, 16)
    eye = torch.eye(64, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    seed = torch.tensor([5])
    q, k = (torch.nn.functional.pad(t, (0, 48)) for t in (q, k))  # v = 1 shows the weights
    weights = ops.attention(q, k, eye)
    dropped = ops.attention(q, k, eye, dropout_p=0.25, dropout_seed=seed)
    kept = dropped != 0
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    assert_close(dropped[kept], weights[kept] / 0.75)
    assert torch.equal(dropped, ops.attention(q, k, eye, dropout_p=0.25, dropout_seed=seed))
    torch.manual_seed(3)
    drawn = ops.attention(q, k, eye, dropout_p=0.25)
    assert not torch.equal(drawn != 0, kept)
    torch.manual_seed(3)
    assert torch.equal(drawn, ops.attention(q, k, eye, dropout_p=0.25))


@pytest.mark.parametrize(
    "options",
    [
        {"key_mask": torch.tensor([[True, False, True, True]])},
        {"cu_seqlens": torch.tensor([0, 1, 4]).int()},
        {"rel_pos": (normal(1, 2, 4, 2), normal(1, 2, 4, 2))},
        {"bias_table": normal(9, 2), "grid": (2, 2)},
        {"grid": (2, 2), "window": (2, 1), "shift": (1, 0)},
        {"dropout_p": 0.3, "dropout_seed": torch.tensor([3])},
        {"qk_norm": "layer", "q_norm_weight": normal(4), "k_norm_bias": normal(4)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_gradcheck(options):
    operands = [t.requires_grad_() for t in arguments(1, 4, 2, 4)]
    names = [n for n, o in options.items() if isinstance(o, torch.Tensor) and o.is_floating_point()]

    def run(q, k, v, *learned):
        return ops.attention(q, k, v, **options | dict(zip(names, learned, strict=True)))

    assert torch.autograd.gradcheck(run, (*operands, *(options[n].requires_grad_() for n in names)))


def test_everything_compiles():
    options = {"grid": (4, 6), "window": (2, 3), "shift": (1, 1), "qk_norm": "rms", "dropout_p": 0.2}
    rope = normal(24, 8).float(), normal(24, 8).float()
    operands = [t.float().requires_grad_() for t in (*arguments(1, 24, 2, 8), normal(15, 2))]
    seed = torch.tensor([3])

    def run(q, k, v, table):
        return ops.attention(q, k, v, bias_table=table, rope=rope, dropout_seed=seed, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(*operands).square().sum(), operands)
    actual = torch.autograd.grad(compiled(*operands).square().sum(), operands)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.double())


def test_cpp_says_what_it_lacks():
    q, k, v = (t.float() for t in arguments(1, 4, 2, 8))
    with ops.use_backend("cpp"), pytest.raises(RuntimeError, match="scale, bias and rope alone"):
        ops.attention(q, k, v, dropout_p=0.1)


def test_autocast():
    q, k, v = (t.float() for t in arguments(2, 50, 3, 64))
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.attention(q, k, v)
    eager = reference.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert_close(actual, reference.attention(q.double(), k.double(), v.double()), eager=eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 24)}, ValueError, "q: shape"),
        ({"k": torch.zeros(2, 5, 3, 9)}, ValueError, "k: shape"),
        ({"v": torch.zeros(2, 6, 3, 8)}, ValueError, "v: shape"),
        ({"q": torch.zeros(())}, ValueError, "q: shape"),
        ({"v": None}, TypeError, "v: NoneType"),
        ({"scale": "half"}, TypeError, "scale: str"),
        ({"k": torch.zeros(2, 0, 3, 8), "v": torch.zeros(2, 0, 3, 8)}, ValueError, "no keys"),
        ({"bias": torch.zeros(2, 3, 5, 4)}, ValueError, "bias: shape"),
        ({"bias": torch.zeros(5, 5, dtype=torch.bool)}, TypeError, "bias: dtype"),
        ({"k": torch.zeros(2, 5, 3, 8).double()}, TypeError, "k: dtype"),
        ({"key_mask": torch.zeros(2, 5)}, TypeError, "key_mask: dtype"),
        ({"key_mask": torch.zeros(2, 4).bool()}, ValueError, "key_mask: shape"),
        ({"cu_seqlens": torch.zeros(2).int()}, ValueError, "cu_seqlens: q"),
        ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: dtype"),
        ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: list"),
        (
            {"cu_seqlens": torch.zeros(2).int(), "bias": torch.zeros(5, 5)},
            ValueError,
            "cu_seqlens: not served together with bias",
        ),
        ({"rope": (torch.zeros(6, 8), torch.zeros(6, 8))}, ValueError, "rope: shapes"),
        ({"rope": torch.zeros(5, 8)}, TypeError, "rope: Tensor"),
        ({"rope": (torch.zeros(5, 8),) * 3}, TypeError, "rope: 3 values"),
        ({"rope": (torch.zeros(5, 8), None)}, TypeError, "rope: None for one"),
        ({"qk_norm": "batch"}, ValueError, "qk_norm: 'batch'"),
        ({"q_norm_weight": torch.zeros(8)}, ValueError, "qk_norm: 'none' takes no q_norm_weight"),
        ({"qk_norm": "layer", "k_norm_weight": torch.zeros(7)}, ValueError, "^k_norm_weight: shape"),
        ({"rel_pos": (torch.zeros(2, 3, 5, 2), torch.zeros(2, 3, 5, 3))}, ValueError, "rel_pos: 2 rows"),
        ({"bias_table": torch.zeros(9, 3)}, ValueError, "needs bias_index"),
        ({"bias_table": torch.zeros(9, 3), "grid": (2, 2)}, ValueError, "9 entries"),
        ({"bias_table": torch.zeros(9, 2), "grid": (2, 2)}, ValueError, "bias_table: shape"),
        ({"bias_index": torch.zeros(5, 5).int()}, ValueError, "without bias_table"),
        ({"bias_table": torch.zeros(9, 3), "bias_index": torch.zeros(5, 5).bool()}, TypeError, "bias_index: dtype"),
        ({"bias_table": torch.zeros(9, 3), "bias_index": torch.full((5, 5), 9)}, ValueError, "bias_index: values"),
        ({"bias_table": torch.zeros(9, 3), "bias_index": torch.full((5, 5), -1)}, ValueError, "bias_index: values"),
        ({"window": (1, 2)}, ValueError, "grid: None"),
        ({"shift": (1, 0)}, ValueError, "window: None"),
        ({"window": (1, 2), "grid": (1, 5)}, ValueError, "window: "),
        ({"window": (1,), "grid": (1, 5)}, ValueError, r"window: \(1,\)"),
        ({"window": (1, 5), "grid": (1, 5), "shift": (0, 5)}, ValueError, "shift: "),
        ({"window": (1, 5), "grid": (1, 5), "key_mask": torch.ones(2, 5).bool()}, ValueError, "window: not served"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: 1.0"),
        ({"dropout_p": 0.5, "dropout_seed": torch.zeros(1)}, TypeError, "dropout_seed"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {name: torch.zeros(2, 5, 3, 8) for name in "qkv"} | change
    with pytest.raises(error, match=message):
        ops.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("bounds", [(0, 4), (0, 6), (1, 5), (0, 3, 2, 5), (0, -1, 5)])
def test_bad_bounds_of_packed_sequences(bounds):
    q = torch.zeros(5, 3, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens: \[.*accepted: from 0 to 5"):
        ops.attention(q, q, q, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize("num_heads", [0, 5])
def test_bad_packed_heads(num_heads):
    with pytest.raises(ValueError, match="num_heads"):
        ops.attention_qkvpacked(torch.zeros(1, 4, 24), num_heads)
