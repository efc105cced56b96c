"""optimize(quantize="int8"): every family, the choice of linears, and the guarantees that float blocks have too."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastvit
from fastvit.adapters import int8, prepared, swap
from fastvit.adapters.parts import FLOAT, Quantization
from fastvit.nn import Block, SwiGLU
from fastvit.ops import _backend, _int8
from tests import nasty
from tests.adapters import zoo
from tests.adapters.zoo import run
from tests.tolerances import INT8, relative_l2

ALL = Quantization("int8", "int8", "int8", "int8")
needs_extension = pytest.mark.skipif(_backend.extension() is None, reason="needs the C++ extension")


def first(model, x):
    return next(iter(run(model, x).values()))


def blocks(model):
    return [m for m in model.modules() if isinstance(m, swap.FusedBlock)]


@pytest.fixture
def vit():
    model = zoo.make("timm vit layer scale")
    return model, zoo.image(model)


def own(**options):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 64}
    return nasty.randomize(fastvit.FastViT(**size, **options)).eval()


# ---- What runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_family(name):
    model = zoo.make(name)
    x = zoo.image(model)
    eager, truth = run(model, x), run(copy.deepcopy(model).double(), x.double())
    fastvit.optimize(model, quantize="int8", strict=True)
    assert [b.fastvit_quantization for b in blocks(model)] == [ALL, ALL]
    actual = run(model, x)
    assert all(1e-4 < relative_l2(actual[k], truth[k]) < INT8 for k in truth)
    report = fastvit.report(model)
    assert [r.status for r in report.replaced] == ["fused"] * 3, report
    assert "self_attention (int8 qkv, proj), mlp (int8 fc1, fc2)" in str(report)
    again = run(model, x)
    assert all(torch.equal(actual[k], again[k]) for k in truth)
    fastvit.restore(model)
    restored = run(model, x)
    assert all(torch.equal(restored[k], eager[k]) for k in truth)


@pytest.mark.parametrize("options", [{}, {"mlp_layer": "swiglu", "mlp_ratio": 5.25}, {"qk_norm": True}])
def test_fastvits_own_model(options):
    model = own(**options, init_values=0.5)
    x = torch.randn(2, 3, 32, 32, generator=nasty.generator())
    truth = first(copy.deepcopy(model).double(), x.double())
    fastvit.optimize(model, quantize="int8", strict=True)
    assert [b.fastvit_quantization for b in blocks(model)] == [ALL, ALL]
    assert 1e-4 < relative_l2(first(model, x), truth) < INT8


def test_fastvits_own_drop_path_in_training():
    model = own(drop_path_rate=0.5).train()
    x = torch.randn(16, 3, 32, 32, generator=nasty.generator())
    twin = copy.deepcopy(model)
    fastvit.optimize(model)
    torch.manual_seed(3)
    expected = first(twin, x)
    torch.manual_seed(3)
    assert relative_l2(first(model, x), expected) < 1e-5
    assert all(r.status == "fused" for r in fastvit.report(model).rows)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["timm vit layer scale", "timm vit swiglu", "hf vit"])
def test_the_second_call_is_prepared_and_bit_equal(name, dtype, monkeypatch):
    model = zoo.make(name)
    x = zoo.image(model).to(dtype)
    fastvit.optimize(model, dtype=dtype, quantize="int8")
    expected = first(model, x)
    assert all(prepared._KEY in b.__dict__ for b in blocks(model))
    monkeypatch.setattr(swap, "run_block", lambda *arguments: pytest.fail("ran from the modules"))
    assert torch.equal(first(model, x), expected)


# ---- The choice -----------------------------------------------------------------------------------


def cancelling(block):
    """fc2 sees a large constant that its weights cancel: a step of int8 is larger than what is left."""
    with torch.no_grad():
        block.mlp.fc1.weight.mul_(0.02)
        block.mlp.fc1.bias.fill_(50.0)
        block.mlp.fc2.weight -= block.mlp.fc2.weight.mean(1, keepdim=True)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_linear_that_quantizes_badly_stays_and_the_report_says_why(vit, dtype):
    model, x = vit
    cancelling(model.blocks[1])
    before = first(copy.deepcopy(model).to(dtype or torch.float32), x.to(dtype or torch.float32))
    fastvit.optimize(model, dtype=dtype, quantize="int8", strict=True)
    good, bad = (b.fastvit_quantization for b in blocks(model))
    assert good == ALL
    assert bad[:4] == ("int8", "int8", "int8", None)
    row = next(r for r in fastvit.report(model).rows if r.path == "blocks.1")
    name = str(dtype or torch.float32).removeprefix("torch.")
    assert row.detail.startswith(f"self_attention (int8 qkv, proj), mlp (int8 fc1); fc2 stays {name}: int8 error ")
    assert " % on synthetic tokens, limit 4 %" in row.detail
    assert relative_l2(first(model, x.to(dtype or torch.float32)), before) < INT8
    twin = pickle.loads(pickle.dumps(model))
    assert [r.detail for r in fastvit.report(twin).rows] == [r.detail for r in fastvit.report(model).rows]


def test_forcing_what_was_left_would_have_been_wrong(vit):
    """The limit refuses what it should: in int8 the linear of the test above loses its result."""
    model, x = vit
    cancelling(model.blocks[1])
    truth = first(model, x)
    fastvit.optimize(model, quantize="int8")
    chosen = relative_l2(first(model, x), truth)
    swap.set_quantization(model.blocks[1], ALL)
    assert relative_l2(first(model, x), truth) > 2 * chosen


def test_a_half_in_float(vit):
    model, _ = vit
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    fastvit.optimize(model, quantize="int8")
    assert model.blocks[0].fastvit_quantization[:4] == ("int8", "int8", None, None)
    details = {r.path: r.detail for r in fastvit.report(model).rows}
    assert details["blocks.0"].startswith("self_attention (int8 qkv, proj), mlp; fc1 stays float32: int8 error nan %")


@pytest.mark.parametrize("make", [lambda: Block(64, 2), lambda: Block(88, 2, 2.0, qkv_bias=True, init_values=1.0)])
def test_fresh_and_random_blocks_are_well_below_the_limit(make):
    for block in (make(), nasty.randomize(make())):
        fastvit.optimize(block)
        parts = block.fastvit_read()
        with torch.no_grad():
            errors = int8._errors(parts, int8._synthetic_tokens(parts))
        assert all(0.002 < e < int8.LIMIT / 2 for e in errors.values()), errors


def test_zero_weights_are_no_error():
    block = nasty.randomize(Block(64, 2))
    with torch.no_grad():
        block.attn.proj.weight.zero_()
    fastvit.optimize(block, quantize="int8")
    assert block.fastvit_quantization == ALL


def test_the_trial_touches_nothing(vit):
    model, _ = vit
    calls = []
    model.blocks[0].norm1.register_forward_hook(lambda *a: calls.append(1))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    bits = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16), fastvit.ops.use_backend("reference"):
        fastvit.optimize(model, quantize="int8")
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), bits, strict=True))
    assert model.blocks[0].fastvit_quantization == ALL


# ---- Modes, copies, undo --------------------------------------------------------------------------


def test_calling_again_changes_the_mode(vit):
    model, x = vit
    original = first(model, x)
    fastvit.optimize(model)
    classes, exact = [type(m) for m in model.modules()], first(model, x)
    fastvit.optimize(model, quantize="int8")
    quantized, other = first(model, x), [type(m) for m in model.modules()]
    assert relative_l2(quantized, exact) > 1e-4
    fastvit.optimize(model, quantize="int8")
    assert [type(m) for m in model.modules()] == other
    assert torch.equal(first(model, x), quantized)
    fastvit.optimize(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(first(model, x), exact)
    assert torch.equal(first(fastvit.restore(fastvit.optimize(model, quantize="int8")), x), original)


def test_identity_of_everything_stays(vit):
    model, x = vit
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    classes, attributes = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    fastvit.optimize(model, quantize="int8")
    assert [set(m.__dict__) for m in model.modules()] == attributes
    run(model, x)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    for module, cls in zip(model.modules(), classes, strict=True):
        assert isinstance(module, cls)
        assert type(module).__qualname__ == cls.__qualname__
    fastvit.restore(model)
    assert [type(m) for m in model.modules()] == classes


def test_dtype_too_and_its_exact_undo(vit):
    model, x = vit
    before, bits = first(model, x), [p.detach().clone() for p in model.parameters()]
    fastvit.optimize(model, dtype=torch.bfloat16, quantize="int8")
    out = first(model, x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert relative_l2(out, before) < INT8
    fastvit.restore(model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), bits, strict=True))
    assert torch.equal(first(model, x), before)


def test_deepcopy_pickle_and_state_dict(vit):
    model, x = vit
    fresh = zoo.make("timm vit layer scale")
    fastvit.optimize(model, quantize="int8")
    before = first(model, x)
    size = len(pickle.dumps(model))
    assert size < 1.1 * len(pickle.dumps(fastvit.restore(copy.deepcopy(model))))  # no int8 form inside
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(p in _int8._entries for p in twin.parameters())
        assert torch.equal(first(twin, x), before)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(first(torch.load(buffer, weights_only=False), x), before)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(first(fresh, x), first(fastvit.restore(model), x))


@needs_extension
def test_restore_frees_the_int8_form(vit):
    model, x = vit
    run(fastvit.optimize(model, quantize="int8"), x)
    assert sum(p in _int8._entries for p in model.parameters()) == 8
    fastvit.restore(model)
    assert not any(p in _int8._entries for p in model.parameters())
    assert not any(prepared._KEY in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("broken", ["to", "second block"])
def test_a_failure_leaves_the_model_as_it_was(vit, monkeypatch, broken):
    model, x = vit
    before, classes = first(model, x), [type(m) for m in model.modules()]
    judged = []

    def fail(*args, **kwargs):
        if broken == "to" and not isinstance(args[0], type(model)):
            return original(*args, **kwargs)
        judged.append(1)
        if broken == "second block" and len(judged) == 1:
            return original(*args, **kwargs)
        raise MemoryError("no room")

    owner, name = (type(model), "to") if broken == "to" else (fastvit.adapters, "choose_quantization")
    original = getattr(owner, name)
    for optimized in (False, True):
        monkeypatch.undo()
        if optimized:
            fastvit.optimize(model, quantize="int8")
            before, classes = first(model, x), [type(m) for m in model.modules()]
        judged.clear()
        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(MemoryError):
            fastvit.optimize(model, dtype=torch.bfloat16, quantize=None if optimized and broken == "to" else "int8")
        monkeypatch.undo()
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(first(model, x), before)


@pytest.mark.parametrize("device", ["meta"])
def test_models_elsewhere_are_refused(device):
    with torch.device(device):
        model = zoo.timm()()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"needs a model on the CPU, but blocks\.0\.norm1\.weight is on meta"):
        fastvit.optimize(model, quantize="int8")
    assert [type(m) for m in model.modules()] == classes
    with pytest.raises(ValueError, match="quantize: 'fp8' is not served"):
        fastvit.optimize(model, quantize="fp8")


def test_compare_keeps_the_mode(vit):
    model, x = vit
    fastvit.optimize(model, quantize="int8")
    before = first(model, x)
    assert 1e-4 < fastvit.compare(model, x).max_relative_l2 < INT8
    assert torch.equal(first(model, x), before)
    assert blocks(model)[0].fastvit_quantization == ALL


# ---- Weights that change --------------------------------------------------------------------------


def matches_its_copy(model, x):
    """A copy shares no cache: it quantises the weights as they are now."""
    return torch.equal(first(model, x), first(copy.deepcopy(model), x))


@pytest.mark.parametrize(
    "update",
    [
        lambda p: p.mul_(1.5),
        lambda p: p.data.mul_(1.5),
        lambda p: p.data[:3].zero_(),
        lambda p: setattr(p, "data", p.data * 1.5),
        lambda p: setattr(p, "data", p.data.flip(0)),
    ],
)
@pytest.mark.parametrize("which", ["qkv", "proj", "fc1", "fc2", "norm1"])
def test_weight_updates_take_effect(vit, which, update):
    model, x = vit
    fastvit.optimize(model, quantize="int8")
    before = [first(model, x) for _ in range(2)][-1]
    block = model.blocks[0]
    attn, mlp = block.attn, block.mlp
    module = {"qkv": attn.qkv, "proj": attn.proj, "fc1": mlp.fc1, "fc2": mlp.fc2, "norm1": block.norm1}[which]
    with torch.no_grad():
        update(module.weight)
    assert not torch.equal(first(model, x), before)
    assert matches_its_copy(model, x)


def test_load_state_dict_training_and_to(vit):
    model, x = vit
    fastvit.optimize(model, quantize="int8")
    run(model, x)
    other = zoo.make("timm vit layer scale")
    nasty.randomize(other, seed=5)
    model.load_state_dict(other.state_dict())
    assert matches_its_copy(model, x)
    assert relative_l2(first(model, x), first(other, x)) < INT8

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert matches_its_copy(model, x)

    assert relative_l2(first(model.bfloat16(), x.bfloat16()), first(model.float(), x)) < INT8
    assert matches_its_copy(model, x)
    assert relative_l2(first(model.double(), x.double()), first(model.float(), x)) < INT8


def test_gradients_are_near_those_of_float(vit):
    model, x = vit
    twin = fastvit.optimize(copy.deepcopy(model))
    fastvit.optimize(model, quantize="int8").train()
    for m in (model, twin):
        m(x).square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative_l2(mine.grad, theirs.grad) < 4 * INT8, name


def test_wrapped_linears_and_hooks_run_the_original(vit):
    model, x = vit
    original = copy.deepcopy(model)
    fastvit.optimize(model, quantize="int8")
    for m in (model, original):
        m.blocks[0].mlp.register_forward_hook(lambda m, args, out: out * 0.0)
        m.blocks[1].mlp.fc1 = nn.utils.parametrizations.weight_norm(m.blocks[1].mlp.fc1)
    assert relative_l2(first(model, x), first(original, x)) < 1e-5
    assert sum(r.status == "fallback" for r in fastvit.report(model).rows) == 2


def test_compile_and_export(vit):
    model, x = vit
    fastvit.optimize(model, quantize="int8")
    expected = first(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(first(compiled, x), expected)
    torch._dynamo.reset()
    exported = torch.export.export(model, (x,))
    assert all(t.dtype == torch.float32 for t in exported.state_dict.values())
    called = [n for n in exported.graph.nodes if "fastvit" in str(n.target)]
    assert [n.args[-2:] for n in called if "patch" not in str(n.target)] == [("int8", "int8")] * 4
    assert torch.equal(first(exported.module(), x), expected)


def test_a_class_derived_from_the_made_one_keeps_working(vit):
    """As FSDP2 and parametrize derive one."""
    model, x = vit
    fastvit.optimize(model)
    block = model.blocks[0]
    exact = first(model, x)
    block.__class__ = type(type(block).__name__, (type(block),), {"extra": 1})
    fastvit.optimize(model, quantize="int8")
    assert (block.extra, block.fastvit_quantization) == (1, ALL)
    assert 1e-4 < relative_l2(first(model, x), exact) < INT8
    fastvit.optimize(model)
    assert (block.extra, block.fastvit_quantization) == (1, FLOAT)
    assert torch.equal(first(model, x), exact)


def test_without_the_extension(vit, monkeypatch):
    model, x = vit
    expected = first(fastvit.optimize(model, quantize="int8"), x)
    monkeypatch.setattr(_backend, "extension", lambda: None)
    again = first(fastvit.optimize(copy.deepcopy(model), quantize="int8"), x)
    assert relative_l2(again, expected) < INT8 / 2


def test_swiglu_of_fastvit_is_judged_like_any_other():
    block = nasty.randomize(Block(64, 2, 5.25, mlp_layer=SwiGLU))
    fastvit.optimize(block, quantize="int8", strict=True)
    assert block.fastvit_quantization == ALL
