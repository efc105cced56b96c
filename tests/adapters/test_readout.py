"""A classifier's last block computes what the head reads, and all of it wherever somebody else may look."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import types

import pytest
import torch
from torch import nn

import fastvit
from fastvit.adapters import swap
from fastvit.bench.models import count_flops, needed_flops
from tests.adapters import zoo
from tests.adapters.zoo import run
from tests.tolerances import FLOAT32, INT8, relative_l2

READ = {
    "timm vit": 1,
    "timm vit layer scale": 1,
    "timm vit registers": 1,
    "timm vit qk norm": 1,
    "timm vit unpacked swiglu": 1,
    "timm clip": 1,
    "timm deit distilled": 2,
    "hf vit classifier": 1,
    "hf deit teacher": 2,
    "torchvision vit": 1,
    "open_clip clip": 1,
    "open_clip inner norms": 1,
}
ALL_READ = [
    "timm siglip",
    "hf vit",
    "hf dinov2 registers classifier",
    "hf clip",
    "open_clip layer scale",
    "open_clip coca",
]


@pytest.fixture
def widths(monkeypatch):
    """Tokens that came out of each fused block, call by call, from modules and from prepared calls alike."""
    seen = []
    from_modules, prepared = swap.run_block, swap.run_prepared

    def noted(run):
        def call(*arguments):
            out = run(*arguments)
            if out is not None:
                seen.append(out.shape[1])
            return out

        return call

    monkeypatch.setattr(swap, "run_block", noted(from_modules))
    monkeypatch.setattr(swap, "run_prepared", noted(prepared))
    return seen


@pytest.fixture
def vit():
    model = zoo.make("timm vit layer scale")
    return fastvit.optimize(model), zoo.image(model)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", READ)
def test_only_what_is_read_is_computed(name, quantize, widths):
    model = zoo.make(name)
    x = zoo.image(model)
    truth = run(copy.deepcopy(model).double(), x.double())
    fastvit.optimize(model, quantize=quantize)
    blocks = sum(isinstance(m, swap.FusedBlock) for m in model.modules())
    for _ in range(2):  # from the modules, and prepared
        widths.clear()
        outputs = run(model, x)
        assert len(widths) == blocks and widths[-1] == READ[name] < min(widths[:-1])
        for key, out in outputs.items():
            assert relative_l2(out, truth[key]) < (FLOAT32 if quantize is None else INT8)
    last = [r for r in fastvit.report(model).rows if "what the head reads" in r.detail]
    assert len(last) == 1
    fastvit.restore(model)
    assert not any(isinstance(m, swap.Fused) for m in model.modules())


@pytest.mark.parametrize("name", ALL_READ)
def test_heads_that_read_all_tokens_get_them(name, widths):
    model = fastvit.optimize(zoo.make(name))
    run(model, zoo.image(model))
    assert len(set(widths)) == 1
    assert not any("what the head reads" in r.detail for r in fastvit.report(model).rows)


def test_averages_read_all_tokens(widths):
    model = zoo.timm(global_pool="avg")().eval()
    x = zoo.image(model)
    expected = run(model, x)["output"]
    assert relative_l2(run(fastvit.optimize(model), x)["output"], expected) < FLOAT32
    assert len(set(widths)) == 1
    model.global_pool = "token"  # timm's reset_classifier does this
    run(model, x)
    assert widths[-1] == 1


def test_features_have_all_tokens(vit):
    model, x = vit
    with torch.no_grad():
        run(model, x)
        assert model.forward_features(x).shape[1] == 17
        assert model.forward_intermediates(x)[0].shape[1] == 17


def _mixing_norm(model):
    class Mixing(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x + x.mean(dim=1, keepdim=True))

    model.norm = Mixing(64)


def _head_of_the_instance(model):
    model.forward_head = types.MethodType(lambda self, x, pre_logits=False: self.head(x.mean(dim=1)), model)


def _hook_on_the_norm(model):
    model.norm.register_forward_hook(lambda module, args, out: None)


def _hook_on_the_blocks(model):
    model.blocks.register_forward_hook(lambda module, args, out: None)


def _hook_on_the_last(model):
    model.blocks[-1].register_forward_hook(lambda module, args, out: None)


def _one_more_block(model):
    model.blocks.append(nn.Identity())


@pytest.mark.parametrize(
    "change",
    [_mixing_norm, _head_of_the_instance, _hook_on_the_norm, _hook_on_the_blocks, _hook_on_the_last, _one_more_block],
)
def test_whoever_may_read_more_gets_more(change, vit, widths):
    model, x = vit
    run(model, x)
    assert widths[-1] == 1
    change(model)
    plain = fastvit.restore(copy.deepcopy(model))
    widths.clear()
    assert relative_l2(run(model, x)["output"], run(plain, x)["output"]) < FLOAT32
    assert set(widths) == {17}


def test_a_hook_sees_what_it_saw_before(vit):
    model, x = vit
    seen = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    run(model, x)
    run(fastvit.restore(model), x)
    assert seen[0].shape == seen[1].shape == (2, 17, 64)


def test_a_patched_class(vit, widths, monkeypatch):
    model, x = vit
    cls = type(model).fastvit_original
    original = cls.pool
    monkeypatch.setattr(cls, "pool", lambda self, x, *rest: original(self, x, *rest) + x.mean(dim=1))
    out = run(model, x)["output"]
    assert set(widths) == {17}
    assert relative_l2(out, run(fastvit.restore(model), x)["output"]) < FLOAT32


def test_a_patched_norm(vit, widths, monkeypatch):
    model, x = vit
    model.norm = nn.RMSNorm(64)  # of a class that no block has, or they would all run their own forward
    run(model, x)
    assert widths[-1] == 1
    original = type(model.norm).forward
    monkeypatch.setattr(type(model.norm), "forward", lambda self, x: original(self, x + x.mean(dim=1, keepdim=True)))
    out = run(model, x)["output"]
    assert relative_l2(out, run(fastvit.restore(model), x)["output"]) < FLOAT32


def test_subclasses_are_left_alone():
    class Mine(type(zoo.make("timm vit"))):
        def pool(self, x, pool_type=None):
            return x.mean(dim=1)

    model = Mine(**zoo.TIMM).eval()
    x = zoo.image(model)
    expected = run(model, x)["output"]
    assert relative_l2(run(fastvit.optimize(model), x)["output"], expected) < FLOAT32


def test_gradients_go_through_all_tokens(vit, widths):
    model, x = vit
    model(x).sum().backward()
    assert set(widths) == {17}


def test_hidden_states_are_whole(widths):
    model = zoo.make("hf vit classifier")
    x = zoo.image(model)
    expected = run(model, x, output_hidden_states=True)
    out = run(fastvit.optimize(model), x, output_hidden_states=True)
    assert out.keys() == expected.keys()
    for key, value in expected.items():
        assert out[key].shape == value.shape and relative_l2(out[key], value) < FLOAT32


def test_an_empty_batch_and_a_lone_image(vit):
    model, x = vit
    assert run(model, x[:0])["output"].shape == (0, 64)
    assert relative_l2(run(model, x[1:])["output"], run(model, x)["output"][1:]) < FLOAT32


def test_threads_and_other_models_inside(vit):
    """What one thread reads is nothing to another, nor to a model that shares the blocks."""
    model, x = vit
    both = nn.ModuleList([model, nn.Sequential(model.patch_embed, model.blocks)])
    expected = run(model, x)["output"], run(both[1], x)["output"]
    assert expected[1].shape[1] == 16
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(run(both[i], x)["output"], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_signature_copies_and_programs(vit):
    model, x = vit
    expected = run(model, x)["output"]
    assert inspect.signature(model.forward) == inspect.signature(zoo.make("timm vit").forward)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, x)["output"], expected)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        assert relative_l2(program.module()(x), expected) < FLOAT32


def test_needed_flops_leave_out_what_nobody_reads():
    model = zoo.make("timm vit")
    n, d = 17, 64
    unread = (n - 1) * (2 * (2 * d * d + 8 * d * d) + 4 * n * d)
    x = zoo.image(model)[:1]
    assert needed_flops(model, x) == count_flops(model, x) - unread
    model = zoo.make("hf vit")
    assert needed_flops(model, x) == count_flops(model, x)
