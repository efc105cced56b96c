"""Operators on Triton's backend under autograd: gradients by kernels, with nothing recomputed by the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import ops, reference
from fastvit.nn import Block
from tests import nasty
from tests.kernels.gradients import by_autograd, seed
from tests.tolerances import assert_close

D, H = 64, 96


def _norm() -> dict[str, Tensor]:
    return {"norm_weight": nasty.vector(D, 3, mean=1.0), "norm_bias": nasty.vector(D, 4)}


def _norm_linear() -> dict[str, Tensor]:
    return {"x": nasty.tokens(3, 41, D), "weight": nasty.weight(H, D), "bias": nasty.vector(H), **_norm()}


def _linear_residual() -> dict[str, Tensor]:
    return {
        "x": nasty.tokens(3, 41, H),
        "weight": nasty.weight(D, H),
        "bias": nasty.vector(D),
        "residual": nasty.tokens(3, 41, D, seed=5),
        "layer_scale": nasty.vector(D, 6),
    }


def _mlp() -> dict[str, Tensor]:
    return {
        "x": nasty.tokens(3, 41, D),
        "fc1_weight": nasty.weight(H, D),
        "fc1_bias": nasty.vector(H),
        "fc2_weight": nasty.weight(D, H),
        "fc2_bias": nasty.vector(D),
        "layer_scale": nasty.vector(D, 6),
        **_norm(),
    }


def _self_attention() -> dict[str, Tensor]:
    return {
        "x": nasty.tokens(3, 41, D),
        "qkv_weight": nasty.weight(3 * D, D),
        "qkv_bias": nasty.vector(3 * D),
        "proj_weight": nasty.weight(D, D, seed=8),
        "proj_bias": nasty.vector(D),
        "layer_scale": nasty.vector(D, 6),
        **_norm(),
    }


def _patch_embed() -> dict[str, Tensor]:
    return {
        "image": torch.rand(2, 3, 12, 20, generator=nasty.generator(), dtype=torch.float64),
        "weight": nasty.weight(40, 3, 4, 4),
        "bias": nasty.vector(40),
        "pos_embed": nasty.tokens(15, 40, seed=3),
        "prefix": nasty.tokens(2, 40, seed=4),
    }


def _pool() -> dict[str, Tensor]:
    return {
        "x": nasty.tokens(5, 9, D, offset=2.0),
        "weight": nasty.weight(30, D),
        "bias": nasty.vector(30),
        **_norm(),
    }


DROP_PATH = torch.tensor([0.0, 1.25, 1.25])
CASES: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "norm_linear": (_norm_linear, {"activation": "gelu"}),
    "linear_residual": (_linear_residual, {"drop_path": DROP_PATH}),
    "mlp": (_mlp, {"activation": "gelu", "drop_path": DROP_PATH}),
    "self_attention": (_self_attention, {"num_heads": 2, "drop_path": DROP_PATH}),
    "patch_embed": (_patch_embed, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 2.0), "layout": "NCHW"}),
    "pool": (_pool, {"mode": "avg"}),
}


@pytest.fixture(autouse=True)
def no_recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where an operator's backward turns to the reference."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference was recomputed")

    for name in CASES:
        # The module: `fastvit.ops.<name>` is the function.
        module = sys.modules[f"fastvit.ops.{name}"]
        monkeypatch.setattr(module, "reference", SimpleNamespace(**{name: refuse}))


def check(
    device: torch.device, name: str, tensors: dict[str, Tensor], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Every gradient through `ops.<name>` on Triton's backend, in `dtype`, against float64 and eager PyTorch."""
    tensors = {key: t.to(dtype) for key, t in tensors.items()}
    options = {key: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o for key, o in options.items()}
    double = {key: o.double() if isinstance(o, Tensor) and o.is_floating_point() else o for key, o in options.items()}
    plain = getattr(reference, name)
    grad = seed(*plain(**tensors, **options).shape).to(dtype)
    truth = by_autograd(plain, {key: t.double() for key, t in tensors.items()}, grad.double(), **double)
    eager = by_autograd(plain, tensors, grad, **options)
    with ops.use_backend("triton"):
        on_device = {key: o.to(device) if isinstance(o, Tensor) else o for key, o in options.items()}
        moved = {key: t.to(device) for key, t in tensors.items()}
        actual = by_autograd(getattr(ops, name), moved, grad.to(device), **on_device)
    assert actual.keys() == truth.keys()
    for key, mine in actual.items():
        assert mine.dtype == dtype
        assert_close(mine.cpu(), truth[key], eager=eager[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients(device: torch.device, name: str, dtype: torch.dtype) -> None:
    make, options = CASES[name]
    check(device, name, make(), dtype, options)


@pytest.mark.filterwarnings("ignore:Input #")  # no double precision
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(device: torch.device, name: str) -> None:
    """Against finite differences of the kernels themselves, along a random direction, on tame numbers."""
    make, options = CASES[name]
    names, tensors = zip(*make().items(), strict=True)
    operands = [
        torch.randn(t.shape, generator=nasty.generator(i)).mul(t.shape[-1] ** -0.5 if t.ndim > 1 else 1.0)
        for i, t in enumerate(tensors)
    ]
    operands = [t.to(device).requires_grad_() for t in operands]
    options = {key: o.to(device) if isinstance(o, Tensor) else o for key, o in options.items()}

    def run(*operands: Tensor) -> Tensor:
        return getattr(ops, name)(**dict(zip(names, operands, strict=True)), **options)

    with ops.use_backend("triton"):
        assert torch.autograd.gradcheck(run, operands, eps=1e-2, atol=1e-5, rtol=5e-3, fast_mode=True)


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("mode", ["token", "avg", "norm_avg"])
def test_pool(device: torch.device, mode: str, norm: str) -> None:
    tensors = _pool()
    for missing in {"layer": (), "rms": ("norm_bias",), "none": ("norm_weight", "norm_bias")}[norm]:
        del tensors[missing]
    check(device, "pool", tensors, torch.float32, {"mode": mode, "norm": norm, "num_prefix_tokens": 2})
    del tensors["weight"], tensors["bias"]
    check(device, "pool", tensors, torch.bfloat16, {"mode": mode, "norm": norm})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patch_embed_of_bytes(device: torch.device, dtype: torch.dtype) -> None:
    image = torch.randint(256, (3, 3, 28, 42), generator=nasty.generator(), dtype=torch.uint8)
    image = image.to(memory_format=torch.channels_last)
    tensors = {"weight": nasty.weight(24, 3, 14, 14), "pos_embed": nasty.tokens(6, 24, seed=3)}
    check(device, "patch_embed", tensors, dtype, {"image": image, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)})
    check(device, "patch_embed", tensors, dtype, {"image": image})


def test_gradients_of_batched_position_and_prefix(device: torch.device) -> None:
    tensors = _patch_embed()
    tensors |= {name: tensors[name][None] for name in ("pos_embed", "prefix")}
    check(device, "patch_embed", tensors, torch.float32, {"layout": "NCHW"})


def test_gradients_of_an_image_with_channels_last(device: torch.device) -> None:
    tensors = {"image": torch.randn(2, 28, 14, 3, generator=nasty.generator()), "weight": nasty.weight(24, 3, 14, 14)}
    check(device, "patch_embed", tensors, torch.float32, {"layout": "NHWC"})


@pytest.mark.parametrize("name", CASES)
def test_only_what_needs_a_gradient_gets_one(device: torch.device, name: str) -> None:
    make, options = CASES[name]
    options = {key: o.to(device) if isinstance(o, Tensor) else o for key, o in options.items()}
    tensors = {key: t.float().to(device) for key, t in make().items()}
    for key in tensors:
        leaves = {k: t.clone().requires_grad_(k == key) for k, t in tensors.items()}
        with ops.use_backend("triton"):
            out = getattr(ops, name)(**leaves, **options)
            out.backward(torch.ones_like(out))
        assert [k for k, t in leaves.items() if t.grad is not None] == [key]


@pytest.mark.parametrize("name", ["mlp", "self_attention"])
def test_the_operator_itself_recomputes_with_kernels(device: torch.device, name: str) -> None:
    """As `torch.export` and FX call it: one operator, which keeps its arguments alone."""
    make, options = CASES[name]
    options = {key: o.to(device) if isinstance(o, Tensor) else o for key, o in options.items()}
    grads = []
    for call in (getattr(ops, name), torch.no_grad):
        leaves = {k: t.float().to(device).requires_grad_() for k, t in make().items()}
        with ops.use_backend("triton"):
            if call is torch.no_grad:  # the registered operator, in its own argument order
                schema = getattr(torch.ops.fastvit, name).default._schema
                given = {**leaves, **options}
                names = {"q_weight": "qkv_weight", "q_bias": "qkv_bias"} if name == "self_attention" else {}
                defaults = {"norm": "layer", "eps": 1e-6, "scale": (D // 2) ** -0.5}
                positional = [given.get(names.get(a.name, a.name), defaults.get(a.name)) for a in schema.arguments]
                out = getattr(torch.ops.fastvit, name)(*positional)
            else:
                out = call(**leaves, **options)
            out.backward(seed(*out.shape).float().to(device))
        grads.append(leaves)
    for key, t in grads[0].items():
        assert torch.equal(t.grad, grads[1][key].grad), key


def test_mlp_keeps_its_input_and_one_hidden_tensor(device: torch.device) -> None:
    make, options = CASES["mlp"]
    leaves = {k: t.bfloat16().to(device).requires_grad_() for k, t in make().items()}
    kept: list[Tensor] = []
    with (
        ops.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        ops.mlp(**leaves, **{**options, "drop_path": options["drop_path"].to(device)})
    parameters = {t.data_ptr() for t in leaves.values()}
    beside = [t for t in kept if t.data_ptr() not in parameters and t.ndim > 1]
    assert [tuple(t.shape) for t in beside] == [(123, H)]


def _block() -> Block:
    return nasty.randomize(Block(D, 2, qkv_bias=True, init_values=0.1))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_step(device: torch.device, autocast: bool) -> None:
    block, x = _block().to(device), nasty.tokens(2, 5, D, massive=0).float().to(device)
    grads = []
    with ops.use_backend("triton"):
        for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            block.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = run(x).float().square().sum()
            loss.backward()
            grads.append([p.grad.clone() for p in block.parameters()])
    assert all(p.dtype == g.dtype for p, g in zip(block.parameters(), grads[0], strict=True))
    for eager, compiled in zip(*grads, strict=True):
        assert torch.equal(eager, compiled)


def test_autocast_gradients(device: torch.device) -> None:
    """float32 parameters and stream, products in bfloat16: no worse than eager under autocast."""
    make, options = CASES["mlp"]
    options = {"activation": options["activation"]}
    tensors = {k: t.float() for k, t in make().items()}
    grad = seed(3, 41, D).float()
    truth = by_autograd(reference.mlp, {k: t.double() for k, t in tensors.items()}, grad.double(), **options)
    with torch.autocast(device.type, torch.bfloat16):
        with ops.use_backend("triton"):
            moved = {k: t.to(device) for k, t in tensors.items()}
            actual = by_autograd(ops.mlp, moved, grad.to(device), **options)
        eager = by_autograd(reference.mlp, moved, grad.to(device), **options)
    for key, mine in actual.items():
        assert mine.dtype == torch.float32
        # In bfloat16 by computation, if not by type.
        assert_close(mine.cpu().bfloat16(), truth[key], eager=eager[key].cpu().bfloat16())


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    make, options = CASES[name]
    leaves = {k: t.float().requires_grad_() for k, t in make().items()}
    if torch.cuda.is_available():
        pytest.skip("the fake device is the CPU's")
    given = {**leaves, **options, "norm": "layer", "eps": 1e-6}
    operator = getattr(torch.ops.fastvit, "mlp_training" if name == "mlp" else name).default
    if name == "self_attention":
        pytest.skip("it is a composition of the others")
    positional = [given.get(a.name, 1 if a.name == "num_prefix_tokens" else None) for a in operator._schema.arguments]
    with ops.use_backend("triton"):
        torch.library.opcheck(operator, positional)


def test_a_compiled_block_follows_the_backend(device: torch.device) -> None:
    """What was traced for one backend is not run on another."""
    if device.type == "cuda":
        pytest.skip("there one backend alone has kernels")
    block, x = _block().to(device), nasty.tokens(2, 5, D, massive=0).float().to(device)
    traced: list[str] = []

    def spy(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, backend=spy)
    for backend, own in (("triton", True), ("cpp", False), ("triton", True)):
        with ops.use_backend(backend):
            compiled(x)
        assert any("mlp_training" in name for name in traced) == own or not traced
        traced.clear()
