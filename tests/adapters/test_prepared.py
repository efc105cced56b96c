"""A prepared call is used while nothing has changed, and never after anything has."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import fastvit
from fastvit import ops
from fastvit.adapters import prepared, swap
from fastvit.adapters.compare import tensors
from fastvit.ops import _backend
from tests import nasty
from tests.adapters import zoo
from tests.adapters.zoo import run
from tests.tolerances import relative_l2

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason="needs the C++ extension")


def first(model, x):
    return next(iter(run(model, x).values()))


def blocks(model):
    return [m for m in model.modules() if isinstance(m, swap.FusedBlock)]


def is_prepared(model):
    return all(prepared._KEY in b.__dict__ for b in blocks(model))


@pytest.fixture
def slow_calls(monkeypatch):
    """How often a block was run from its modules."""
    calls = []
    original = swap.run_block
    monkeypatch.setattr(swap, "run_block", lambda *arguments: calls.append(1) or original(*arguments))
    return calls


@pytest.fixture
def vit():
    model = zoo.make("timm vit layer scale")
    x = zoo.image(model)
    run(fastvit.optimize(model), x)
    assert is_prepared(model)
    return model, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_the_second_call_is_prepared_and_bit_equal(name, dtype, slow_calls):
    model = fastvit.optimize(zoo.make(name).to(dtype))
    x = zoo.image(model).to(dtype)
    expected = run(model, x)
    served = len(slow_calls)
    assert served == 2
    actual = run(model, x)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
    parts = blocks(model)[0].fastvit_read()
    norms = (parts.q_norm, parts.proj_norm, parts.fc2_norm)
    can_prepare = norms == (None,) * 3 and len(parts.fc1) == 1 and parts.bias is None
    assert len(slow_calls) == (served if can_prepare else 2 * served)


def test_other_batches_and_resolutions_need_no_new_preparation(slow_calls):
    original = zoo.make("timm dynamic size")
    model = fastvit.optimize(copy.deepcopy(original))
    run(model, zoo.image(model))
    slow_calls.clear()
    for shape in ((1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 48, 40)):
        x = torch.randn(shape, generator=nasty.generator())
        assert relative_l2(first(model, x), first(original, x)) < 1e-5
    assert not slow_calls


def _scaled(block):
    block.attn.qkv.weight.data = block.attn.qkv.weight.data * 1.5


def _new_parameter(block):
    block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.detach() * 1.5)


def _transposed(block):  # the same memory, dtype and shape
    block.attn.proj.weight.data = block.attn.proj.weight.data.t()


def _no_bias(block):
    block.mlp.fc2.bias = None


def _new_module(block):
    block.norm2 = nn.LayerNorm(64, eps=0.5)


def _other_activation(block):
    block.mlp.act = nn.SiLU()


def _more_heads(block):
    block.attn.num_heads, block.attn.head_dim = 4, 16
    block.attn.scale = 16**-0.5


def _eps(block):
    block.norm1.eps = 0.5


def _gamma(block):
    block.ls1.gamma.mul_(3.0)


def _hook(block):
    block.attn.register_forward_hook(lambda module, args, output: output * 2.0)


def _pre_hook(block):
    block.mlp.fc2.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def _instance_forward(block):
    block.mlp.forward = lambda x: x * 2.0


def _dropout(block):
    block.mlp.drop1 = nn.Dropout(0.0)


def _added_child(block):
    block.mlp.add_module("extra", nn.Linear(64, 64))


CHANGES = [
    *(_scaled, _new_parameter, _transposed, _no_bias, _new_module, _other_activation, _more_heads, _eps, _gamma),
    *(_hook, _pre_hook, _instance_forward, _dropout, _added_child),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(vit, change):
    model, x = vit
    before = first(model, x)
    with torch.no_grad():
        change(model.blocks[1])
    for _ in range(2):
        actual, expected = first(model, x), first(fastvit.restore(copy.deepcopy(model)), x)
        assert relative_l2(actual, expected) < 1e-5
        if change not in (_dropout, _added_child):
            assert relative_l2(actual, before) > 1e-3


def test_a_patched_class_takes_effect(vit, monkeypatch):
    model, x = vit
    before = first(model, x)
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: torch.relu(x))
    assert relative_l2(first(model, x), before) > 1e-3
    monkeypatch.undo()
    for _ in range(2):
        assert relative_l2(first(model, x), before) < 1e-6


def test_a_patched_class_of_blocks_takes_effect(vit, monkeypatch):
    model, x = vit
    before = first(model, x)
    monkeypatch.setattr(type(blocks(model)[0]).fastvit_original, "forward", lambda self, x: x)
    assert relative_l2(first(model, x), before) > 1e-3
    monkeypatch.undo()
    for _ in range(2):
        assert relative_l2(first(model, x), before) < 1e-6


def test_a_global_hook_takes_effect(vit):
    model, x = vit
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m)))
    first(model, x)
    handle.remove()
    assert any(issubclass(kind, nn.LayerNorm) for kind in seen)


def test_a_config_of_transformers_takes_effect(slow_calls):
    transformers = pytest.importorskip("transformers")
    model = fastvit.optimize(zoo.make("hf vit"))
    x = zoo.image(model)
    before = run(model, x)
    assert is_prepared(model)
    model.config._attn_implementation = "eager"
    run(model, x)
    assert len(slow_calls) == 4
    if int(transformers.__version__.split(".")[0]) >= 5:
        model.config.output_attentions = True
        assert len(tensors(model(x))) > len(before)


def test_dtypes_and_back(vit, slow_calls):
    model, x = vit
    before = first(model, x)
    halved = first(model.bfloat16(), x.bfloat16())
    assert halved.dtype == torch.bfloat16
    assert torch.equal(first(model, x.bfloat16()), halved)
    model.float()
    assert relative_l2(first(model, x), before) < 0.1
    model.double()
    for _ in range(2):
        assert first(model, x.double()).dtype == torch.float64


def test_a_note_of_a_fallback_does_not_outlive_the_next_call(vit):
    model, _ = vit
    block, tokens = model.blocks[0], torch.randn(2, 17, 64)
    with torch.no_grad():
        block(tokens, attn_mask=torch.zeros(17, 17))
        assert swap.last_fallback(block)
        block(tokens)
        assert swap.last_fallback(block) is None


def test_gradients_autocast_modes_and_forced_backends_are_honoured(vit, slow_calls):
    model, x = vit
    expected = first(model, x)
    assert not slow_calls

    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert 0 < relative_l2(model(x).float(), expected) < 0.1
    with ops.use_backend("reference"):
        assert relative_l2(first(model, x), expected) < 1e-5
    with torch.profiler.profile() as profile:
        first(model, x)
    assert "fastvit::mlp" in {event.key for event in profile.key_averages()}
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        first(model, x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert len(slow_calls) == 10  # all but the last


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], -1)[..., :64],
        lambda x: x[:0],
        lambda x: x[:, :1],
    ],
)
def test_inputs_of_another_layout(vit, make):
    model, _ = vit
    block, x = model.blocks[0], make(torch.randn(3, 17, 64, generator=nasty.generator()))
    with torch.no_grad():
        actual, expected = block(x), fastvit.restore(copy.deepcopy(block))(x)
    assert actual.shape == expected.shape
    assert relative_l2(actual, expected) < 1e-5


def test_an_input_of_a_wrong_width_gets_torchs_error(vit):
    model, _ = vit
    for x in (torch.randn(2, 17, 63), torch.randn(17, 64, 2)):
        with torch.no_grad(), pytest.raises(RuntimeError):
            model.blocks[0](x)
    with pytest.raises(TypeError):
        model.blocks[0]("x")


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 5, 64)], ids=str)
@pytest.mark.parametrize("tokens", [None, 1])
def test_an_input_of_another_rank_gets_the_originals_error(vit, shape, tokens):
    model, _ = vit
    block, x = model.blocks[0], torch.randn(shape)

    def error():
        reading = contextlib.nullcontext() if tokens is None else swap.reading(block, tokens)
        with torch.inference_mode(), reading, pytest.raises(Exception) as raised:
            block(x)
        return type(raised.value), str(raised.value)

    mine = error()
    fastvit.restore(model)
    assert mine == error()


def test_a_weight_without_memory_gets_torchs_error(vit):
    """As FSDP leaves its parameters between forwards."""
    model, x = vit
    before = first(model, x)
    weight = model.blocks[0].mlp.fc1.weight
    kept, storage = weight.detach().clone(), weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        first(model, x)
    storage.resize_(size)
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(first(model, x), before)


def test_the_input_is_left_alone(vit):
    model, _ = vit
    x = torch.randn(2, 17, 64)
    kept = x.clone()
    with torch.no_grad():
        model.blocks[0](x)
    assert torch.equal(x, kept)


def test_nothing_is_copied_pickled_or_left_by_restore(vit):
    model, x = vit
    assert not any(prepared._KEY in b.__dict__ for b in blocks(copy.deepcopy(model)))
    run(model, x)
    fastvit.restore(model)
    assert not any(prepared._KEY in m.__dict__ for m in model.modules())


def test_a_shallow_copy_is_its_own_block(vit):
    """DataParallel's replicas share what is in `__dict__`."""
    model, _ = vit
    block = model.blocks[0]
    x = torch.randn(2, 17, 64)
    with torch.no_grad():
        block(x)
        replica = block._replicate_for_data_parallel()
        replica._parameters, replica._modules = dict(block._parameters), dict(block._modules)
        replica.norm1 = nn.LayerNorm(64, eps=0.5)
        assert relative_l2(replica(x), block(x)) > 1e-3


def test_the_model_is_freed_without_the_garbage_collector():
    model = fastvit.optimize(zoo.make("timm vit"))
    run(model, zoo.image(model))
    assert is_prepared(model)
    dead = weakref.ref(model.blocks[0].attn.qkv.weight)
    gc.disable()
    try:
        del model
        assert dead() is None
    finally:
        gc.enable()


def test_threads_share_a_model(vit):
    model, x = vit
    expected, wrong = first(model, x), []

    def work():
        torch.set_num_threads(1)
        for i in range(20):
            if i % 5 == 0:
                prepared.forget(model.blocks[0])
            if not torch.equal(first(model, x), expected):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
