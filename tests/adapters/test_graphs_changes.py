"""`optimize(cuda_graphs=True)` without a GPU: changes of a model that has graphs, and graphs that come and go."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

import fastvit
from fastvit.adapters import graphs
from fastvit.adapters.compare import tensors
from tests.adapters import graphing, zoo
from tests.adapters.graphing import CHANGES, counts, graphed, needs_extension, run, scale_in_place, told
from tests.tolerances import FLOAT32, relative_l2

pytestmark = needs_extension
stand_in, vit = graphing.stand_in, graphing.vit


# ---- Changes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_changes_take_effect_at_once(stand_in, vit, name):
    model, x = vit
    change, keeps = CHANGES[name]
    before = run(graphed(model, x[:3]), x[:3])
    change(model)
    twin = fastvit.restore(copy.deepcopy(model))
    if name == "another forward":
        twin.head.forward = lambda x: -x
    expected = run(twin, x[:3])
    assert before.shape != expected.shape or not torch.allclose(before, expected)
    replays, captures = stand_in.replays, stand_in.captures
    for _ in range(3):
        assert relative_l2(run(model, x[:3]), expected) <= FLOAT32
    if keeps:
        assert stand_in.captures == captures
        assert stand_in.replays == replays + 3
    elif name == "another forward":
        assert stand_in.captures == captures
        assert "forward of Linear was replaced" in told(model)
    else:
        assert stand_in.captures == captures + 1


def test_a_patched_class_takes_effect_at_once(stand_in, vit, monkeypatch):
    model, x = vit
    before = run(graphed(model, x[:2]), x[:2])
    own = type(fastvit.restore(copy.deepcopy(model)))
    for cls in (type(model.norm), type(model.blocks[0]).fastvit_original, own):
        forward = cls.forward
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", lambda self, x, forward=forward: -forward(self, x))
            assert not torch.allclose(run(model, x[:2]), before)
        for _ in range(2):
            assert torch.allclose(run(model, x[:2]), before)
        assert counts(model).rows == [2]


def test_a_changed_config_takes_effect_at_once(stand_in):
    model = zoo.make("hf clip")
    x = zoo.image(model)
    assert run(graphed(model, x), x).hidden_states is None
    model.config.output_hidden_states = True
    for _ in range(4):
        assert len(run(model, x).hidden_states) == 3
    assert counts(model).rows == [2]


def test_to_another_dtype_and_back(stand_in, vit):
    model, x = vit
    before = run(graphed(model, x[:2]), x[:2])
    assert run(model.double(), x[:2].double()).dtype == torch.float64
    assert run(model, x[:2].double()).dtype == torch.float64
    assert torch.equal(run(model.float(), x[:2]), before)


def test_hooks_inside_fire_and_go(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    calls = []
    for module in (model.blocks[0], model.norm, model.blocks[1].mlp.fc1):
        handle = module.register_forward_hook(lambda *a: calls.append(1))
        replays = stand_in.replays
        run(model, x[:2])
        assert len(calls) == 1
        assert stand_in.replays <= replays + 1  # one that was begun before the change was seen
        assert "forward hook on" in told(model)
        handle.remove()
        calls.clear()
        run(model, x[:2])
        run(model, x[:2])
        assert counts(model).rows == [2]


def test_hooks_on_the_model_itself_fire_at_every_call(stand_in, vit):
    model, x = vit
    model.register_forward_hook(lambda m, args, out: -out)
    expected = run(fastvit.optimize(model), x[:2])
    graphed(model, x[:2])
    assert relative_l2(run(model, x[:2]), expected) <= FLOAT32
    assert counts(model).served == 2


def test_weights_that_change_before_every_call_are_never_captured(stand_in, vit):
    model, x = vit
    fastvit.optimize(model, cuda_graphs=True)
    for _ in range(4):
        scale_in_place(model)
        run(model, x[:2])
    assert stand_in.captures == 0


# ---- Off and on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm vit", "hf vit", "torchvision vit"])
def test_restore_undoes_it_exactly(stand_in, name):
    model = zoo.make(name)
    x = zoo.image(model)
    expected = tensors(run(model, x))
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [set(m.__dict__) for m in model.modules()]
    graphed(model, x)
    assert isinstance(model, classes[0])
    assert type(model).__name__ == classes[0].__name__
    assert list(model.state_dict()) == list(state)
    fastvit.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) - {"_fastvit_prepared"} for m in model.modules()] == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    actual = tensors(run(model, x))
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
    assert fastvit.report(model).cuda_graphs == {}


def test_on_again_and_off(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    cls = type(model)
    fastvit.optimize(model, cuda_graphs=True)
    assert type(model) is cls
    run(model, x[:2])
    assert counts(model).served == 2
    assert stand_in.captures == 1
    fastvit.optimize(model)
    assert not graphs.is_graphed(model)
    assert fastvit.report(model).replaced
    graphed(model, x[:2])
    assert stand_in.captures == 2
    with pytest.raises(TypeError, match="cuda_graphs: 1 is not accepted"):
        fastvit.optimize(model, cuda_graphs=1)


def test_with_another_dtype_and_undone(stand_in, vit):
    model, x = vit
    before = run(model, x[:2])
    graphed(model, x[:2])
    fastvit.optimize(model, dtype=torch.bfloat16, cuda_graphs=True)
    assert run(graphed(model, x[:2].bfloat16()), x[:2].bfloat16()).dtype == torch.bfloat16
    assert torch.equal(run(fastvit.restore(model), x[:2]), before)


def test_int8_beneath(stand_in, vit):
    """The int8 form of a weight is a cache: a graph must not outlive it."""
    model, x = vit
    fastvit.optimize(model, quantize="int8", cuda_graphs=True)
    run(model, x[:2])
    before = run(model, x[:2])
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(0.5)
    after = run(model, x[:2])
    assert not torch.allclose(before, after)
    assert torch.equal(run(model, x[:2]), after)


def test_a_part_of_a_model(stand_in, vit):
    model, x = vit
    expected = run(fastvit.optimize(model), x[:2])
    fastvit.optimize(model.blocks, cuda_graphs=True)
    for _ in range(3):
        assert relative_l2(run(model, x[:2]), expected) <= FLOAT32
    assert "2 calls served" in fastvit.report(model).cuda_graphs["blocks"]
    fastvit.optimize(model, cuda_graphs=True)
    assert list(fastvit.report(model).cuda_graphs) == [""]
    fastvit.optimize(model.blocks[0], cuda_graphs=True)  # a block that is fused too, inside
    graphed_block = type(model.blocks[0])
    for _ in range(3):
        assert relative_l2(run(model, x[:2]), expected) <= FLOAT32
    assert type(model.blocks[0]) is graphed_block
    assert counts(model).rows == [2]
    fastvit.restore(model)
    assert not any(graphs.is_graphed(m) or m.__dict__.get(graphs._KEY) for m in model.modules())


def test_a_class_that_was_derived_since(stand_in, vit):
    """As FSDP2 and parametrize do."""
    model, x = vit
    original = type(model)
    fastvit.optimize(model, cuda_graphs=True)
    model.__class__ = type("Sharded", (type(model),), {"sharded": True})
    run(model, x[:2])
    fastvit.restore(model)
    assert model.sharded and issubclass(type(model), original)
    assert not graphs.is_graphed(model)


def test_a_failure_midway_leaves_the_graphs_on(stand_in, vit, monkeypatch):
    model, x = vit

    def broken(self, *args):
        raise MemoryError("no room")

    monkeypatch.setattr(type(model), "to", broken)
    graphed(model, x[:2])
    for setting in (True, False):
        with pytest.raises(MemoryError):
            fastvit.optimize(model, dtype=torch.bfloat16, cuda_graphs=setting)
    run(model, x[:2])
    assert counts(model).served == 2


def test_copies_and_pickles_begin_without_graphs(stand_in, vit):
    model, x = vit
    original = type(model)
    expected = run(graphed(model, x[:2]), x[:2])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(model, protocol=0)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in twins:
        assert type(twin) is type(model)
        assert counts(twin) == graphs.Counts()
        for _ in range(2):
            assert relative_l2(run(twin, x[:2]), expected) <= FLOAT32
        assert counts(twin).rows == [2]
        assert type(fastvit.restore(twin)) is original


def test_a_model_goes_when_nobody_holds_it(stand_in, vit):
    """What was seen of it makes no cycle that only the garbage collector would find."""
    model, x = vit
    model = graphed(copy.deepcopy(model), x[:2])
    run(model, x[:2])
    assert counts(model).served == 2
    weight = weakref.ref(model.head.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_other_peoples_programs(stand_in, vit):
    model, x = vit
    expected = run(fastvit.optimize(model), x[:2])
    graphed(model, x[:2])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_l2(compiled(x[:2]), expected) < 1e-5
    torch._dynamo.reset()
    with torch.no_grad():
        exported = torch.export.export(model, (x[:2],))
    assert sum("fastvit" in str(n.target) for n in exported.graph.nodes) == 5
    assert [n.name for n in exported.graph.nodes if n.name == "x"]
    assert relative_l2(torch.jit.trace(model, x[:2], check_trace=False)(x[:2]), expected) < 1e-5
    assert relative_l2(torch.jit.script(model)(x[:2]), expected) < 1e-5
    for _ in range(3):
        assert relative_l2(run(model, x[:2]), expected) < 1e-5
    assert counts(model).rows == [2]


def test_compare(stand_in, vit):
    model, x = vit
    graphed(model, x[:2])
    cls = type(model)
    assert fastvit.compare(model, x[:2]).max_relative_l2 < 1e-5
    assert type(model) is cls
    run(model, x[:2])
    run(model, x[:2])
    assert counts(model).rows == [2]
