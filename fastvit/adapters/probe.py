"""Proof by trial: a block is replaced only after a random copy of it has computed the same both ways.

Structure alone can't see that somebody's subclass computes something else, or keeps something, with the same children.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.adapters.parts import PLAIN, block_obstacle, explain, is_published, run_block
from fastvit.nn._listeners import descendants
from fastvit.ops import use_backend

_TOKENS = 5
_TOLERANCE = 1e-4


class Proof(NamedTuple):
    """What the trial found: why the fused block must not replace the block, or None; and how the block answers."""

    obstacle: str | None
    returns_tuple: bool = False


_known: dict[tuple[Any, ...], Proof] = {}


def probe(block: nn.Module, adapter: Any) -> Proof:
    """Run a random copy of the block both ways, once for each combination of classes and settings."""
    modules = tuple((type(m), type(m).forward, _settings(m)) for m in (block, *descendants(block)))
    # That a block is sharded is no reason to leave its kind.
    signature = modules, tuple(type(p) for p in block.parameters())
    if signature not in _known:
        _known[signature] = _try(block, adapter)
    return _known[signature]


# What every module has.
_COMMON = frozenset(nn.Module().__dict__)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Attributes that may choose between computations: of a library's class its flags, of another everything."""
    if is_published(type(module)):
        return tuple((k, v) for k, v in module.__dict__.items() if isinstance(v, (bool, str)) and k != "training")
    return tuple((k, repr(v)) for k, v in module.__dict__.items() if k not in _COMMON)


def _try(block: nn.Module, adapter: Any) -> Proof:
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
        proof = _run_both_ways(twin, adapter)
        if proof.obstacle is not None:
            return proof
        in_training = _run_both_ways(twin.train(), adapter)
    if in_training.obstacle is not None:
        return Proof(f"{in_training.obstacle}, in training")
    return proof


def _run_both_ways(twin: nn.Module, adapter: Any) -> Proof:
    try:
        parts = adapter.read(twin)
        x = torch.randn(2, _TOKENS, parts.qkv[0][0].shape[1], dtype=torch.float64, device="cpu")
        if twin.training and block_obstacle(parts, x) is not None:
            return Proof(None)  # dropout acts: in training the original runs
        torch.manual_seed(1)
        actual = run_block(parts, x)
    except Exception as error:
        return Proof(f"the operators can't express it ({explain(error)})")
    before = [dict(m.__dict__) for m in twin.modules()]
    required = _required(type(twin))
    try:
        torch.manual_seed(1)
        expected = type(twin).forward(twin, x, *[None] * len(required))
    except Exception as error:
        more = ", ".join(required) or type(error).__name__
        return Proof(f"its forward needs more than hidden states ({more})")
    returns_tuple = isinstance(expected, tuple)
    if isinstance(expected, tuple) and len(expected) == 1:
        expected = expected[0]
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return Proof("its forward returns something else")
    if not (actual - expected).norm() <= _TOLERANCE * expected.norm():
        return Proof("its forward computes something else")
    for module, old in zip(twin.modules(), before, strict=True):
        if changed := [k for k, v in module.__dict__.items() if k not in old or old[k] is not v]:
            return Proof(f"{type(module).__name__}.forward keeps {', '.join(changed)}")
    return Proof(None, returns_tuple)


def isolated_copy(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block on the CPU in eval mode, without the hooks that others have put on it."""
    twin = copy.deepcopy(block)
    if any(t.is_meta for t in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
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
