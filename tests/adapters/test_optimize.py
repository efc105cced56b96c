"""The guarantees of optimize and restore, on every supported library and family."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastvit
from fastvit.adapters.compare import tensors
from tests import nasty
from tests.adapters import zoo
from tests.adapters.zoo import ONE_OF_EACH, equal, run
from tests.tolerances import assert_close, relative_l2


@pytest.fixture
def vit():
    model = zoo.make("timm vit")
    return model, zoo.image(model)


# ---- Same outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_outputs(name, dtype):
    model = zoo.make(name).to(dtype)
    x = zoo.image(model).to(dtype)
    truth, eager = run(copy.deepcopy(model).double(), x.double()), run(model, x)
    fastvit.optimize(model, strict=True)
    actual = run(model, x)
    report = fastvit.report(model)
    assert len(report.replaced) == 3, report  # two blocks and the patch convolution
    assert all(r.status == "fused" for r in report.replaced), report
    assert actual.keys() == truth.keys()
    for key, reference in truth.items():
        assert actual[key].dtype == eager[key].dtype
        assert_close(actual[key], reference, eager=eager[key])
    assert equal(run(model, x), actual)  # the second call starts from what the first one left
    fastvit.restore(model)
    assert equal(run(model, x), eager)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradients_in_training(name):
    model = zoo.make(name).train()
    x = zoo.image(model)
    original = copy.deepcopy(model)
    for m in (fastvit.optimize(model), original):
        sum(t.square().mean() for t in tensors(m(x)).values()).backward()
    assert fastvit.report(model).rows[0].status == "fused"
    for (key, mine), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if theirs.grad is not None and theirs.grad.norm() > 1e-6:  # key biases move nothing
            assert relative_l2(mine.grad, theirs.grad) < 1e-4, key


@pytest.mark.parametrize(
    "make",
    [
        zoo.timm(drop_path_rate=0.5),
        zoo.hf("Dinov2Model", "Dinov2Config", drop_path_rate=0.5),
    ],
)
def test_drop_path_drops_the_same_samples(make):
    model = nasty.randomize(make()).train()
    x = zoo.image(model, batch=16)
    original = copy.deepcopy(model)
    fastvit.optimize(model)
    torch.manual_seed(3)
    expected = run(original, x)
    torch.manual_seed(3)
    actual = run(model, x)
    assert fastvit.report(model).rows[0].status == "fused"
    for key in expected:
        assert relative_l2(actual[key], expected[key]) < 1e-5


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_autocast(name):
    model = zoo.make(name)
    x = zoo.image(model)
    truth = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(model, x)
        actual = run(fastvit.optimize(model), x)
    assert all(r.status == "fused" for r in fastvit.report(model).rows)
    for key in truth:
        assert actual[key].dtype == eager[key].dtype
        # Both round to bf16 at the same places.
        assert relative_l2(actual[key], truth[key]) <= 1.2 * relative_l2(eager[key], truth[key])


# ---- What stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_identity_of_everything_stays(name):
    model = zoo.make(name)
    classes = [type(m) for m in model.modules()]
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    attributes = [set(m.__dict__) for m in model.modules()]
    assert fastvit.optimize(model) is model
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert [set(m.__dict__) for m in model.modules()] == attributes
    for module, cls in zip(model.modules(), classes, strict=True):
        assert isinstance(module, cls)
        assert type(module).__qualname__ == cls.__qualname__
    assert fastvit.restore(model) is model
    assert [type(m) for m in model.modules()] == classes


def test_idempotent(vit):
    model, x = vit
    fastvit.optimize(model)
    classes, before = [type(m) for m in model.modules()], run(model, x)
    fastvit.optimize(model)
    assert [type(m) for m in model.modules()] == classes
    assert equal(run(model, x), before)
    fastvit.restore(fastvit.restore(model))


def test_restore_of_an_untouched_model(vit):
    model, x = vit
    before = run(model, x)
    assert equal(run(fastvit.restore(model), x), before)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_deepcopy_pickle_and_state_dict(name):
    model = zoo.make(name)
    x = zoo.image(model)
    original = copy.deepcopy(model)
    before = run(fastvit.optimize(model), x)
    assert equal(run(copy.deepcopy(model), x), before)
    assert equal(run(pickle.loads(pickle.dumps(model)), x), before)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert equal(run(torch.load(buffer, weights_only=False), x), before)
    original.load_state_dict(model.state_dict())
    assert equal(run(original, x), run(fastvit.restore(model), x))


@pytest.mark.parametrize(
    "update",
    [
        lambda m: m.mul_(1.5),
        lambda m: m.data.mul_(1.5),
        lambda m: m.data[:3].zero_(),
        lambda m: setattr(m, "data", m.data * 1.5),
    ],
)
@pytest.mark.parametrize("which", ["qkv", "fc1", "norm1"])
def test_weight_updates_take_effect(vit, which, update):
    model, x = vit
    fastvit.optimize(model)
    before = run(model, x)["output"]
    block = model.blocks[0]
    parameter = {"qkv": block.attn.qkv, "fc1": block.mlp.fc1, "norm1": block.norm1}[which].weight
    with torch.no_grad():
        update(parameter)
    after = run(model, x)["output"]
    assert not torch.equal(before, after)
    assert relative_l2(after, run(fastvit.restore(model), x)["output"]) < 1e-5


def test_load_state_dict_and_optimizer_steps_take_effect(vit):
    model, x = vit
    other = nasty.randomize(zoo.timm()(), seed=5).eval()
    fastvit.optimize(model)
    model.load_state_dict(other.state_dict())
    assert relative_l2(run(model, x)["output"], run(other, x)["output"]) < 1e-5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = run(model, x)["output"]
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(run(model, x)["output"], before)


def test_replaced_modules_take_effect(vit):
    model, x = vit
    fastvit.optimize(model)
    model.blocks[0].mlp.fc1 = nasty.randomize(nn.Linear(64, 256), seed=9)
    after = run(model, x)["output"]
    assert relative_l2(after, run(fastvit.restore(model), x)["output"]) < 1e-5


# ---- dtype ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_dtype_and_its_exact_undo(name):
    model = zoo.make(name)
    x = zoo.image(model)
    before, parameters = run(model, x), list(model.parameters())
    bits = [p.detach().clone() for p in parameters]
    fastvit.optimize(model, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    run(model, x.bfloat16())
    for twin in (copy.deepcopy(model), model):
        fastvit.restore(twin)
        assert equal(run(twin, x), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), bits, strict=True))


def test_undo_of_dtype_keeps_later_changes(vit):
    model, _ = vit
    weight = model.blocks[0].attn.proj.weight
    old = weight.detach().clone()
    fastvit.optimize(model, dtype=torch.bfloat16)
    with torch.no_grad():
        weight[0] = 2.0
    fastvit.restore(model)
    assert (weight[0] == 2.0).all()
    assert torch.equal(weight[1:], old[1:])


def test_two_conversions_undo_to_the_first(vit):
    model, x = vit
    before = run(model, x)
    fastvit.optimize(model, dtype=torch.float16)
    fastvit.optimize(model, dtype=torch.bfloat16)
    assert equal(run(fastvit.restore(model), x), before)


# ---- Fall-back ------------------------------------------------------------------------------------


def fell_back(model, reason):
    rows = [r for r in fastvit.report(model).rows if r.status == "fallback"]
    return bool(rows) and all(reason in r.detail for r in rows)


@pytest.mark.parametrize("inner", ["norm1", "attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.act", "norm2"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_inside_a_block_fire(vit, inner, kind):
    model, x = vit
    expected = model(x)
    fastvit.optimize(model)
    calls = []
    register = {"forward": "register_forward_hook", "pre": "register_forward_pre_hook"}.get(
        kind, "register_full_backward_hook"
    )
    handle = getattr(model.blocks[0].get_submodule(inner), register)(lambda *a: calls.append(1))
    out = model(x)
    out.sum().backward()
    assert calls
    assert relative_l2(out, expected) < 1e-5
    assert fell_back(model, "hook")
    handle.remove()
    model(x)
    assert all(r.status == "fused" for r in fastvit.report(model).rows)


def test_hooks_on_a_block_stay(vit):
    model, x = vit
    seen = []
    model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    fastvit.optimize(model)
    run(model, x)
    assert len(seen) == 1
    assert all(r.status == "fused" for r in fastvit.report(model).rows)


def test_a_hook_that_changes_the_result_is_honoured(vit):
    model, x = vit
    fastvit.optimize(model)
    model.blocks[0].mlp.register_forward_hook(lambda m, args, out: out * 0.0)
    actual = run(model, x)["output"]
    assert fell_back(model, "hook")
    assert relative_l2(actual, run(fastvit.restore(model), x)["output"]) < 1e-5


@pytest.mark.parametrize("options", [{"proj_drop_rate": 0.5}, {"attn_drop_rate": 0.5}])
def test_dropout_in_training_runs_the_original(options):
    model = nasty.randomize(zoo.timm(**options)()).train()
    original = copy.deepcopy(model)
    x = zoo.image(model)
    fastvit.optimize(model)
    torch.manual_seed(1)
    actual = run(model, x)
    torch.manual_seed(1)
    expected = run(original, x)
    assert relative_l2(actual["output"], expected["output"]) < 1e-5
    assert fell_back(model, "dropout")


@pytest.mark.parametrize("name", ["hf vit", "hf clip", "hf dinov2"])
def test_output_attentions_and_hidden_states(name):
    model = zoo.make(name)
    model.set_attn_implementation("eager")
    x = zoo.image(model)
    ask = {"output_attentions": True, "output_hidden_states": True}
    expected = run(model, x, **ask)
    fastvit.optimize(model)
    for _ in range(2):  # transformers installs its recording hooks at the first call
        actual = run(model, x, **ask)
        assert actual.keys() == expected.keys()
        assert any("attentions" in key for key in actual)
        assert all(relative_l2(actual[k], expected[k]) < 1e-5 for k in expected)
    run(model, x)
    assert all(r.status == "fused" for r in fastvit.report(model).rows)


def test_attention_mask_runs_the_original(vit):
    model, x = vit
    tokens = 17
    mask = torch.zeros(2, 1, tokens, tokens)
    mask[..., 9:] = float("-inf")
    with torch.no_grad():
        expected = model.forward_features(x, attn_mask=mask)
        actual = fastvit.optimize(model).forward_features(x, attn_mask=mask)
    assert relative_l2(actual, expected) < 1e-6
    assert fell_back(model, "attn_mask")


def test_causal_text_tower_is_right():
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 136}
    config = transformers.CLIPConfig(text_config=text, vision_config=zoo.HF, projection_dim=16)
    model = nasty.randomize(transformers.CLIPModel(config)).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(1, 99, (2, 7))}
    with torch.no_grad():
        expected = tensors(model(**inputs))
        actual = tensors(fastvit.optimize(model)(**inputs))
    for key in expected:
        assert relative_l2(actual[key], expected[key]) < 1e-4, key
    rows = {r.path: r for r in fastvit.report(model).rows}
    assert rows["text_model.encoder.layers.0"].status == "left"
    assert rows["vision_model.encoder.layers.0"].status == "fused"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda linear: nn.utils.parametrizations.weight_norm(linear),
        lambda linear: nn.utils.parametrizations.spectral_norm(linear),
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    ],
)
def test_wrapped_linears_run_the_original(vit, wrap):
    model, x = vit
    fastvit.optimize(model)
    block = model.blocks[0]
    block.mlp.fc1 = wrap(block.mlp.fc1)
    actual = run(model, x)["output"]
    assert fell_back(model, "")
    assert relative_l2(actual, run(fastvit.restore(model), x)["output"]) < 1e-5


def test_torch_func_transforms(vit):
    model, x = vit
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's own fused attention has no forward-mode derivative
    fastvit.optimize(model)
    expected = model(x).detach()
    actual = torch.func.vmap(lambda image: model(image[None])[0])(x)
    assert relative_l2(actual, expected) < 1e-5
    _, tangent = torch.func.jvp(model, (x,), (x,))
    assert torch.isfinite(tangent).all()


# ---- What is left, and transactions ---------------------------------------------------------------


def test_a_subclass_with_another_forward_is_left():
    timm = pytest.importorskip("timm")

    class Doubled(timm.models.vision_transformer.Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2.0 * super().forward(x, attn_mask=attn_mask, is_causal=is_causal)

    model = nasty.randomize(zoo.timm(block_fn=Doubled)()).eval()
    x = zoo.image(model)
    before = run(model, x)
    assert equal(run(fastvit.optimize(model), x), before)
    assert all("something else" in r.detail for r in fastvit.report(model).skipped if r.cls == "Doubled")
    with pytest.raises(fastvit.UnsupportedModelError, match=r"blocks\.0 \(Doubled\)"):
        fastvit.optimize(model, strict=True)


@pytest.mark.parametrize(
    "block", ["ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock", "DiffParallelScalingBlock"]
)
def test_other_blocks_are_left_with_a_reason(block):
    timm = pytest.importorskip("timm")
    cls = getattr(timm.models.vision_transformer, block)
    model = nasty.randomize(zoo.timm(block_fn=cls)()).eval()
    x = zoo.image(model)
    before = run(model, x)
    assert equal(run(fastvit.optimize(model), x), before)
    assert [r.path for r in fastvit.report(model).skipped if r.detail and "block" in r.path] == ["blocks.0", "blocks.1"]
    with pytest.raises(fastvit.UnsupportedModelError, match=r"blocks\.1"):
        fastvit.optimize(model, strict=True)


def test_a_model_without_blocks():
    model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.ReLU())
    x = torch.randn(1, 3, 8, 8)
    before = model(x)
    assert torch.equal(fastvit.optimize(model)(x), before)
    assert type(model[0]) is nn.Conv2d
    assert "no Vision Transformer block" in str(fastvit.report(model))
    with pytest.raises(fastvit.UnsupportedModelError, match="no Vision Transformer block"):
        fastvit.optimize(model, strict=True)


def test_a_failure_midway_leaves_the_model_as_it_was(vit, monkeypatch):
    model, x = vit
    before, classes = run(model, x), [type(m) for m in model.modules()]

    def broken(self, *args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(type(model), "to", broken)
    with pytest.raises(MemoryError):
        fastvit.optimize(model, dtype=torch.bfloat16)
    monkeypatch.undo()
    assert [type(m) for m in model.modules()] == classes
    assert equal(run(model, x), before)
    assert "_fastvit_undo" not in model.__dict__


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fastvit.optimize(m.state_dict()), TypeError, "model: OrderedDict"),
        (lambda m: fastvit.restore(3), TypeError, "model: int"),
        (lambda m: fastvit.report("vit"), TypeError, "model: str"),
        (lambda m: fastvit.compare(None), TypeError, "model: NoneType"),
        (lambda m: fastvit.optimize(m, quantize="int4"), ValueError, "quantize: 'int4'"),
        (lambda m: fastvit.optimize(m, dtype=torch.int8), ValueError, r"dtype: torch\.int8"),
        (lambda m: fastvit.optimize(m, dtype="bf16"), ValueError, "dtype: bf16"),
    ],
)
def test_bad_arguments(vit, call, error, message):
    with pytest.raises(error, match=message):
        call(vit[0])
