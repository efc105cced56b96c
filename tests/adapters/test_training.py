"""Optimized models in training: every gradient against float64, and whatever people put around a training step."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastvit
from fastvit.adapters import swap
from fastvit.adapters.compare import tensors
from tests import nasty
from tests.adapters import zoo
from tests.tolerances import FLOAT32, LOW_PRECISION_RATIO, assert_close, relative_l2


def loss_of(output):
    return sum(t.square().mean() for t in tensors(output).values())


def gradients(model, x, call=None):
    """Of a loss over every output, with the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(5)
    loss_of((model if call is None else call)(x)).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def assert_gradients(actual, truth):
    assert actual.keys() == truth.keys()
    largest = max(g.norm() for g in truth.values())
    for key, g in truth.items():
        if g.norm() > 1e-7 * largest:
            assert relative_l2(actual[key], g) <= FLOAT32, key
        else:  # a bias of keys moves nothing: rounding is all that is left
            assert actual[key].norm() <= FLOAT32 * largest, key


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[k], expected[k]) for k in expected)


def pair(make, **how):
    """The same model as it is, and optimized."""
    original = nasty.randomize(make()).train()
    return original, fastvit.optimize(copy.deepcopy(original), strict=True, **how)


def all_fused(model):
    return all(r.status == "fused" for r in fastvit.report(model).replaced)


@pytest.fixture
def vit():
    original, model = pair(zoo.timm(init_values=0.1))
    return original, model, zoo.image(original)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


# ---- Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.MODELS)
def test_gradients_of_every_parameter(name):
    original = zoo.make(name).train()
    model, x = fastvit.optimize(copy.deepcopy(original)), zoo.image(original)
    assert_gradients(gradients(model, x), gradients(original.double(), x.double()))
    assert all_fused(model)


@pytest.mark.parametrize(
    "trained",
    [
        lambda key: key.startswith("head"),
        lambda key: "norm" in key or "bias" in key or "gamma" in key,
        lambda key: key.startswith("blocks.1.attn"),
        lambda key: key == "blocks.0.mlp.fc1.weight",
    ],
)
def test_frozen_parameters(vit, trained):
    original, model, x = vit
    for m in (original, model):
        for key, p in m.named_parameters():
            p.requires_grad_(trained(key))
    actual = gradients(model, x)
    assert {key for key in actual} == {key for key, _ in model.named_parameters() if trained(key)}
    assert_gradients(actual, gradients(original.double(), x.double()))


def test_a_frozen_model_passes_the_gradient_on_to_its_input(vit):
    original, model, x = vit
    grads = []
    for m, image in ((model, x), (original.double(), x.double())):
        image = image.clone().requires_grad_()
        m.requires_grad_(False)(image).square().mean().backward()
        grads.append(image.grad)
        assert all(p.grad is None for p in m.parameters())
    assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", ["timm vit", "hf dinov2"])
def test_gradients_under_autocast(name):
    original = zoo.make(name).train()
    model, x = fastvit.optimize(copy.deepcopy(original)), zoo.image(original, batch=8)

    def step(m):
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = tensors(m(x))
        sum(t.float().square().mean() for t in out.values()).backward()
        return {key: p.grad for key, p in m.named_parameters() if p.grad is not None}

    actual, eager = step(model), step(original)
    truth = gradients(copy.deepcopy(original).double(), x.double())
    assert all_fused(model)
    assert all(g.dtype == torch.float32 for g in actual.values())
    # All parameters together: the error of one vector is chance.
    scale = {key: g.norm() for key, g in truth.items()}
    big = [key for key in truth if scale[key] > 1e-6 * max(scale.values())]
    mine, theirs, exact = (torch.cat([(g[k] / scale[k]).flatten() for k in big]) for g in (actual, eager, truth))
    assert relative_l2(mine, exact) <= LOW_PRECISION_RATIO * relative_l2(theirs, exact)


def test_differentiated_twice(vit):
    original, model, x = vit
    original.double()
    for block in original.blocks:
        block.attn.fused_attn = False  # torch's fused attention can't
    grads = []
    for m, image in ((model, x), (original, x.double())):
        image = image.clone().requires_grad_()
        (penalty,) = torch.autograd.grad(m(image).square().mean(), image, create_graph=True)
        (penalty.square().sum() * 100.0 + m(image).square().mean()).backward()
        grads.append({key: p.grad for key, p in m.named_parameters()})
    assert all_fused(model)
    assert_gradients(*grads)


# ---- Around a step -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
        functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, eps=1e-3, foreach=True),
    ],
)
def test_steps_accumulation_and_evaluation_in_between(vit, optimizer):
    """Two backwards for each step, and a prepared evaluation after each, which sees the weights of that moment."""
    original, model, x = vit
    results = []
    for m, image in ((model, x), (original.double(), x.double())):
        steps, seen = optimizer(m.parameters()), []
        for _ in range(3):
            for part in image.split(1):
                loss_of(m.train()(part)).backward()
            steps.step()
            steps.zero_grad()
            with torch.inference_mode():
                seen += [m.eval()(image), m(image)]
        results.append(seen)
    for actual, truth in zip(*results, strict=True):
        assert_close(actual, truth)
    assert relative_l2(results[1][0], results[1][-1]) > 1e-3


def test_retain_graph_and_hooks_on_parameters(vit):
    _, model, x = vit
    once = gradients(model, x)
    calls = []
    for key, p in model.named_parameters():
        p.register_hook(lambda g, key=key: calls.append(key) or g * 2.0)
        p.register_post_accumulate_grad_hook(lambda p, key=key: calls.append(key))
    model.zero_grad()
    loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert sorted(calls) == sorted(4 * [key for key, _ in model.named_parameters()])
    assert all(relative_l2(p.grad, 4.0 * once[key]) <= FLOAT32 for key, p in model.named_parameters())


def test_a_parameter_changed_before_backward_is_an_error(vit):
    _, model, x = vit
    loss = loss_of(model(x))
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_after_inference(vit):
    _, model, x = vit
    expected = gradients(model, x)
    with torch.inference_mode():
        model.eval()(x)
        model(x)
    assert same(gradients(model.train(), x), expected)


def test_functional_call_sees_its_own_parameters(vit):
    original, model, x = vit
    others = {key: p.detach() * 1.1 for key, p in model.named_parameters()}
    with torch.no_grad():
        model(x)  # leaves prepared calls behind
        before = model(x)
        expected = torch.func.functional_call(original, others, (x,))
        for _ in range(2):
            assert relative_l2(torch.func.functional_call(model, others, (x,)), expected) <= FLOAT32
        assert torch.equal(model(x), before)
    assert relative_l2(before, expected) > 1e-3


def test_deferred_initialisation():
    """Made and optimized on the meta device, traced for shapes there, and given its weights later."""
    original = nasty.randomize(zoo.timm(init_values=0.1)())
    x = zoo.image(original)
    with torch.device("meta"):
        model = zoo.timm(init_values=0.1)()
    fastvit.optimize(model, strict=True)
    out = model(x.to("meta"))
    assert out.is_meta and out.shape == (2, 64)
    model.to_empty(device="cpu").load_state_dict(original.state_dict())
    assert_gradients(gradients(model, x), gradients(original.double(), x.double()))
    assert all_fused(model)


def test_a_fastvit_model_on_the_meta_device():
    with torch.device("meta"):
        model = fastvit.create_model("vit_tiny_patch16_224", num_classes=10, drop_path_rate=0.1).train()
        out = model(torch.empty(2, 3, 224, 224))
    out.sum().backward()
    assert out.is_meta and out.shape == (2, 10)
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


# ---- Stochastic depth and dropout --------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        zoo.timm(drop_path_rate=0.5, init_values=0.1),
        zoo.timm(drop_path_rate=0.5, proj_drop_rate=0.2, attn_drop_rate=0.2),
        zoo.hf("Dinov2Model", "Dinov2Config", drop_path_rate=0.5),
        zoo.hf("ViTModel", "ViTConfig", hidden_dropout_prob=0.2),
    ],
    ids=["timm", "timm dropout", "hf dinov2", "hf vit dropout"],
)
def test_the_same_samples_are_dropped(make):
    """The random numbers are the original's, so the gradients are too."""
    original, model = pair(make)
    x = zoo.image(original, batch=8)
    actual, expected = gradients(model, x), gradients(original, x)
    largest = max(g.norm() for g in expected.values())
    assert all(relative_l2(actual[k], g) <= FLOAT32 for k, g in expected.items() if g.norm() > 1e-6 * largest)
    torch.manual_seed(6)
    other = loss_of(original(x))
    torch.manual_seed(5)
    assert abs(other - loss_of(original(x))) > 1e-4  # another seed drops others


# ---- Activation checkpointing ------------------------------------------------------------------------


def with_drop_path(**options):
    return pair(zoo.timm(drop_path_rate=0.5, init_values=0.1, **options))[1]


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often fused blocks ran."""
    calls = []
    run_block = swap.run_block
    monkeypatch.setattr(swap, "run_block", lambda *args: calls.append(1) or run_block(*args))
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_of_timm(kernel_calls, dropout):
    model = with_drop_path(proj_drop_rate=dropout)
    x = zoo.image(model, batch=8)
    expected, once = gradients(model, x), len(kernel_calls)
    model.set_grad_checkpointing(True)
    assert same(gradients(model, x), expected)
    assert len(kernel_calls) == 3 * once  # once, then twice


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_transformers(kernel_calls, use_reentrant):
    _, model = pair(zoo.hf("Dinov2Model", "Dinov2Config", drop_path_rate=0.5))
    x = zoo.image(model, batch=8).requires_grad_()
    expected = gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert same(gradients(model, x), expected)
    assert len(kernel_calls) == 6


def by_block(model, x, **options):
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        x = checkpoint(block, x, **options)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_by_hand(use_reentrant):
    model = with_drop_path()
    x = zoo.image(model, batch=8).requires_grad_()
    expected = gradients(model, x)
    assert same(gradients(model, x, functools.partial(by_block, model, use_reentrant=use_reentrant)), expected)


def test_selective_checkpointing_by_the_operators_names():
    """What the policy saves is not computed again, and what it doesn't is."""
    model = with_drop_path()
    x = zoo.image(model, batch=8)
    expected = gradients(model, x)
    saved, asked = torch.ops.fastvit.self_attention.default, []

    def policy(ctx, op, *args, **kwargs):
        asked.append((op, ctx.is_recompute))
        return CheckpointPolicy.MUST_SAVE if op is saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with torch.profiler.profile() as profile:
        actual = gradients(model, x, functools.partial(by_block, model, use_reentrant=False, context_fn=contexts))
    assert same(actual, expected)
    assert (saved, False) in asked
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["fastvit::self_attention"] < counts["fastvit::mlp"]


def test_checkpointing_compiled():
    model = with_drop_path()
    x = zoo.image(model, batch=8)
    expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    assert same(gradients(model, x, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


def test_compiled_training_with_any_batch():
    model = pair(zoo.timm(init_values=0.1))[1]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = zoo.image(model, batch)
        expected = gradients(model, x)
        actual = gradients(model, x, compiled)
        assert all(relative_l2(actual[k], g) <= FLOAT32 for k, g in expected.items())
