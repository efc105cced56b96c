"""Optimized models inside other people's programs: compilers, exporters, parallel wrappers, conversions, copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastvit
from fastvit.adapters import probe, registry, swap
from fastvit.adapters.compare import tensors
from tests import nasty
from tests.adapters import zoo
from tests.adapters.zoo import ONE_OF_EACH, equal, run
from tests.tolerances import relative_l2


def fused_nodes(graph):
    return sum("fastvit" in str(node.target) for node in graph.nodes)


@pytest.fixture
def vit():
    model = zoo.make("timm vit")
    x = zoo.image(model)
    run(fastvit.optimize(model), x)  # what a call leaves behind must not get in the way
    return model, x


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


# ---- Compilers and exporters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        zoo.timm(drop_path_rate=0.3, init_values=0.1),
        zoo.hf("Dinov2Model", "Dinov2Config", drop_path_rate=0.3),
    ],
)
def test_compiled_training(make):
    model = nasty.randomize(make()).train()
    x = zoo.image(model)
    eager = copy.deepcopy(model)
    fastvit.optimize(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for m in (compiled, eager):
        torch.manual_seed(5)
        sum(t.square().mean() for t in tensors(m(x)).values()).backward()
    for (key, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None and theirs.grad.norm() > 1e-6:  # key biases move nothing
            gradients.append(relative_l2(mine.grad, theirs.grad))
            assert gradients[-1] < 1e-4, key
    assert len(gradients) > 20


def test_compiled_graph_holds_the_operators_and_honours_hooks(vit):
    model, x = vit
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = run(model, x)["output"]
    assert relative_l2(run(compiled, x)["output"], expected) < 1e-6
    assert fused_nodes(graphs[-1]) == 5  # patch_embed, and two of each block
    model.blocks[0].attn.qkv.register_forward_hook(lambda m, args, out: out * 2.0)
    torch._dynamo.reset()
    assert relative_l2(run(compiled, x)["output"], run(model, x)["output"]) < 1e-6
    assert fused_nodes(graphs[-1]) == 3


def test_compiled_under_autocast(vit):
    model, x = vit
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run(compiled, x)["output"], run(model, x)["output"]
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_compiled_recording(vit):
    model = zoo.make("hf vit")
    model.set_attn_implementation("eager")
    x = zoo.image(model)
    ask = {"output_attentions": True, "output_hidden_states": True}
    expected = run(model, x, **ask)
    fastvit.optimize(model)
    actual = run(torch.compile(model, backend="eager"), x, **ask)
    assert actual.keys() == expected.keys()
    assert all(relative_l2(actual[k], expected[k]) < 1e-5 for k in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "hf dinov2", "torchvision vit"])
def test_inductor(name):
    model = zoo.make(name)
    x = zoo.image(model)
    expected = run(model, x)
    actual = run(torch.compile(fastvit.optimize(model), fullgraph=True), x)
    assert all(relative_l2(actual[k], expected[k]) < 1e-5 for k in expected)


def test_a_model_that_was_compiled_before():
    model = zoo.make("timm vit")
    x = zoo.image(model)
    compiled = torch.compile(model, backend="eager")
    expected = run(compiled, x)["output"]
    fastvit.optimize(compiled, strict=True)
    assert relative_l2(run(compiled, x)["output"], expected) < 1e-5
    assert len(fastvit.report(compiled).replaced) == 3
    assert torch.equal(run(fastvit.restore(compiled), x)["output"], expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_batch(vit, strict):
    model, x = vit
    exported = torch.export.export(
        model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("b", min=2, max=64)}}, strict=strict
    )
    assert fused_nodes(exported.graph) == 5  # patch_embed, and two of each block
    batch = torch.cat([x, -x, x])
    assert relative_l2(exported.module()(batch), model(batch)) < 1e-6


def test_symbolic_trace(vit):
    model, x = vit
    traced = torch.fx.symbolic_trace(model)
    assert relative_l2(traced(x), model(x)) < 1e-5
    linears = [n for n in traced.graph.nodes if n.op == "call_module" and n.target.endswith("qkv")]
    assert len(linears) == 2


def test_script_survives_a_file(vit, tmp_path):
    model, x = vit
    torch.jit.script(model).save(str(tmp_path / "vit.pt"))
    assert relative_l2(torch.jit.load(str(tmp_path / "vit.pt"))(x), model(x)) < 1e-5


# ---- Parallel wrappers -----------------------------------------------------------------------------


def test_distributed_data_parallel(vit, tmp_path):
    model, x = vit
    original = fastvit.restore(copy.deepcopy(model))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(model)(x).square().mean().backward()
    finally:
        dist.destroy_process_group()
    original(x).square().mean().backward()
    assert not [r for r in fastvit.report(model).rows if r.status != "fused"]
    for (key, mine), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        if theirs.grad.norm() > 1e-6:
            assert relative_l2(mine.grad, theirs.grad) < 1e-4, key


class Piece(torch.Tensor):
    """As DTensor is: a parameter that is not all here."""


@pytest.mark.parametrize("sharding", ["flat", "subclass"])
@pytest.mark.parametrize("name", ["timm vit", "torchvision vit"])
def test_optimize_of_a_sharded_model(name, sharding):
    """FSDP1 leaves flat parts of parameters.  That is said, and held against no other model."""
    probe._known.clear()
    model = zoo.make(name)
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            if sharding == "flat":
                p.data = p.data.flatten()[: p.numel() // 3]
            else:
                setattr(module, key, nn.Parameter(p.detach().as_subclass(Piece)))
    report = fastvit.report(fastvit.optimize(model))
    assert not report.replaced
    assert all("sharded" in r.detail for r in report.skipped)
    assert len(fastvit.report(fastvit.optimize(zoo.make(name), strict=True)).replaced) == 3


def test_data_parallel_replicas_see_their_own_tensors(vit):
    """A replica has plain tensors where parameters were."""
    model, _ = vit
    x = torch.randn(2, 17, 64)
    block = model.blocks[0]
    replicas = {}
    for path, module in block.named_modules():
        replica = module._replicate_for_data_parallel()
        replica._parameters = {}
        for name, p in module.named_parameters(recurse=False):
            setattr(replica, name, p.detach() * 1.0)
        for name in [n for n, p in module._parameters.items() if p is None]:
            setattr(replica, name, None)
        parent, _, name = path.rpartition(".")
        if path:
            replicas[parent]._modules[name] = replica
        replicas[path] = replica
    assert torch.equal(replicas[""](x), block(x))
    assert not any(r.status == "fallback" for r in fastvit.report(replicas[""]).rows)


# ---- Conversions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)])
def test_conversions_after_optimize(vit, convert):
    model, x = vit
    convert(model)
    dtype = next(model.parameters()).dtype
    actual = run(model, x.to(dtype))["output"]
    expected = run(fastvit.restore(copy.deepcopy(model)), x.to(dtype))["output"]
    assert actual.dtype == dtype
    limit = {torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert relative_l2(actual, expected) <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_undo_after_somebody_elses_conversion(dtype):
    model = zoo.make("timm vit")
    bits = [p.detach().clone() for p in model.parameters()]
    fastvit.optimize(model, dtype=torch.bfloat16).to(dtype)
    fastvit.restore(model)
    assert all(p.dtype == b.dtype and torch.equal(p, b) for p, b in zip(model.parameters(), bits, strict=True))


@pytest.mark.parametrize("inner_first", [False, True])
def test_undo_of_a_model_whose_part_was_converted_too(inner_first):
    model = zoo.make("timm vit")
    bits = [p.detach().clone() for p in model.parameters()]
    steps = [(model.blocks[0], torch.float16), (model, torch.bfloat16)]
    for part, dtype in steps if inner_first else steps[::-1]:
        fastvit.optimize(part, dtype=dtype)
    fastvit.restore(model)
    assert all(p.dtype == b.dtype and torch.equal(p, b) for p, b in zip(model.parameters(), bits, strict=True))


def test_conversion_takes_gradients_along_and_back(vit):
    model, x = vit
    model(x).square().mean().backward()
    before = {k: p.grad.clone() for k, p in model.named_parameters()}
    fastvit.optimize(model, dtype=torch.bfloat16)
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    fastvit.restore(model)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(relative_l2(p.grad, before[k]) < 1e-2 for k, p in model.named_parameters())
    model(x).square().mean().backward()


def test_a_conversion_that_fails_midway(vit, monkeypatch):
    """Some parameters are converted already when it fails."""
    model, _ = vit
    bits = [p.detach().clone() for p in model.parameters()]
    broken = model.blocks[1]

    def apply(fn, recurse=True):
        raise MemoryError("no room")

    monkeypatch.setitem(broken.__dict__, "_apply", apply)
    with pytest.raises(MemoryError):
        fastvit.optimize(model, dtype=torch.bfloat16)
    monkeypatch.undo()
    assert all(p.dtype == b.dtype and torch.equal(p, b) for p, b in zip(model.parameters(), bits, strict=True))
    fastvit.restore(model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), bits, strict=True))


def test_originals_stay_out_of_the_state_dict(vit):
    model, _ = vit
    keys = list(model.state_dict())
    fastvit.optimize(model, dtype=torch.bfloat16)
    assert list(model.state_dict()) == keys
    assert all(t.dtype == torch.bfloat16 for t in model.state_dict().values())


def test_optimize_under_other_modes():
    """What surrounds the call has no say in the trial run."""
    model = zoo.make("timm vit")
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        fastvit.optimize(model, strict=True)
    assert len(fastvit.report(model).replaced) == 3


def test_random_state_is_not_touched():
    model = zoo.make("timm vit")
    probe._known.clear()
    state = torch.get_rng_state()
    fastvit.optimize(model)
    fastvit.report(model)
    assert torch.equal(torch.get_rng_state(), state)


# ---- compare on models in any state ------------------------------------------------------------------


def test_compare_before_optimize_leaves_the_model_as_it_was():
    model = zoo.make("timm vit")
    x = zoo.image(model)
    classes = [type(m) for m in model.modules()]
    comparison = fastvit.compare(model, x)
    assert 0.0 < comparison.max_relative_l2 < 1e-5
    assert [type(m) for m in model.modules()] == classes


def test_compare_keeps_what_the_report_and_the_undo_know(vit):
    model, x = vit
    bits = [p.detach().clone() for p in model.parameters()]
    model.blocks[0].mlp.register_forward_hook(lambda m, args, out: None)
    fastvit.optimize(model, dtype=torch.float16)
    fastvit.optimize(model, dtype=torch.bfloat16)
    with torch.no_grad():
        model.cls_token.fill_(1.0 + 2**-7)  # representable in bfloat16
    run(model, x.bfloat16())
    report = fastvit.report(model).to_dict()
    halves = [p.detach().clone() for p in model.parameters()]
    fastvit.compare(model, x)
    assert fastvit.report(model).to_dict() == report
    assert all(torch.equal(p, h) for p, h in zip(model.parameters(), halves, strict=True))
    fastvit.restore(model)
    for p, b in zip(model.parameters(), bits, strict=True):
        assert torch.equal(p, b) or p is model.cls_token


def test_compare_keeps_buffers_in_training():
    inner = zoo.make("timm vit")
    x = zoo.image(inner)
    model = nn.Sequential(nn.BatchNorm2d(3), inner).train()
    buffers = [b.clone() for b in model.buffers()]
    fastvit.compare(fastvit.optimize(model), x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_compare_names_a_wrong_result(vit, monkeypatch):
    """compare would see it if the operators were wrong."""
    model, x = vit
    monkeypatch.setattr(swap, "run_block", lambda parts, x, tokens, angles: x[:, :tokens])
    monkeypatch.setattr(swap, "run_prepared", lambda *arguments: None)
    assert fastvit.compare(model, x).max_relative_l2 > 1e-2


# ---- Models that their owner wraps, traces or changes ----------------------------------------------


@pytest.fixture
def original():
    model = zoo.make("timm vit")
    return model, zoo.image(model)


def test_inside_wrappers(original):
    model, x = original
    expected = run(model, x)["output"]
    wrapped = nn.Sequential(nn.Identity(), nn.ModuleDict({"vit": model})["vit"])
    fastvit.optimize(wrapped, strict=True)
    assert relative_l2(run(wrapped, x)["output"], expected) < 1e-5
    assert len(fastvit.report(model).replaced) == 3


@pytest.mark.parametrize("name", ["timm vit", "torchvision vit", "hf vit classifier"])
def test_blocks_inside_wrappers_that_show_their_attributes(name):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = zoo.make(name)
    x = zoo.image(model)
    expected = run(model, x)
    for block in [m for m in model.modules() if registry.judge_block(m)]:
        path = next(path for path, m in model.named_modules() if m is block)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, checkpoint_wrapper(block))
    fastvit.optimize(model, strict=True)
    assert sum(isinstance(m, swap.FusedBlock) for m in model.modules()) == 2
    for key, out in run(model, x).items():
        assert relative_l2(out, expected[key]) < 1e-5


def test_one_block_used_twice(original):
    model, x = original
    model.blocks[1] = model.blocks[0]
    expected = run(model, x)["output"]
    assert relative_l2(run(fastvit.optimize(model), x)["output"], expected) < 1e-5
    assert equal(run(fastvit.restore(model), x), {"output": expected})


def test_meta_models():
    with torch.device("meta"):
        model = zoo.timm()()
    fastvit.optimize(model, strict=True)
    assert model(torch.randn(1, 3, 32, 32, device="meta")).shape == (1, 64)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compile_without_graph_breaks(name):
    model = zoo.make(name)
    x = zoo.image(model)
    expected = run(model, x)
    fastvit.optimize(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = run(compiled, x)
    for key in expected:
        assert relative_l2(actual[key], expected[key]) < 1e-5
    torch._dynamo.reset()


def test_export(original):
    model, x = original
    fastvit.optimize(model)
    exported = torch.export.export(model, (x,))
    assert sum("fastvit" in str(n.target) for n in exported.graph.nodes) == 5  # patch_embed, and two of each block
    assert relative_l2(exported.module()(x), model(x)) < 1e-6


def test_jit_trace_and_script(original):
    model, x = original
    expected = run(model, x)["output"]
    fastvit.optimize(model)
    assert relative_l2(torch.jit.trace(model, x, check_trace=False)(x), expected) < 1e-5
    assert relative_l2(torch.jit.script(model)(x), expected) < 1e-5


def test_fx_trace_of_an_optimized_block(original):
    model, _ = original
    fastvit.optimize(model)
    tokens = torch.randn(2, 17, 64)
    traced = torch.fx.symbolic_trace(model.blocks[0].mlp)
    assert torch.equal(traced(tokens), model.blocks[0].mlp(tokens))


def test_timm_methods_after_optimize(original):
    model, x = original
    twin = copy.deepcopy(model)
    fastvit.optimize(model)
    with torch.no_grad():
        for mine, theirs in zip(
            model.get_intermediate_layers(x, n=2), twin.get_intermediate_layers(x, n=2), strict=True
        ):
            assert relative_l2(mine, theirs) < 1e-5
        _, features = model.forward_intermediates(x)
        assert len(features) == 2
        for m in (model, twin):
            m.set_input_size(img_size=(48, 40))
            m.reset_classifier(3)
            nasty.randomize(m.head)
            m.prune_intermediate_layers([0], prune_norm=False, prune_head=False)
        y = torch.randn(1, 3, 48, 40)
        assert relative_l2(model(y), twin(y)) < 1e-5


@pytest.mark.parametrize("size", [(33, 47), (32, 40)])
def test_images_beyond_the_last_whole_patch(size):
    model = nasty.randomize(zoo.timm(dynamic_img_size=True)()).eval()
    x = torch.randn(1, 3, *(s // 8 * 8 for s in size))
    conv = model.patch_embed.proj
    expected = conv(torch.nn.functional.pad(x, (0, size[1] % 8, 0, size[0] % 8)))
    fastvit.optimize(model)
    assert relative_l2(conv(torch.nn.functional.pad(x, (0, size[1] % 8, 0, size[0] % 8))), expected) < 1e-5


def test_gradient_checkpointing(original):
    model, x = original
    fastvit.optimize(model).train()
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, e, rtol=1e-4, atol=1e-5)


def test_hf_gradient_checkpointing():
    model = zoo.make("hf vit").train()
    x = zoo.image(model)
    fastvit.optimize(model)
    model(x).last_hidden_state.sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(x).last_hidden_state.sum().backward()
    actual = [p.grad for p in model.parameters() if p.grad is not None]
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-4, atol=1e-5)
