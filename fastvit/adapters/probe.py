"""Proof by trial: a block is replaced only after a random copy of it has computed the same both ways.

Structure alone can't see that somebody's subclass computes something else, or keeps something, with the same children.
Nor can one trial see what depends on its circumstances: so the number of images and tokens, the size of values, the
mode and, in code that no library publishes, the dtype vary, and the number of tokens is also what the model feeds.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.adapters.parts import PLAIN, block_obstacle, explain, is_published, run_block
from fastvit.adapters.swap import rope_argument
from fastvit.nn._listeners import descendants
from fastvit.ops import use_backend

# (batch, tokens) of the trials of every kind of block.
_FIRST, _SECOND = (2, 5), (1, 8)
# Of the trial in bf16.
_THIRD = (3, 6)
# An image of 224 pixels in patches of 16, and a class token: where the model doesn't tell how many it feeds.
_TYPICAL_TOKENS = 197
# Attention in plain torch holds the square of it.
_MOST_TOKENS = 1600
# Differences in what is computed are larger, those of rounding smaller.
_TOLERANCE, _ROUNDINGS = 1e-4, 10


class Proof(NamedTuple):
    """What the trial found: why the fused block must not replace the block, or None; and how the block answers.

    ran: did the block's own forward take the hidden states?
    """

    obstacle: str | None
    returns_tuple: bool = False
    ran: bool = True


_known: dict[tuple[Any, ...], Proof] = {}


def probe(block: nn.Module, adapter: Any, model: nn.Module) -> Proof:
    """Run a random copy of the block both ways, once for each combination of classes and settings.

    model: what the block is part of.
    """
    inside = (block, *descendants(block))
    modules = tuple((type(m), type(m).forward, _settings(m)) for m in inside)
    tokens: tuple[int, ...] = ()
    if not all(is_published(type(m)) and is_published(type(m).forward) for m in inside):
        tokens = _fed_tokens(model, adapter.read(block).qkv[0][0].shape[1])
    # That a block is sharded is no reason to leave its kind.
    signature = modules, tuple(type(p) for p in block.parameters()), tokens
    if signature not in _known:
        _known[signature] = _try(block, adapter, tokens)
    return _known[signature]


def _fed_tokens(model: nn.Module, width: int) -> tuple[int, ...]:
    """How many tokens a model feeds to its blocks, going by its position embeddings."""
    positions, prefix = set(), 0
    for path, t in (*model.named_parameters(), *model.named_buffers()):
        if t.ndim < 2 or t.shape[-1] != width:
            continue
        name, count = path.removesuffix(".weight").rpartition(".")[2], t.shape[:-1].numel()
        if "pos" in name:
            positions.add(count)
        elif path.endswith(name) and re.search("cls|class|reg|dist", name):
            prefix += count
    # A square is a grid of patches: class and register tokens have no position.
    known = {n + prefix if math.isqrt(n) ** 2 == n else n for n in positions}
    return tuple(sorted({min(n, _MOST_TOKENS) for n in known})[-2:]) or (_TYPICAL_TOKENS,)


# What every module has.
_COMMON = frozenset(nn.Module().__dict__)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Attributes that may choose between computations: of a library's class its flags, of another everything."""
    if is_published(type(module)):
        return tuple((k, v) for k, v in module.__dict__.items() if isinstance(v, (bool, str)) and k != "training")
    return tuple((k, repr(v)) for k, v in module.__dict__.items() if k not in _COMMON)


def _try(block: nn.Module, adapter: Any, tokens: tuple[int, ...]) -> Proof:
    """tokens: larger numbers to try, for a class that no library publishes."""
    for p in block.parameters():
        if type(p) not in PLAIN:
            return Proof(f"its parameters are {type(p).__name__}, not plain tensors: optimize before they are sharded")
    for module in (block, *descendants(block)):
        if hidden := [k for k, v in module.__dict__.items() if isinstance(v, Tensor)]:
            return Proof(f"{type(module).__name__} has tensors that are no parameters or buffers: {', '.join(hidden)}")
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        use_backend("reference"),  # whichever the caller forces: it may have no float64
    ):
        torch.manual_seed(0)
        try:
            twin = _random_copy(block)
        except Exception as error:
            return Proof(f"can't be copied for a trial run ({type(error).__name__}: {error})")
        first = None
        for circumstance, proof in _trials(twin, adapter, tokens):
            if proof.obstacle is not None:
                return Proof(proof.obstacle + circumstance)
            first = first or proof
    assert first is not None
    return first


def _trials(twin: nn.Module, adapter: Any, tokens: tuple[int, ...]) -> Iterator[tuple[str, Proof]]:
    """(circumstance, what a trial in it found)."""
    proof = _run_both_ways(twin, adapter, *_FIRST)
    if not proof.ran:  # perhaps for float32 alone
        proof = _run_both_ways(twin.float(), adapter, *_FIRST)
    yield "", proof
    rope = rope_argument(adapter, type(twin))
    if rope is not None and not rope.required:
        yield f" without {rope.name}", _run_both_ways(twin, adapter, *_FIRST, rotated=False)
    twin.float()  # twice as fast, and what models have
    yield f" with {_SECOND[1]} tokens", _run_both_ways(twin, adapter, *_SECOND, massive=True)
    yield ", in training", _run_both_ways(twin.train(), adapter, *_FIRST)
    twin.eval()
    for n in tokens:
        yield f" with {n} tokens", _run_both_ways(twin, adapter, 1, n)
    if tokens:
        proof = _run_both_ways(twin.bfloat16(), adapter, *_THIRD)
        # A forward for float32 alone is none that bf16 could differ from.
        yield " in torch.bfloat16", proof if proof.ran else Proof(None)


def _run_both_ways(
    twin: nn.Module, adapter: Any, batch: int, tokens: int, massive: bool = False, rotated: bool = True
) -> Proof:
    """massive: one channel is far larger than the rest, as in deep ViTs.  rotated: with rotary positions, if any."""
    rope = rope_argument(adapter, type(twin)) if rotated else None
    angles, given = None, {}
    try:
        parts = adapter.read(twin)
        weight = parts.qkv[0][0]
        prefix = 1 if parts.rope_prefix is None else parts.rope_prefix
        tokens += prefix if tokens <= prefix else 0
        if parts.bias is not None:
            tokens = parts.bias.shape[-1]
        x = torch.randn(batch, tokens, weight.shape[1], dtype=torch.float64, device="cpu").to(weight.dtype)
        if massive:
            x[..., 0] *= 100.0
        if rope is not None:
            head_dim = parts.proj[0].shape[1] // parts.num_heads
            tables = torch.randn(2, tokens - prefix, head_dim, dtype=torch.float64, device="cpu")
            cos, sin = tables.to(x.dtype)
            angles, given = (cos, sin), {rope.name: rope.make((cos, sin))}
        if twin.training and block_obstacle(parts, x, angles) is not None:
            return Proof(None)  # dropout acts: in training the original runs
        torch.manual_seed(1)
        actual = run_block(parts, x, angles=angles)
    except Exception as error:
        return Proof(f"the operators can't express it ({explain(error)})")
    before = [dict(m.__dict__) for m in twin.modules()]
    required = _required(type(twin))
    try:
        torch.manual_seed(1)
        expected = type(twin).forward(twin, x, *[None] * len(required), **given)
    except Exception as error:
        more = ", ".join(required) or type(error).__name__
        return Proof(f"its forward needs more than hidden states ({more})", ran=False)
    returns_tuple = isinstance(expected, tuple)
    if isinstance(expected, tuple) and len(expected) == 1:
        expected = expected[0]
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return Proof("its forward returns something else")
    if not (actual - expected).norm() <= max(_TOLERANCE, _ROUNDINGS * _rounding(x.dtype)) * expected.norm():
        return Proof("its forward computes something else")
    for module, old in zip(twin.modules(), before, strict=True):
        if changed := [k for k, v in module.__dict__.items() if k not in old or old[k] is not v]:
            return Proof(f"{type(module).__name__}.forward keeps {', '.join(changed)}")
    return Proof(None, returns_tuple)


def _rounding(dtype: torch.dtype) -> float:
    """The relative error of a product: set_float32_matmul_precision has a say in it."""
    a = torch.randn(128, 128, dtype=dtype, device="cpu")
    exact = a.double() @ a.double()
    return float(((a @ a).double() - exact).norm() / exact.norm())


def isolated_copy(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block on the CPU in eval mode, without the hooks that others have put on it."""
    twin = copy.deepcopy(block)
    if any(t.is_meta for t in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
        for buffer in twin.buffers():
            buffer.zero_()
    twin = twin.to("cpu", dtype).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        module.__dict__.pop("forward", None)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"  # flash attention takes no float64 on CPU
    return twin


def _random_copy(block: nn.Module) -> nn.Module:
    twin = isolated_copy(block, torch.float64)
    for p in twin.parameters():
        # Matrices keep the scale of their input; vectors (norms, biases, LayerScale) are around one.
        noise = torch.randn(p.shape, dtype=torch.float64, device="cpu")
        p.copy_(noise * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    return twin


def _required(cls: type[nn.Module]) -> list[str]:
    """The parameters after the hidden states that have no default: in a block these are masks, and may be None."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[2:]
    return [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
