"""DDP and FSDP2 in two processes: optimized models train as the originals do on one, and see their weights change.

All cases run in one pair of processes, which import the libraries once; the tests judge what these report.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastvit
from fastvit import ops
from fastvit.adapters import swap
from fastvit.adapters.compare import tensors
from tests import nasty
from tests.adapters import zoo
from tests.tolerances import FLOAT32, LOW_PRECISION_RATIO, relative_l2

WORLD = 2
STEPS = 2

MODELS = {
    "timm": zoo.timm(init_values=0.1),
    "transformers": zoo.hf("Dinov2Model", "Dinov2Config"),
    "torchvision": zoo.torchvision,
    "fastvit": lambda: fastvit.FastViT(32, 8, num_classes=64, embed_dim=64, depth=2, num_heads=2, init_values=0.1),
}


# ---- Wrappers ----------------------------------------------------------------------------------------


def blocks(model):
    return [m for m in model.modules() if type(m).__name__ in ("Block", "Dinov2Layer", "EncoderBlock")]


def ddp(**options):
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


def fsdp(inner=blocks, **options):
    def wrap(model):
        mesh = init_device_mesh("cpu", (WORLD,))
        for module in inner(model):
            fully_shard(module, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    return wrap


def with_children(model):
    """Every layer of a block, then the block."""
    return [m for b in blocks(model) for m in (*(c for c in b.children() if any(True for _ in c.parameters())), b)]


BF16 = fsdp(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
EVERYWHERE = {
    "ddp": ddp(find_unused_parameters=True),  # transformers has a mask token
    "fsdp": fsdp(),
    "fsdp of layers": fsdp(with_children),
}
TIMM_ALONE = {
    "ddp with views": ddp(gradient_as_bucket_view=True),
    "ddp static": ddp(static_graph=True),
    "fsdp kept": fsdp(reshard_after_forward=False),
    # Blocks without hooks of their own, whose weights lose their memory after each forward.
    "fsdp of all blocks together": fsdp(lambda m: [m.blocks], reshard_after_forward=True),
    "fsdp of the model alone": fsdp(lambda m: []),
    "fsdp of attention alone": fsdp(lambda m: [b.attn for b in m.blocks]),
}
# optimize comes before the wrapper, or after it.
CASES = [
    *((name, wrapper, order) for name in MODELS for wrapper in EVERYWHERE for order in ("before", "after")),
    *(("timm", wrapper, order) for wrapper in TIMM_ALONE for order in ("before", "after")),
]


# ---- What the processes do ---------------------------------------------------------------------------


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def images(step, rank):
    return torch.randn(2, 3, 32, 32, generator=nasty.generator(100 * step + rank))


def loss_of(output):
    return sum(t.square().mean() for t in tensors(output).values())


def record(model, batch, dtype=torch.float32):
    """Two steps, with an evaluation before, between and after them, each of two calls."""
    steps = torch.optim.SGD(model.parameters(), lr=0.05)
    seen: dict[str, Any] = {"losses": [], "evaluations": []}

    def evaluate():
        x = images(9, 0).to(dtype)
        model.eval()
        with torch.no_grad():
            seen["evaluations"] += [torch.cat([t.flatten() for t in tensors(model(x)).values()]) for _ in range(2)]
        model.train()

    evaluate()
    for step in range(STEPS):
        loss = loss_of(model(batch(step).to(dtype)))
        seen["losses"].append(loss.detach())
        loss.backward()
        grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        seen["gradients"] = {name.removeprefix("module."): whole(g).clone() for name, g in grads}
        steps.step()
        steps.zero_grad()
        evaluate()
    seen["weights"] = {name.removeprefix("module."): whole(p.detach()) for name, p in model.named_parameters()}
    return seen


def errors(seen, truth):
    """The largest relative error of each kind, and of all gradients together."""
    losses = torch.stack(seen["losses"]).double()
    dist.all_reduce(losses)
    scale = {name: g.norm().item() for name, g in truth["gradients"].items()}
    moving = [name for name in scale if scale[name] > 1e-7 * max(scale.values())]
    assert {n for n in moving if n not in seen["gradients"]} == set()
    mine, exact = (
        torch.cat([(g[n].double() / scale[n]).flatten() for n in moving])
        for g in (seen["gradients"], truth["gradients"])
    )
    found = {
        "loss": relative_l2(losses / WORLD, torch.stack(truth["losses"])),
        "gradient": max(relative_l2(seen["gradients"][n], truth["gradients"][n]) for n in moving),
        "all gradients": relative_l2(mine, exact),
        "weight": max(relative_l2(w, truth["weights"][n]) for n, w in seen["weights"].items()),
        "evaluation": max(map(relative_l2, seen["evaluations"], truth["evaluations"])),
        "moved": relative_l2(truth["evaluations"][0], truth["evaluations"][-1]),
    }
    most = torch.tensor(list(found.values()), dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip(found, most.tolist(), strict=True))


def run_case(original, truth, wrap, order, rank):
    model = copy.deepcopy(original)
    if order == "before":
        fastvit.optimize(model)
    model = wrap(model)
    rows = []
    if order == "after":
        rows = fastvit.report(fastvit.optimize(model)).rows
    found = errors(record(model, lambda step: images(step, rank)), truth)
    rows = rows or fastvit.report(model).rows
    return {"errors": found, "rows": [(r.status, r.detail) for r in rows if r.detail != "patch_embed"]}


def run_cases(rank):
    results = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        original = nasty.randomize(make()).train()
        both = record(
            copy.deepcopy(original).double(),
            lambda step: torch.cat([images(step, r) for r in range(WORLD)]),
            torch.float64,
        )
        wrappers = {**EVERYWHERE, **TIMM_ALONE}
        for case in CASES:
            if case[0] == name:
                results[case] = attempt(run_case, original, both, wrappers[case[1]], case[2], rank)
        for order in ("never", "before"):
            results[name, "bf16", order] = attempt(run_case, original, both, BF16, order, rank)
    return results


def attempt(function, *args):
    """What it returns, or the traceback."""
    try:
        return function(*args)
    except Exception:
        return {"failed": traceback.format_exc()}


def sharded(**options):
    """A randomized timm model, and an optimized and sharded copy."""
    torch.manual_seed(0)
    original = nasty.randomize(zoo.timm(init_values=0.1)())
    return original, fsdp()(fastvit.optimize(copy.deepcopy(original), **options))


@torch.no_grad()
def evaluated(model):
    return model.eval()(images(9, 0))


def restored_and_compared(rank):
    original, model = sharded()
    expected, fused = evaluated(original), evaluated(model)
    comparison = fastvit.compare(model, images(9, 0)).max_relative_l2
    kept = torch.equal(evaluated(model), fused)
    fastvit.restore(model)
    return {"compared": comparison, "kept": kept, "restored": torch.equal(evaluated(model), expected)}


def quantized(rank):
    """The int8 forms are derived from weights that come and go, of which training moves all, and a hand one."""
    original, model = sharded(quantize="int8")
    equal = []
    for step in range(4):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            twin = copy.deepcopy(original)
            twin.load_state_dict(state)
            expected = evaluated(fastvit.optimize(twin, quantize="int8"))
        else:
            expected = torch.empty(2, 64)
        dist.broadcast(expected, 0)
        equal += [torch.equal(evaluated(model), expected) for _ in range(2)]
        if step % 2:
            with torch.no_grad():
                model.blocks[0].mlp.fc2.weight.to_local()[5, 7] += 1.0
            continue
        loss_of(model.train()(images(step, rank))).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    # The same write where the address and the version are sure to stay, as they do when an allocator is lucky.
    x, weight = images(0, 0).flatten(0, 1)[:, :, :8].flatten(1), torch.randn(64, 256)
    before = ops.norm_linear(x, weight, norm="none", quantize="int8")
    weight.data[5, 7] += 1.0
    return {"equal": equal, "seen": not torch.equal(ops.norm_linear(x, weight, norm="none", quantize="int8"), before)}


def prepared_calls(rank):
    """Blocks that FSDP has no hooks on are served by prepared calls while their weights stay."""
    torch.manual_seed(0)
    model = fastvit.optimize(nasty.randomize(zoo.timm(init_values=0.1)()))
    fsdp(lambda m: [])(model)
    calls = []
    run_block, swap.run_block = swap.run_block, lambda *args: calls.append(1) or run_block(*args)
    try:
        for _ in range(3):
            evaluated(model)
    finally:
        swap.run_block = run_block
    return {"calls": len(calls)}


def optimized_too_late(rank):
    torch.manual_seed(0)
    model = fsdp()(zoo.timm(init_values=0.1)())
    message = ""
    try:
        fastvit.optimize(model, strict=True)
    except fastvit.UnsupportedModelError as error:
        message = str(error)
    # The same kind of block, not sharded, is none the worse for it.
    other = fastvit.optimize(zoo.timm(init_values=0.1)(), strict=True)
    return {"message": message, "other": len(fastvit.report(other).replaced)}


def deferred(rank):
    """Made on the meta device, optimized, sharded, given memory, then weights."""
    original, _ = sharded()
    with torch.device("meta"):
        model = zoo.timm(init_values=0.1)()
    fsdp()(fastvit.optimize(model, strict=True)).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, original.state_dict() if rank == 0 else {}, options=options)
    actual = evaluated(model)
    return {"error": relative_l2(actual, evaluated(original)), "rows": [r.status for r in fastvit.report(model).rows]}


def saved(rank):
    """A full state dict has the original's keys and values."""
    original, model = sharded()
    evaluated(model)
    state, expected = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), original.state_dict()
    return {
        "same": rank > 0 or (list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in state))
    }


def dtensors(rank):
    """What operators answer to DTensors."""
    mesh = init_device_mesh("cpu", (WORLD,))
    x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
    messages = {}
    for key, arguments in {
        "all": (distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(weight, mesh, [Shard(0)])),
        "mixed": (x, distribute_tensor(weight, mesh, [Shard(0)])),
    }.items():
        try:
            ops.norm_linear(*arguments)
        except Exception as error:
            messages[key] = str(error)
    return messages


def compiled(rank):
    original, _ = sharded()
    model = nn.parallel.DistributedDataParallel(fastvit.optimize(copy.deepcopy(original)).train())
    loss_of(torch.compile(model, backend="aot_eager")(images(0, rank))).backward()
    mine = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    both = original.double().train()
    loss_of(both(torch.cat([images(0, r) for r in range(WORLD)]).double())).backward()
    return {"error": max(relative_l2(mine[name], p.grad) for name, p in both.named_parameters())}


EXTRAS = (restored_and_compared, quantized, prepared_calls, optimized_too_late, deferred, saved, dtensors, compiled)


def process(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=180),  # where one process fails, the other must not wait for good
    )
    try:
        results = {**run_cases(rank), **{f.__name__: attempt(f, rank) for f in EXTRAS}}
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("distributed"))
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def of(results, key):
    for found in results:
        assert "failed" not in found[key], found[key]["failed"]
    return results[0][key]


# ---- What is asked of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=" | ".join)
def test_trains_as_the_original_does_in_one_process(results, case):
    found = of(results, case)
    for kind in ("loss", "gradient", "weight", "evaluation"):
        assert found["errors"][kind] <= FLOAT32, (kind, found["errors"])
    assert found["errors"]["moved"] > 1e-2
    statuses = {status for status, _ in found["rows"]}
    _, wrapper, order = case
    if wrapper in ("fsdp of layers", "fsdp of attention alone"):
        assert statuses == {"fallback" if order == "before" else "left"}
        assert all("FSDP" in detail or "DTensor" in detail for _, detail in found["rows"])
    elif order == "after" and wrapper.startswith("fsdp"):
        assert statuses == {"left"}
        assert all("optimize before" in detail for _, detail in found["rows"])
    else:
        assert statuses == {"fused"}


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision(results, name):
    eager, mine = (of(results, (name, "bf16", order))["errors"] for order in ("never", "before"))
    for kind in ("all gradients", "evaluation"):
        assert mine[kind] <= LOW_PRECISION_RATIO * eager[kind], (kind, mine[kind], eager[kind])
    assert {status for status, _ in of(results, (name, "bf16", "before"))["rows"]} == {"fused"}


def test_restore_and_compare_of_a_sharded_model(results):
    found = of(results, "restored_and_compared")
    assert found["compared"] <= FLOAT32
    assert found["kept"] and found["restored"]


def test_int8_follows_sharded_weights(results):
    of(results, "quantized")
    for found in results:
        assert found["quantized"]["equal"] == [True] * 8
        assert found["quantized"]["seen"]


def test_prepared_calls_serve_a_sharded_model(results):
    assert of(results, "prepared_calls")["calls"] == 2  # one for each block


def test_optimize_after_sharding_says_what_to_do(results):
    found = of(results, "optimized_too_late")
    assert "optimize before they are sharded" in found["message"]
    assert found["other"] == 3


def test_deferred_initialisation(results):
    found = of(results, "deferred")
    assert found["error"] <= FLOAT32
    assert set(found["rows"]) == {"fused"}


def test_full_state_dict(results):
    assert of(results, "saved")["same"]


def test_distributed_tensors_get_a_clear_error(results):
    found = of(results, "dtensors")
    assert "fastvit.norm_linear" in found["all"]
    assert "fastvit." in found["mixed"] and "DTensor" in found["mixed"]


def test_compiled(results):
    assert of(results, "compiled")["error"] <= FLOAT32
